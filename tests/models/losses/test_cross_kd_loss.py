import math

import pytest
import torch

from mmkd_plugin.models.losses.cross_kd_loss import (
    align_statistics,
    best_score,
    box_loss,
    distribution_loss,
    quality_focal_loss,
)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize('beta', [1., 2.])
def test_quality_focal_loss_by_hand(beta):
    s, t = [0.5, -2., 1.], [2., -1., 1.]
    expected = 0.
    for a, b in zip(s, t, strict=True):
        p, q = sigmoid(a), sigmoid(b)
        expected += abs(p - q)**beta * -(q * math.log(p) + (1 - q) * math.log(1 - p))
    assert quality_focal_loss(torch.tensor(s), torch.tensor(t), beta).item() == pytest.approx(expected, rel=1e-5)


def test_box_loss_by_hand():
    s = torch.tensor([[0., 0, 2, 2], [0, 0, 1, 1]])
    t = torch.tensor([[1., 0, 3, 2], [0, 0, 1, 1]])
    # union 6, intersection 2, hull 6: GIoU 1/3
    assert box_loss(s, t, torch.tensor([0.5, 9.])).item() == pytest.approx(0.5 * 2 / 3, rel=1e-4)


def test_distribution_loss_by_hand():
    s, t = torch.zeros(1, 4, 2, 1, 2), torch.zeros(1, 4, 2, 1, 2)
    t[0, 1, 0, 0, 1] = math.log(3)  # (3/4, 1/4) for one of four distances
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    weight = torch.tensor([[[7., 0.5]]])
    assert distribution_loss(s, t, weight).item() == pytest.approx(0.5 * kl / 4, rel=1e-5)


def test_best_score_is_of_each_anchor():
    logits = torch.tensor([1., 3, -2, -5]).view(1, 4, 1, 1)  # two anchors of two classes
    assert best_score(logits, 2).flatten().tolist() == pytest.approx([sigmoid(3), sigmoid(-2)])


def test_the_teacher_gets_no_gradient():
    s, t = (torch.randn(1, 4, 2, 3, 3, requires_grad=True) for _ in range(2))
    (quality_focal_loss(s, t) + distribution_loss(s, t, torch.rand(1, 3, 3))).backward()
    assert t.grad is None and s.grad.abs().sum() > 0


def test_alignment_gives_each_channel_the_teachers_statistics():
    s, t = torch.randn(2, 3, 4, 5) * 7 + 3, torch.randn(2, 3, 4, 5) * torch.tensor([1., 5, 0.1]).view(3, 1, 1)
    aligned = align_statistics(s, t)
    torch.testing.assert_close(aligned.mean((0, 2, 3)), t.mean((0, 2, 3)))
    torch.testing.assert_close(aligned.std((0, 2, 3)), t.std((0, 2, 3)))
    torch.testing.assert_close(align_statistics(t, t), t)
    torch.testing.assert_close(align_statistics(3 * s + 1, t), aligned, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('shape', [(1, 3, 1, 1), (2, 3, 4, 4), (0, 3, 2, 2)])
def test_alignment_is_finite_on_constant_and_one_cell_maps(shape):
    s = torch.full(shape, 2., requires_grad=True)
    for t in (torch.randn(shape), torch.full(shape, 1e4)):
        aligned = align_statistics(s, t)
        aligned.sum().backward()
        assert aligned.isfinite().all() and s.grad.isfinite().all()
