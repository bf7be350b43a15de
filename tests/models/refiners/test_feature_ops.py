"""The nine operations against naive float64 loops and hand counts, alone, in rows and in sequences."""
import itertools
import math
import random

import pytest
import torch

from mmkd_plugin.models.refiners.feature_ops import OPERATIONS, Chance, apply_operations, inside, position_weights

CHANCE = Chance((0.37, 0.81), 7)
NAMES = list(OPERATIONS)
SYMMETRIC = NAMES[:5]
SHAPES = [(2, 3, 8, 8), (2, 5, 6, 11), (1, 4, 7, 2), (3, 2, 1, 1)]


def features(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def apply(x, *row, chance=CHANCE):
    return apply_operations([x], [row], chance)[0][0]


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


def source(name, value, h, w):
    """Where a position comes from, in cells from the middle."""
    cos, sin = math.cos(math.radians(value)), math.sin(math.radians(value))
    return {'Rotate': lambda u, v: (u * cos - v * sin, u * sin + v * cos),
            'ShearX': lambda u, v: (u - value * v, v),
            'ShearY': lambda u, v: (u, v - value * u),
            'TranslateX': lambda u, v: (u - value * w, v),
            'TranslateY': lambda u, v: (u, v - value * h)}[name]


# The table

def test_the_table_holds_the_papers_nine_operations_and_ranges():
    assert {name: operation.limit for name, operation in OPERATIONS.items()} == {
        'ShearX': 0.3, 'ShearY': 0.3, 'TranslateX': 0.45, 'TranslateY': 0.45, 'Rotate': 30., 'Cutout': 0.2,
        'Noise': 0.1, 'ChannelShuffle': 1., 'ChannelDrop': 0.5}
    assert [name for name, operation in OPERATIONS.items() if operation.symmetric] == SYMMETRIC


@pytest.mark.parametrize('name', NAMES)
def test_values_are_linear_in_the_magnitude_and_centred_where_symmetric(name):
    operation = OPERATIONS[name]
    low, middle, high = (operation.value(m) for m in (0., 0.5, 1.))
    assert high == operation.limit and middle == (low + high) / 2
    assert low == (-high if name in SYMMETRIC else 0) and (middle == 0) == (name in SYMMETRIC)


# One operation

@pytest.mark.parametrize('name', SYMMETRIC)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('share', [0.9, -0.4])
def test_affine_operations_agree_with_a_naive_loop(name, shape, share):
    x, value = features(shape), share * OPERATIONS[name].limit
    torch.testing.assert_close(apply(x, (name, value)), naive_warp(x, source(name, value, *shape[2:])))


def test_translations_are_shares_of_the_map():
    x = features((2, 3, 4, 8))
    for name, shift, dim in (('TranslateX', 2, 3), ('TranslateY', 1, 2)):
        expected = x.roll(shift, dim)
        expected.narrow(dim, 0, shift).zero_()
        torch.testing.assert_close(apply(x, (name, 0.25)), expected)


def test_rotation_is_counter_clockwise_and_true_on_maps_that_are_not_square():
    x = features((1, 2, 5, 5))
    torch.testing.assert_close(apply(x, ('Rotate', 90.)), x.rot90(1, (2, 3)))
    wide = torch.zeros(1, 1, 5, 11, dtype=torch.float64)
    wide[0, 0, 2, 5:8] = 1.  # a bar of 3 cells to the right of the middle turns to 3 cells upwards
    expected = torch.zeros_like(wide)
    expected[0, 0, 0:3, 5] = 1.
    torch.testing.assert_close(apply(wide, ('Rotate', 90.)), expected)


def test_cutout_covers_its_share_and_at_least_one_cell():
    cut = apply(torch.ones(2, 3, 10, 20), ('Cutout', 0.4), chance=Chance((0.5, 0.25), 0))
    expected = torch.ones(10, 20)
    expected[3:7, 1:9] = 0
    assert cut.equal(expected.expand_as(cut))
    for size in (1, 2, 8):
        one = apply(torch.ones(1, 1, size, size), ('Cutout', 1e-4))
        assert (one == 0).sum() == 1
        assert one[0, 0, int(CHANCE.centre[0] * size), int(CHANCE.centre[1] * size)] == 0


def test_noise_has_its_share_of_each_samples_own_spread():
    x = features((2, 16, 32, 32)) * torch.tensor([1., 50.])[:, None, None, None]
    change = apply(x, ('Noise', 0.1)) - x
    torch.testing.assert_close(change.std((1, 2, 3)), 0.1 * x.std((1, 2, 3)), rtol=0.02, atol=0)
    assert change.mean().abs() < 0.1
    constant = torch.full((1, 2, 3, 3), 4.)
    assert apply(constant, ('Noise', 0.1)).equal(constant)


@pytest.mark.parametrize('channels', [1, 2, 7, 64])
@pytest.mark.parametrize('share', [0.1, 0.5, 0.9, 1.])
def test_channel_operations_touch_their_share(channels, share):
    x = torch.arange(1., channels + 1)[None, :, None, None].expand(2, channels, 2, 3)
    shuffled, dropped = apply(x, ('ChannelShuffle', share)), apply(x, ('ChannelDrop', share))
    assert shuffled.sort(1).values.equal(x)
    count = int((dropped[0, :, 0, 0] == 0).sum())
    assert abs(count - share * channels) < 1 and ((dropped == x) | (dropped == 0)).all()
    moved = int((shuffled[0, :, 0, 0] != x[0, :, 0, 0]).sum())
    assert abs(moved - share * channels) < 1 or moved == 0 and share * channels < 2  # a cycle of one moves nothing


def test_the_share_of_channels_is_right_on_average():
    """Rounded at random, so that neighbouring shares differ in expectation on any number of channels."""
    x, rng = torch.ones(1, 3, 1, 1), random.Random(0)
    counts = [float(3 - apply(x, ('ChannelDrop', 0.25), chance=Chance.draw(rng)).sum()) for _ in range(600)]
    assert set(counts) == {0., 1.} and sum(counts) / 600 == pytest.approx(0.75, abs=0.07)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('name', NAMES)
def test_computes_in_float32_under_autocast_too(name, dtype):
    x = features((2, 4, 9, 13), dtype)
    row = (name, 0.8 * OPERATIONS[name].limit)
    with torch.autocast('cpu', torch.bfloat16):
        out = apply(x, row)
    assert out.dtype == torch.float32 and out.equal(apply(x.float(), row))


@pytest.mark.parametrize('name', NAMES)
def test_result_depends_on_the_chance_alone(name):
    x, row = features((2, 6, 8, 8)), (name, 0.9 * OPERATIONS[name].limit)
    torch.manual_seed(0)
    first, state = apply(x, row), torch.get_rng_state()
    torch.manual_seed(1)
    assert apply(x, row).equal(first) and not first.equal(x)
    torch.manual_seed(0)
    assert torch.get_rng_state().equal(state)  # the global generator was not touched
    other = apply(x, row, chance=Chance((0.12, 0.4), 8))
    assert other.equal(first) == (name in SYMMETRIC)


@pytest.mark.parametrize('bad', [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, 4, dtype=torch.int64)])
def test_what_is_no_feature_map_is_refused(bad):
    with pytest.raises(ValueError, match='floating-point tensors of shape'):
        apply(bad, ('Rotate', 5.))


