import pytest
import torch
import torch.nn.functional as F

from mmkd_plugin.models.connectors.review_kd_connector import ReviewKDConnector
from mmkd_plugin.models.losses.review_kd_loss import ReviewKDLoss
from mmkd_plugin.registry import MODELS

IN, OUT, MID = [3, 5, 7], [4, 6, 8], 10
SHAPES = [(9, 12), (5, 6), (1, 1)]


def features(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, c, *shape, generator=g) for c, shape in zip(IN, SHAPES, strict=True)]


def connector():
    torch.manual_seed(0)
    module = ReviewKDConnector(IN, OUT, MID)
    for parameter in module.parameters():  # batch norm's too
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def batch_norm(x, state, prefix):
    shape = (1, -1, 1, 1)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * state[f'{prefix}.weight'].double().view(shape) + state[f'{prefix}.bias'].double().view(shape)


def nearest(x, h, w):
    rows = [i * x.size(2) // h for i in range(h)]
    columns = [j * x.size(3) // w for j in range(w)]
    return x[:, :, rows][:, :, :, columns]


def naive(module, xs):
    """The definition, float64, from the state dict alone."""
    state, outputs, deeper = module.state_dict(), {}, None
    for i in (2, 1, 0):
        x = xs[i].double()
        mid = torch.einsum('nchw,mc->nmhw', x, state[f'levels.{i}.own.conv.weight'].double()[:, :, 0, 0])
        mid = batch_norm(mid, state, f'levels.{i}.own.bn')
        if deeper is not None:
            below = nearest(deeper, *x.shape[2:])
            weight = state[f'levels.{i}.attention.weight'].double()[:, :, 0, 0]  # (2, 2 M)
            bias = state[f'levels.{i}.attention.bias'].double()
            fused = torch.zeros_like(mid)
            both = torch.cat([mid, below], 1)
            logit = [torch.einsum('nmhw,m->nhw', both, weight[k]) + bias[k] for k in (0, 1)]
            for m in range(MID):
                fused[:, m] = mid[:, m] / (1 + (-logit[0]).exp()) + below[:, m] / (1 + (-logit[1]).exp())
            mid = fused
        patches = F.unfold(mid, 3, padding=1)  # (N, 9 M, H W)
        kernel = state[f'levels.{i}.out.conv.weight'].double().flatten(1)
        out = torch.einsum('nkp,ok->nop', patches, kernel).unflatten(2, x.shape[2:])
        outputs[i] = batch_norm(out, state, f'levels.{i}.out.bn')
        deeper = mid
    return [outputs[i] for i in range(3)]


def test_agrees_with_a_naive_computation():
    module, xs = connector(), features()
    outputs = module(xs)
    assert [tuple(out.shape) for out in outputs] == [(2, 4, 9, 12), (2, 6, 5, 6), (2, 8, 1, 1)]
    for out, expected in zip(outputs, naive(module, xs), strict=True):
        torch.testing.assert_close(out.double(), expected, rtol=2e-4, atol=2e-4)


def test_knowledge_flows_from_deep_to_shallow_only():
    module = connector()
    xs = [x.requires_grad_() for x in features()]
    reached = []
    for out in module(xs):
        grads = torch.autograd.grad(out.square().mean(), xs, retain_graph=True, allow_unused=True)
        reached.append([grad is not None and bool(grad.abs().sum() > 0) for grad in grads])
    assert [row[1:] for row in reached[:2]] == [[True, True]] * 2 and reached[0][0] and not reached[1][0]
    assert reached[2][:2] == [False, False]


def test_every_parameter_is_trained_and_none_is_idle():
    module = connector()
    xs, targets = features(), [torch.randn(2, c, *shape) for c, shape in zip(OUT, SHAPES, strict=True)]
    ReviewKDLoss()(module(xs), targets).backward()
    assert all(p.grad is not None for p in module.parameters())
    assert sum(p.grad.norm() > 0 for p in module.parameters()) == len(list(module.parameters()))


def test_the_pair_learns():
    torch.manual_seed(0)
    module, loss = ReviewKDConnector(IN, OUT, MID), ReviewKDLoss()
    xs = features()
    targets = [F.conv2d(x, torch.randn(c, x.size(1), 1, 1)) for x, c in zip(xs, OUT, strict=True)]
    optimiser = torch.optim.Adam(module.parameters(), 0.02)
    values = []
    for _ in range(150):
        value = loss(module(xs), targets)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert values[-1] < 0.1 * values[0]


def test_one_level_needs_no_attention():
    module = ReviewKDConnector([3], [4], 5)
    assert not any('attention' in name for name in module.state_dict())
    assert module([torch.randn(2, 3, 6, 6)])[0].shape == (2, 4, 6, 6)


def test_errors():
    module, xs = connector(), features()
    with pytest.raises(ValueError, match=r'in_channels \[3, 5, 7\], shallow to deep, got \[7, 5, 3\]'):
        module(xs[::-1])
    with pytest.raises(ValueError, match=r'got \[3, 5\]'):
        module(xs[:2])
    with pytest.raises(ValueError, match=r'got one tensor \(2, 3, 9, 12\)'):
        module(xs[0])
    with pytest.raises(ValueError, match=r'equally many levels, got \[3\] and \[4, 5\]'):
        ReviewKDConnector([3], [4, 5])
    with pytest.raises(ValueError, match=r'ReviewKDConnector\.in_channels must be a list.*got 3'):
        ReviewKDConnector(3, [4])
    with pytest.raises(ValueError, match=r'ReviewKDConnector\.out_channels\[1\].*got 0'):
        ReviewKDConnector([3, 3], [4, 0])
    with pytest.raises(ValueError, match=r'ReviewKDConnector\.mid_channels.*got 1.5'):
        ReviewKDConnector([3], [4], mid_channels=1.5)


def test_builds_from_a_config_and_runs_in_mmrazors_distiller():
    """One record that is a list of levels; the loss takes the connector's list."""
    from mmrazor.models.distillers import ConfigurableDistiller
    from torch import nn

    class Levels(nn.Module):

        def forward(self, xs):
            return tuple(xs)

    class Net(nn.Module):

        def __init__(self):
            super().__init__()
            self.neck = Levels()

        def forward(self, xs):
            return self.neck(xs)

    distiller = ConfigurableDistiller(
        student_recorders=dict(neck=dict(type='ModuleOutputs', source='neck')),
        teacher_recorders=dict(neck=dict(type='ModuleOutputs', source='neck')),
        connectors=dict(fuse=dict(
            type='mmkd_plugin.ReviewKDConnector', in_channels=IN, out_channels=OUT, mid_channels=MID)),
        distill_losses=dict(review=dict(type='mmkd_plugin.ReviewKDLoss')),
        loss_forward_mappings=dict(review=dict(
            s_feature=dict(recorder='neck', from_student=True, connector='fuse'),
            t_feature=dict(recorder='neck', from_student=False))))
    student, teacher = Net(), Net()
    distiller.prepare_from_student(student)
    distiller.prepare_from_teacher(teacher)
    targets = [torch.randn(2, c, *shape) for c, shape in zip(OUT, SHAPES, strict=True)]
    with distiller.student_recorders, distiller.teacher_recorders:
        student(features())
        teacher(targets)
    losses = distiller.compute_distill_losses()
    expected = ReviewKDLoss()(distiller.connectors['fuse'](features()), targets)
    value, = losses.values()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert isinstance(MODELS.build(dict(type='ReviewKDConnector', in_channels=[3], out_channels=[4])),
                      ReviewKDConnector)
