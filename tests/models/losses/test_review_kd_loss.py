import pytest
import torch
from torch import nn

from mmkd_plugin.models.losses.review_kd_loss import ReviewKDLoss
from mmkd_plugin.registry import MODELS


def naive_pool(x, rows, columns):
    """Adaptive average: cell i of n covers floor(i L / n) to ceil((i + 1) L / n)."""
    h, w = x.shape[2:]
    out = torch.empty(*x.shape[:2], rows, columns, dtype=x.dtype)
    for i in range(rows):
        for j in range(columns):
            out[:, :, i, j] = x[:, :, i * h // rows:-(-(i + 1) * h // rows),
                                j * w // columns:-(-(j + 1) * w // columns)].mean((2, 3))
    return out


def naive(s, t, terms):
    s, t = s.double(), t.double()
    loss = total = 0.
    for weight, size in terms:
        a, b = (s, t) if size is None else (naive_pool(s, *size), naive_pool(t, *size))
        loss += weight * ((a - b)**2).mean().item()
        total += weight
    return loss / total


FULL = [(1, None), (1 / 2, (4, 4)), (1 / 4, (2, 2)), (1 / 8, (1, 1))]


@pytest.mark.parametrize(('shape', 'terms'), [
    ((8, 8), FULL),
    ((7, 11), FULL),
    ((25, 42), FULL),
    ((4, 4), [(1, None), (1 / 2, (2, 2)), (1 / 4, (1, 1))]),  # 4 x 4 would repeat the full map
    ((2, 2), [(1, None), (1 / 2, (1, 1))]),
    ((1, 1), [(1, None)]),
    ((3, 9), [(1, None), (1 / 2, (3, 4)), (1 / 4, (2, 2)), (1 / 8, (1, 1))]),
    ((1, 5), [(1, None), (1 / 2, (1, 4)), (1 / 4, (1, 2)), (1 / 8, (1, 1))]),
])
def test_agrees_with_a_naive_computation(shape, terms):
    s, t = torch.randn(2, 3, *shape), torch.randn(2, 3, *shape)
    assert ReviewKDLoss()(s, t).item() == pytest.approx(naive(s, t, terms), rel=1e-5)


def test_no_operation_without_a_deterministic_implementation_on_a_gpu():
    s = torch.randn(2, 3, 7, 11, requires_grad=True)
    with torch.profiler.profile() as profile:
        ReviewKDLoss()(s, torch.randn(2, 3, 7, 11)).backward()
    names = {event.name for event in profile.events()}
    assert 'aten::mm' in names and not any('pool' in name for name in names)


def test_values_by_hand():
    ones, zeros = torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    assert ReviewKDLoss()(ones, zeros).item() == pytest.approx(1)  # every term is 1, weights over their sum
    columns = ones * torch.tensor([1., -1]).repeat(4)  # averages to 0 in every pooled cell
    assert ReviewKDLoss()(columns, zeros).item() == pytest.approx(1 / 1.875)
    halves = ones * torch.tensor([1., -1]).repeat_interleave(4)  # only the global mean is 0
    assert ReviewKDLoss(loss_weight=3.)(halves, zeros).item() == pytest.approx(3 * 1.75 / 1.875)


def test_levels_are_summed():
    s = [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)]
    t = [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)]
    loss = ReviewKDLoss()
    expected = loss(s[0], t[0]) + loss(s[1], t[1])
    assert loss(s, tuple(t)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradient_reaches_the_student_only():
    s, t = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 3, 8, 8, requires_grad=True)
    ReviewKDLoss()(s, t).backward()
    assert t.grad is None
    x, y = s.detach().double(), t.detach()
    for index in ((0, 0, 0, 0), (1, 2, 7, 3)):
        step = torch.zeros_like(x)
        step[index] = 1e-4
        slope = (naive(x + step, y, FULL) - naive(x - step, y, FULL)) / 2e-4
        assert s.grad[index].item() == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_float32_under_autocast(dtype):
    s, t = (torch.randn(2, 3, 8, 8) * 300).to(dtype), (torch.randn(2, 3, 8, 8) * 300).to(dtype)
    with torch.autocast('cpu', torch.bfloat16):
        loss = ReviewKDLoss()(s, t)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive(s, t, FULL), rel=1e-5)  # over 65504 before the mean


def test_empty_batch_is_zero():
    assert ReviewKDLoss()(torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8)).item() == 0


def test_errors():
    loss, x = ReviewKDLoss(), torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r'\[\(2, 3, 8, 8\)\] and \[\(2, 4, 8, 8\)\]'):
        loss(x, torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match='level by level'):
        loss([x, x], [x])
    with pytest.raises(ValueError, match='level by level'):
        loss([], [])
    with pytest.raises(ValueError, match='level by level'):
        loss(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r'ReviewKDLoss\.loss_weight.*-1'):
        ReviewKDLoss(loss_weight=-1)


def test_builds_from_a_config():
    loss = MODELS.build(dict(type='ReviewKDLoss', loss_weight=2.))
    assert isinstance(loss, nn.Module) and loss.loss_weight == 2
