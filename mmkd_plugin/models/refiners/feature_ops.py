"""The nine feature operations of DAFA, as pure functions.

From SoKD: Shen, Huang, Zhu, Fan, Zhang, *Student-Oriented Teacher Knowledge
Refinement for Knowledge Distillation*, arXiv 2409.18785 (2024).

Letters: N samples, C channels, H x W positions (1 x 1 and upwards). Every
function maps a feature map ``(N, C, H, W)`` and a value, a number or 0-d
tensor, to a map of the same shape and dtype; it computes in float32 at least,
is the identity at zero and draws no random number of its own: what chance
decides comes in as :class:`Dice`. Values are shares of the map, so the same
value fits every level of a pyramid. All samples share one draw.

Shears, translations, rotation and noise are differentiable in their value.
Cutout, channel shuffle and channel drop make hard choices, which their
gradient passes straight through; they say how.

:data:`OPERATIONS` lists them by the paper's names, with the value at magnitude 1.
"""
import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Dice(NamedTuple):
    """What chance decides about one operation in one batch, the same on all levels."""
    sign: float  # +1 or -1
    centre: tuple[float, float]  # (y, x), in shares of the map, [0, 1)
    seed: int  # of noise and channel choices

    @classmethod
    def roll(cls, rng: random.Random) -> 'Dice':
        return cls(rng.choice((1., -1.)), (rng.random(), rng.random()), rng.getrandbits(48))


