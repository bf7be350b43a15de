"""The nine operations against naive float64 loops, hand counts and finite differences."""
import math
import random

import pytest
import torch

from mmkd_plugin.models.refiners import feature_ops
from mmkd_plugin.models.refiners.feature_ops import OPERATIONS, Dice

DICE = Dice(-1., (0.37, 0.81), 7)
NAMES = list(OPERATIONS)
EXACT = [name for name, operation in OPERATIONS.items() if operation.exact]
SHAPES = [(2, 3, 8, 8), (2, 5, 6, 11), (1, 4, 7, 2), (3, 2, 1, 1)]


def features(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def naive_warp(x, source):
    """Bilinear sampling in a loop; ``source(dx, dy)`` in cells from the middle of the map."""
    n, c, h, w = x.shape
    out = torch.zeros_like(x)
    for i in range(h):
        for j in range(w):
            dx, dy = source(j - (w - 1) / 2, i - (h - 1) / 2)
            sx, sy = dx + (w - 1) / 2, dy + (h - 1) / 2
            for yy in (math.floor(sy), math.floor(sy) + 1):
                for xx in (math.floor(sx), math.floor(sx) + 1):
                    if 0 <= yy < h and 0 <= xx < w:
                        out[..., i, j] += (1 - abs(sx - xx)) * (1 - abs(sy - yy)) * x[..., yy, xx]
    return out


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', NAMES)
def test_identity_at_zero(name, shape):
    x = features(shape)
    torch.testing.assert_close(OPERATIONS[name](x, 0., DICE), x)


def test_the_table_holds_the_papers_nine_operations_and_ranges():
    assert {name: operation.limit for name, operation in OPERATIONS.items()} == {
        'ShearX': 0.3, 'ShearY': 0.3, 'TranslateX': 0.45, 'TranslateY': 0.45, 'Rotate': 30., 'Cutout': 0.2,
        'Noise': 0.1, 'ChannelShuffle': 1., 'ChannelDrop': 0.5}


@pytest.mark.parametrize('name', NAMES)
def test_magnitude_is_linear_in_the_value_and_signed_ones_follow_the_dice(name):
    operation, x = OPERATIONS[name], features((2, 8, 9, 6))
    if operation.signed:
        for sign in (1., -1.):
            expected = operation.function(x, 0.7 * operation.limit * sign)
            torch.testing.assert_close(operation(x, 0.7, DICE._replace(sign=sign)), expected)
        assert not torch.allclose(operation(x, 0.7, DICE), operation(x, 0.7, DICE._replace(sign=1.)))
    else:
        expected = operation.function(x, 0.7 * operation.limit, DICE)
        torch.testing.assert_close(operation(x, 0.7, DICE), expected)


def test_translations_are_shares_of_the_map():
    x = features((2, 3, 4, 8))
    for operation, shift, dim in ((feature_ops.translate_x, 2, 3), (feature_ops.translate_y, 1, 2)):
        expected = x.roll(shift, dim)
        expected.narrow(dim, 0, shift).zero_()
        torch.testing.assert_close(operation(x, 0.25), expected)
    one = features((1, 1, 1, 1))
    torch.testing.assert_close(feature_ops.translate_x(one, 0.45), one * 0.55)


@pytest.mark.parametrize('shape', SHAPES)
def test_affine_operations_agree_with_a_naive_loop(shape):
    x, (h, w) = features(shape), shape[2:]
    cos, sin = math.cos(math.radians(23)), math.sin(math.radians(23))
    for operation, value, source in (
            (feature_ops.rotate, 23., lambda u, v: (u * cos - v * sin, u * sin + v * cos)),
            (feature_ops.shear_x, 0.27, lambda u, v: (u - 0.27 * v, v)),
            (feature_ops.shear_y, -0.27, lambda u, v: (u, v + 0.27 * u)),
            (feature_ops.translate_x, 0.31, lambda u, v: (u - 0.31 * w, v)),
            (feature_ops.translate_y, -0.17, lambda u, v: (u, v + 0.17 * h))):
        torch.testing.assert_close(operation(x, value), naive_warp(x, source))


def test_rotation_is_counter_clockwise_and_true_on_maps_that_are_not_square():
    x = features((1, 2, 5, 5))
    torch.testing.assert_close(feature_ops.rotate(x, 90.), x.rot90(1, (2, 3)))
    wide = torch.zeros(1, 1, 5, 11, dtype=torch.float64)
    wide[0, 0, 2, 5:8] = 1.  # a bar of 3 cells to the right of the middle turns to 3 cells upwards
    expected = torch.zeros_like(wide)
    expected[0, 0, 0:3, 5] = 1.
    torch.testing.assert_close(feature_ops.rotate(wide, 90.), expected)


def test_cutout_covers_its_share_and_at_least_one_cell():
    x = torch.ones(2, 3, 10, 20)
    cut = feature_ops.cutout(x, 0.4, DICE._replace(centre=(0.5, 0.25)))
    expected = torch.ones(10, 20)
    expected[3:7, 1:9] = 0
    assert cut.equal(expected.expand_as(x))
    for size in (1, 2, 8):
        one = feature_ops.cutout(torch.ones(1, 1, size, size), 1e-4, DICE)
        assert (one == 0).sum() == 1
        assert one[0, 0, int(DICE.centre[0] * size), int(DICE.centre[1] * size)] == 0


def test_noise_has_its_share_of_each_samples_own_spread():
    x = features((2, 16, 32, 32)) * torch.tensor([1., 50.])[:, None, None, None]
    change = feature_ops.noise(x, 0.1, DICE) - x
    torch.testing.assert_close(change.std((1, 2, 3)), 0.1 * x.std((1, 2, 3)), rtol=0.02, atol=0)
    constant = torch.full((1, 2, 3, 3), 4., requires_grad=True)
    feature_ops.noise(constant, 0.1, DICE).sum().backward()
    assert constant.grad.isfinite().all()


@pytest.mark.parametrize('channels', [1, 2, 7, 64])
@pytest.mark.parametrize('share', [0.1, 0.5, 0.9, 1.])
def test_channel_operations_touch_their_share(channels, share):
    x = torch.arange(1., channels + 1)[None, :, None, None].expand(2, channels, 2, 3)
    shuffled = feature_ops.channel_shuffle(x, share, DICE)
    dropped = feature_ops.channel_drop(x, share, DICE)
    assert shuffled.sort(1).values.equal(x)
    assert abs(int((dropped[0, :, 0, 0] == 0).sum()) - share * channels) <= 0.5
    assert ((dropped == x) | (dropped == 0)).all()
    moved = int((shuffled[0, :, 0, 0] != x[0, :, 0, 0]).sum())
    assert moved <= share * channels + 0.5
    if share * channels > 30:
        assert moved > 0.8 * share * channels


@pytest.mark.parametrize('name', EXACT)
def test_exact_gradient_agrees_with_finite_differences(name):
    x, weight = features((2, 3, 6, 9)), features((2, 3, 6, 9), seed=1)
    m = torch.tensor(0.613, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: (OPERATIONS[name](x, m, DICE) * weight).sum(), m)
    m32 = torch.tensor(0.613, requires_grad=True)  # a float32 magnitude, as the policy has
    (OPERATIONS[name](x, m32, DICE) * weight).sum().backward()
    (OPERATIONS[name](x, m, DICE) * weight).sum().backward()
    torch.testing.assert_close(m32.grad.double(), m.grad, rtol=1e-4, atol=1e-5)


def test_straight_through_gradients_lead_to_the_magnitude_that_made_the_target():
    x = features((4, 32, 16, 16)) + 1
    for name in ('Cutout', 'ChannelDrop', 'ChannelShuffle'):
        for start, direction in ((0.2, -1), (0.9, 1)):  # descent raises the low, lowers the high
            gradients = []
            for seed in range(20):
                dice = Dice.roll(random.Random(seed))
                m = torch.tensor(start, requires_grad=True)
                loss = (OPERATIONS[name](x, m, dice) - OPERATIONS[name](x, 0.55, dice)).square().sum()
                gradients.append(float(torch.autograd.grad(loss, m)[0]))
            assert direction * sum(gradients) > 0, (name, start, gradients)


def test_straight_through_gradient_of_channel_drop_is_that_of_scaling():
    x, weight = features((2, 8, 3, 3)), features((2, 8, 3, 3), seed=1)
    share = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (feature_ops.channel_drop(x, share, DICE) * weight).sum().backward()
    torch.testing.assert_close(share.grad, -(x * weight).sum())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('name', NAMES)
def test_low_precision_and_autocast_keep_dtype_and_compute_in_float32(name, dtype):
    x = features((2, 4, 9, 13), dtype)
    expected = OPERATIONS[name](x.float(), 0.8, DICE).to(dtype)
    m = torch.tensor(0.8, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        out = OPERATIONS[name](x, m, DICE)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected)
    out.float().square().sum().backward()
    assert m.grad.isfinite()


@pytest.mark.parametrize('name', NAMES)
def test_result_depends_on_the_dice_alone(name):
    x, operation = features((2, 6, 8, 8)), OPERATIONS[name]
    torch.manual_seed(0)
    first, state = operation(x, 0.9, DICE), torch.get_rng_state()
    torch.manual_seed(1)
    assert operation(x, 0.9, DICE).equal(first)
    torch.manual_seed(0)
    assert torch.get_rng_state().equal(state)  # the global generator was not touched
    other = Dice(1., (0.12, 0.4), 8)
    assert not operation(x, 0.9, other).equal(first)


@pytest.mark.parametrize('bad', [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, 4, dtype=torch.int64)])
def test_what_is_no_feature_map_is_refused(bad):
    with pytest.raises(ValueError, match='floating and of shape'):
        OPERATIONS['Rotate'](bad, 0.5, DICE)