# Sequences

@pytest.mark.parametrize('names', list(itertools.permutations(SYMMETRIC, 2)) + [('Rotate', 'ShearX', 'TranslateY')])
def test_affine_operations_that_follow_each_other_are_one_resampling(names):
    x = features((1, 2, 6, 9))
    row = [(name, 0.4 * OPERATIONS[name].limit) for name in names]

    def chained(u, v):
        for name, value in reversed(row):  # the last looks up its source in the output of the first
            u, v = source(name, value, 6, 9)(u, v)
        return u, v

    torch.testing.assert_close(apply(x, *row), naive_warp(x, chained))


@pytest.mark.parametrize('names', [pair for pair in itertools.permutations(NAMES, 2)
                                   if not (set(pair) <= set(SYMMETRIC) or 'Noise' in pair)])
def test_a_sequence_is_its_operations_one_after_the_other(names):
    x = features((2, 6, 9, 7))
    row = [(name, 0.7 * OPERATIONS[name].limit) for name in names]
    if names == ('ChannelDrop', 'ChannelShuffle'):  # in the other order, as their channels are chosen apart
        row = row[::-1]
    torch.testing.assert_close(apply(x, *row), apply(apply(x, row[0]), row[1]))


def test_noise_comes_where_the_sequence_has_it():
    x = torch.ones(1, 6, 9, 7, dtype=torch.float64) + features((1, 6, 9, 7))
    drop, cut, noise = ('ChannelDrop', 0.5), ('Cutout', 0.2), ('Noise', 0.1)
    for silent in (drop, cut):
        gone = apply(x, silent) == 0
        assert (apply(x, noise, silent)[gone] == 0).all() and (apply(x, silent, noise)[gone] != 0).all()
    moved = apply(x, ('TranslateX', 0.45))
    assert (apply(x, ('TranslateX', 0.45), noise)[..., :2] != 0).all() and (moved[..., :2] == 0).all()
    assert (apply(x, noise, ('TranslateX', 0.45))[..., :2] == 0).all()