def _in_float32(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Computes in float32 (float64 stays) and returns the input's dtype."""

    @functools.wraps(operation)
    def compute(x: Tensor, value: float | Tensor, *dice: Dice) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        value = torch.as_tensor(value, dtype=wide.dtype, device=x.device)
        return operation(wide, value, *dice).to(x.dtype)

    return compute


def _centres(size: int, like: Tensor) -> Tensor:
    """Cell centres in shares of the map, counted from its middle: in (-1/2, 1/2)."""
    return (torch.arange(size, dtype=like.dtype, device=like.device) + .5) / size - .5


def _warp(x: Tensor, row_x: tuple, row_y: tuple) -> Tensor:
    """Samples ``x`` bilinearly where an affine map sends each position; zero outside.

    A row ``(a, b, t)`` gives a source coordinate, from the middle of the map:
    a and b weigh the position's x and y *in cells*, so that angles are true on
    maps that are not square; t is a shift in shares of the map. The grid is
    built elementwise: a matrix product would run in half or TF32 precision.
    """
    n, _, h, w = x.shape
    u, v = _centres(w, x), _centres(h, x)[:, None]
    source_x = row_x[0] * u + row_x[1] * v * (h / w) + row_x[2]
    source_y = row_y[0] * u * (w / h) + row_y[1] * v + row_y[2]
    grid = 2 * torch.stack((source_x, source_y), dim=-1)  # (H, W, 2), the map is [-1, 1]
    return F.grid_sample(x, grid.expand(n, h, w, 2), padding_mode='zeros', align_corners=False)


@_in_float32
def shear_x(x: Tensor, slope: Tensor) -> Tensor:
    """Moves each row right by ``slope`` cells per cell below the middle."""
    return _warp(x, (1., -slope, 0.), (0., 1., 0.))


@_in_float32
def shear_y(x: Tensor, slope: Tensor) -> Tensor:
    """Moves each column down by ``slope`` cells per cell right of the middle."""
    return _warp(x, (1., 0., 0.), (-slope, 1., 0.))


@_in_float32
def translate_x(x: Tensor, share: Tensor) -> Tensor:
    """Moves the map right by ``share`` of its width."""
    return _warp(x, (1., 0., -share), (0., 1., 0.))


@_in_float32
def translate_y(x: Tensor, share: Tensor) -> Tensor:
    """Moves the map down by ``share`` of its height."""
    return _warp(x, (1., 0., 0.), (0., 1., -share))


@_in_float32
def rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Turns the map counter-clockwise about its middle."""
    cos, sin = torch.cos(degrees * (math.pi / 180)), torch.sin(degrees * (math.pi / 180))
    return _warp(x, (cos, -sin, 0.), (sin, cos, 0.))


def _interval(size: int, centre: float, length: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``size`` cells, those in an interval, hard (bool) and fading over one cell; (size,) each."""
    middles = torch.arange(size, dtype=length.dtype, device=length.device) + .5
    reach = length * (size / 2) - (middles - centre * size).abs()  # > 0 inside
    under_centre = middles == math.floor(centre * size) + .5
    return (reach > 0) | (under_centre & (length > 0)), (reach + .5).clamp(0, 1)


@_in_float32
def cutout(x: Tensor, side: Tensor, dice: Dice) -> Tensor:
    """Zeroes a box of ``side`` of the height and of the width about ``dice.centre``.

    A cell is cut if its middle lies in the box, and the cell under the box's
    centre always is. Straight-through: the gradient is that of a box whose
    border fades over one cell.
    """
    (rows, soft_rows), (columns, soft_columns) = (
        _interval(size, centre, side) for size, centre in zip(x.shape[2:], dice.centre, strict=True))
    hard, soft = rows[:, None] & columns, soft_rows[:, None] * soft_columns  # (H, W)
    return x * (1 - (hard.to(x) + (soft - soft.detach())))


@_in_float32
def noise(x: Tensor, std: Tensor, dice: Dice) -> Tensor:
    """Adds Gaussian noise, ``std`` times each sample's own standard deviation."""
    generator = torch.Generator(x.device).manual_seed(dice.seed)
    variance = x.var((1, 2, 3), unbiased=False, keepdim=True)
    spread = (variance + torch.finfo(x.dtype).tiny).sqrt()  # of a constant map: no infinite gradient
    return x + std * spread * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _permutations(x: Tensor, seed: int) -> Tensor:
    """Two random permutations of the channels, (2, C)."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.rand(2, x.shape[1], generator=generator, device=x.device).argsort(1)


def _chosen(ranks: Tensor, share: Tensor) -> Tensor:
    """The ``share`` of channels with the lowest ranks, to the nearest channel: bool, (C,)."""
    return (ranks + .5) / len(ranks) < share


@_in_float32
def channel_shuffle(x: Tensor, share: Tensor, dice: Dice) -> Tensor:
    """Permutes ``share`` of the channels among themselves.

    Straight-through: as if each channel moved by ``share`` of the way to the
    channel that takes its place when all are permuted.
    """
    ranks, keys = _permutations(x, dice.seed)
    order, chosen = torch.arange(len(ranks), device=x.device), _chosen(ranks, share)
    places = torch.where(chosen, order, len(ranks) + order).argsort()  # the chosen come first
    sources = torch.where(chosen, keys, len(ranks) + order).argsort()  # in random order
    shuffled = x[:, torch.empty_like(order).scatter(0, places, sources)]
    if not share.requires_grad:
        return shuffled
    return shuffled + (share - share.detach()) * (x[:, keys.argsort()] - x)


@_in_float32
def channel_drop(x: Tensor, share: Tensor, dice: Dice) -> Tensor:
    """Zeroes ``share`` of the channels.

    Straight-through: as if every channel were scaled by ``1 - share``, which
    is what happens to it on average.
    """
    dropped = _chosen(_permutations(x, dice.seed)[0], share).to(x) + (share - share.detach())
    return x * (1 - dropped)[:, None, None]


@dataclass(frozen=True)
class Operation:
    """One row of the table: call it with a magnitude in [0, 1]."""
    function: Callable[..., Tensor]
    limit: float  # the value at magnitude 1
    unit: str
    signed: bool = False  # the value takes the sign of the dice; others take the dice
    exact: bool = True  # the gradient in the magnitude is exact, not straight-through

    def __call__(self, x: Tensor, magnitude: float | Tensor, dice: Dice) -> Tensor:
        """Applies the operation to ``x``, floating and (N, C, H, W); else ``ValueError``."""
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f'a feature must be floating and of shape (N, C, H, W), '
                             f'but got {x.dtype} of shape {tuple(x.shape)}')
        value = magnitude * self.limit
        return self.function(x, value * dice.sign) if self.signed else self.function(x, value, dice)


OPERATIONS: dict[str, Operation] = {
    'ShearX': Operation(shear_x, 0.3, 'cells per cell', signed=True),
    'ShearY': Operation(shear_y, 0.3, 'cells per cell', signed=True),
    'TranslateX': Operation(translate_x, 0.45, 'of the width', signed=True),
    'TranslateY': Operation(translate_y, 0.45, 'of the height', signed=True),
    'Rotate': Operation(rotate, 30., 'degrees', signed=True),
    'Cutout': Operation(cutout, 0.2, 'of the side', exact=False),
    'Noise': Operation(noise, 0.1, 'standard deviations'),
    'ChannelShuffle': Operation(channel_shuffle, 1., 'of the channels', exact=False),
    'ChannelDrop': Operation(channel_drop, 0.5, 'of the channels', exact=False),
}
