import pytest
import torch
import torch.nn.functional as F

from mmkd_plugin.models.connectors import ConvAdapter
from mmkd_plugin.registry import MODELS


def naive(adapter, xs):
    """Every level by itself, with the statistics of all positions, float64."""
    xs = [x.double() for x in xs]
    for i, (conv, norm) in enumerate(zip(adapter.convs, adapter.norms)):
        xs = [F.conv2d(x, conv.weight.double(), padding=1) for x in xs]
        values = torch.cat([x.transpose(0, 1).flatten(1) for x in xs], 1)
        mean, var = (each.view(-1, 1, 1) for each in (values.mean(1), values.var(1, unbiased=False)))
        scale, bias = (each.double().view(-1, 1, 1) for each in (norm.weight, norm.bias))
        xs = [(x - mean) / (var + norm.eps).sqrt() * scale + bias for x in xs]
        if i == 0 or not adapter.signed:
            xs = [x.clamp(min=0) for x in xs]
    return xs


@pytest.mark.parametrize('signed', [True, False])
def test_agrees_with_a_naive_computation(signed):
    adapter = MODELS.build(dict(type='ConvAdapter', in_channels=3, out_channels=5, signed=signed))
    torch.nn.init.normal_(adapter.norms[1].bias)
    xs = (torch.randn(2, 3, 6, 4), torch.randn(2, 3, 3, 2), torch.randn(2, 3, 1, 1))
    out = adapter(xs)
    assert isinstance(out, tuple)
    for x, expected in zip(out, naive(adapter, xs), strict=True):
        torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-5)
    assert signed == any((x < 0).any() for x in out)


def test_one_tensor_gives_one_tensor():
    adapter, x = ConvAdapter(3, 5), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(adapter(x), adapter([x])[0])


def test_a_level_of_one_position_is_no_error():
    out = ConvAdapter(3, 5)([torch.randn(1, 3, 4, 4), torch.randn(1, 3, 1, 1)])
    assert out[1].shape == (1, 5, 1, 1)


def test_evaluation_does_not_depend_on_the_other_levels():
    adapter, xs = ConvAdapter(3, 5).eval(), [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)]
    torch.testing.assert_close(adapter(xs)[1], adapter(xs[1]))


def test_it_runs_on_another_device():
    adapter = ConvAdapter(3, 5).to('meta')
    out = adapter([torch.randn(2, 3, 4, 4, device='meta'), torch.randn(2, 3, 2, 2, device='meta')])
    sum(x.sum() for x in out).backward()
    assert [x.shape for x in out] == [(2, 5, 4, 4), (2, 5, 2, 2)]
    assert all(p.grad.device.type == 'meta' for p in adapter.parameters())


def test_wrong_input_raises():
    with pytest.raises(ValueError, match=r"ConvAdapter.signed.*got 'auto'"):
        ConvAdapter(3, 5, signed='auto')
    with pytest.raises(ValueError, match=r'ConvAdapter.in_channels.*0'):
        ConvAdapter(0, 5)
    with pytest.raises(ValueError, match=r'\(N, 3, H, W\).*\(2, 4, 2, 2\)'):
        ConvAdapter(3, 5)(torch.randn(2, 4, 2, 2))