def test_the_values_zero_and_no_operation_are_the_identity():
    x = features((2, 3, 5, 4))
    assert apply(x).equal(x) and apply(x, *((name, 0.) for name in NAMES)).equal(x)


# Rows and levels

def test_rows_and_levels_are_refined_apart():
    levels, rng = [features((2, 6, 8, 10)), features((2, 3, 4, 5), seed=1)], random.Random(0)
    rows = [[(name, rng.uniform(0.2, 1) * OPERATIONS[name].limit) for name in pair]
            for pair in itertools.combinations([name for name in NAMES if name != 'Noise'], 2)] + [[]]
    together = apply_operations(levels, rows, CHANCE)
    assert [x.shape for x in together] == [(29, 2, 6, 8, 10), (29, 2, 3, 4, 5)]
    for i, row in enumerate(rows):
        for x, each in zip(apply_operations(levels, [row], CHANCE), together, strict=True):
            torch.testing.assert_close(each[i], x[0])


def test_rows_share_their_noise():
    x = features((2, 3, 4, 5))
    small, large = apply_operations([x], [[('Noise', 0.02)], [('Noise', 0.06)]], CHANCE)[0] - x
    torch.testing.assert_close(3 * small, large)


def test_the_input_is_not_written_to():
    x = features((2, 3, 4, 5))
    before = x.clone()
    apply_operations([x], [[(name, OPERATIONS[name].limit)] for name in NAMES], CHANCE)
    assert x.equal(before)


def test_inside_is_where_no_zero_from_outside_comes_in():
    levels = [torch.ones(1, 1, 6, 9), torch.ones(1, 1, 3, 4)]
    rows = [[], [('Cutout', 0.2), ('Noise', 0.1)], [('TranslateX', 0.12)], [('Rotate', 20.), ('ShearY', 0.1)]]
    filled = [x[:, 0, 0].flatten(1) > 1 - 1e-4 for x in apply_operations(
        levels, [[step for step in row if step[0] in SYMMETRIC] for row in rows], CHANCE)]
    assert inside(levels, rows).equal(torch.cat(filled, 1)) and inside(levels, rows)[:2].all()
    assert 0 < inside(levels, rows)[3].sum() < 66


def test_position_weights_make_the_mean_over_levels_of_their_means():
    levels = [features((1, 1, 6, 9)), features((1, 1, 3, 4))]
    total = (position_weights(levels) * torch.cat([x.flatten() for x in levels])).sum()
    torch.testing.assert_close(total, (levels[0].mean() + levels[1].mean()) / 2)


def test_another_device_than_the_hosts():
    """On torch's device without data, reading a value or mixing devices fails. It has no generator for noise."""
    levels = [torch.empty(2, 6, 8, 8, device='meta'), torch.empty(2, 6, 4, 4, device='meta')]
    rows = [[(name, OPERATIONS[name].limit)] for name in NAMES if name != 'Noise']
    assert all(x.is_meta for x in apply_operations(levels, rows, CHANCE)) and inside(levels, rows).is_meta
