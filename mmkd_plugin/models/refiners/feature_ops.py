"""The nine feature operations of DAFA [0], for several sequences of operations at once.

[0] Shen, Huang, Zhu, Fan, Zhang, *Student-Oriented Teacher Knowledge Refinement
for Knowledge Distillation*, arXiv 2409.18785 (2024).

Letters: R rows, N samples, C channels, H x W positions, P positions of all levels together. A *row* is a sequence of
operations with their values. All samples and all levels of a row get the same operations. Values are shares of the map,
so that one value fits every level of a pyramid.

Nothing here has a gradient, because DAFA compares the losses of neighbouring values instead. So operations need no
differentiable form, and training with ``deterministic=True`` has no backward pass of ``grid_sample``.

:data:`OPERATIONS` has the operations by the paper's names.
"""
import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Row = Sequence[tuple[str, float]]  # names and values of operations, in order


class Chance(NamedTuple):
    """The random values of the operations of a batch."""
    centre: tuple[float, float]  # centre of the cutout, (y, x), shares of the map, in [0, 1)
    seed: int  # seed of noise and of the choice of channels

    @classmethod
    def draw(cls, rng: random.Random) -> 'Chance':
        return cls((rng.random(), rng.random()), rng.getrandbits(48))


@dataclass(frozen=True)
class Operation:
    """One operation of the table.

    The value of a symmetric operation is in ``[-limit, limit]``, and that of other operations in ``[0, limit]``. The
    value 0 is the identity.

    Args:
        limit: The largest value.
        unit: Unit of the value.
        matrix: The source of a position as 2 x 2 matrices, a linear part and a shift, see :func:`_sources`.
    """
    limit: float
    unit: str
    matrix: Callable[[float], tuple[list, list]] | None = None

    @property
    def symmetric(self) -> bool:
        """Whether values have a sign."""
        return self.matrix is not None

    def value(self, magnitude: float) -> float:
        """Maps a magnitude in [0, 1] linearly to the range. 0.5 is the identity of a symmetric operation."""
        return (2 * magnitude - 1 if self.symmetric else magnitude) * self.limit


def _rotation(degrees: float) -> tuple[list, list]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [[cos, -sin], [sin, cos]], _NONE


_NONE, _UNIT = [[0, 0], [0, 0]], [[1, 0], [0, 1]]

OPERATIONS: dict[str, Operation] = {
    # Moves each row to the right by the value for each cell below the middle.
    'ShearX': Operation(0.3, 'cells per cell', lambda v: ([[1, -v], [0, 1]], _NONE)),
    # Moves each column down by the value for each cell to the right of the middle.
    'ShearY': Operation(0.3, 'cells per cell', lambda v: ([[1, 0], [-v, 1]], _NONE)),
    'TranslateX': Operation(0.45, 'of the width', lambda v: (_UNIT, [[-v, 0], [0, 0]])),  # to the right
    'TranslateY': Operation(0.45, 'of the height', lambda v: (_UNIT, [[0, 0], [0, -v]])),  # down
    'Rotate': Operation(30., 'degrees', _rotation),  # counter-clockwise
    # Zeroes a box with this share of the height and of the width, at least one cell.
    'Cutout': Operation(0.2, 'of the side'),
    # Adds Gaussian noise, in units of the sample's standard deviation before all operations.
    'Noise': Operation(0.1, 'standard deviations'),
    # Permutes a random choice of this share of the channels in a cycle.
    'ChannelShuffle': Operation(1., 'of the channels'),
    # Zeroes a random choice of this share of the channels.
    'ChannelDrop': Operation(0.5, 'of the channels'),
}


@dataclass
class _Segment:
    """Operations of one row in one pass: shuffle, warp, cut, add noise, drop, in this order."""
    matrix: np.ndarray = field(default_factory=lambda: np.eye(2))
    shift: np.ndarray = field(default_factory=lambda: np.zeros((2, 2)))
    shuffle: float = 0.
    cutout: float = 0.
    noise: float = 0.
    drop: float = 0.

    def add(self, name: str, value: float) -> bool:
        """Adds an operation after the others. Returns False if the order of the pass does not allow it.

        Channel operations commute with operations that move or cut positions. A shuffle commutes with noise and drop,
        whose channels are random.
        """
        operation = OPERATIONS[name]
        if operation.matrix is not None:
            if self.cutout or self.noise:
                return False
            matrix, shift = (np.asarray(part, dtype=np.float64) for part in operation.matrix(value))
            # The source of the new operation is in the output of the operations before it.
            self.shift = self.matrix @ shift + self.shift
            self.matrix = self.matrix @ matrix
        elif name == 'Cutout':
            if self.noise:
                return False
            self.cutout = value
        elif name == 'Noise':
            if self.drop:
                return False
            self.noise = value
        elif name == 'ChannelShuffle':
            self.shuffle = value
        else:
            self.drop = value
        return True

    @property
    def warps(self) -> bool:
        return bool((self.matrix != np.eye(2)).any() or self.shift.any())


def _segments(row: Row) -> list[_Segment]:
    segments = [_Segment()]
    for name, value in row:
        if value and not segments[-1].add(name, value):
            segments.append(_Segment())
            segments[-1].add(name, value)
    return segments


@dataclass(frozen=True)
class _Grid:
    """The positions of all levels, one after the other."""
    basis: Tensor  # (P, 2, 4): factors of the four numbers of a source's x and y
    centre: Tensor  # (P, 2): (y, x) in [0, 1]
    half: Tensor  # (P, 2): half a cell
    limit: Tensor  # (P, 2): |(x, y)| of the outermost positions; the map is [-1, 1]
    weight: Tensor  # (P,): weight of a position in the mean over levels of the means over positions


@functools.lru_cache(maxsize=16)  # image sizes recur
def _grid(sizes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> _Grid:
    parts = []
    for h, w in sizes:
        y, x = np.meshgrid((np.arange(h) + .5) / h, (np.arange(w) + .5) / w, indexing='ij')
        v, u, one, ratio = y - .5, x - .5, np.ones((h, w)), np.full((h, w), h / w)
        columns = [u, v * ratio, one, ratio, u / ratio, v, 1 / ratio, one, y, x, one / (2 * h), one / (2 * w),
                   1 - one / w, 1 - one / h, one / (h * w * len(sizes))]
        parts.append(np.stack(columns, -1).reshape(h * w, -1))
    with torch.inference_mode(False):
        flat = torch.from_numpy(np.concatenate(parts)).to(device, dtype)
        return _Grid(2 * flat[:, :8].reshape(-1, 2, 4), flat[:, 8:10], flat[:, 10:12], flat[:, 12:14], flat[:, 14])


def send(values: Sequence | np.ndarray, like: Tensor) -> Tensor:
    """Copies host values to the device of ``like``, floats in its dtype, without waiting for the device."""
    tensor = torch.as_tensor(np.asarray(values))
    if tensor.is_floating_point():
        tensor = tensor.to(like.dtype)
    if like.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(like.device, non_blocking=True)


def _sources(segments: Sequence[_Segment], grid: _Grid) -> Tensor:
    """Returns the source of each position, (R, P, 2), as (x, y); the map is [-1, 1].

    The linear part A is in cells, so that angles are correct on maps that are not square. The shift T is in shares of
    the map. With r = H / W, and u, v in shares of the map from its middle::

        x = A00 u + A01 r v + T00 + T01 r
        y = A10 u / r + A11 v + T10 / r + T11

    Both are closed under composition: ``A1 A2`` and ``A1 T2 + T1``. Products and sums are elementwise, because a matrix
    product could run in half or TF32 precision.
    """
    theta = np.stack([np.concatenate((segment.matrix, segment.shift), 1) for segment in segments])  # (R, 2, 4)
    return (grid.basis * send(theta, grid.basis)[:, None]).sum(-1)


def _sizes(levels: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple(tuple(x.shape[-2:]) for x in levels)


def _channels(count: int, share: float, order: np.ndarray, threshold: float) -> np.ndarray:
    """Returns ``share`` of the channels, rounded up or down at random, so that the mean share is exact."""
    return order[:int(share * count + threshold)]


def _channel_tables(segments: Sequence[_Segment], count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns each row's source channels and factors, (R, C) both."""
    rng = np.random.default_rng([seed, count])
    orders, thresholds = [rng.permutation(count) for _ in range(2)], rng.random(2)
    sources, factors = np.tile(np.arange(count), (len(segments), 1)), np.ones((len(segments), count))
    for row, segment in enumerate(segments):
        shuffled = _channels(count, segment.shuffle, orders[0], thresholds[0])
        sources[row, shuffled] = np.roll(shuffled, 1)
        factors[row, _channels(count, segment.drop, orders[1], thresholds[1])] = 0
    return sources, factors


@torch.no_grad()
def apply_operations(levels: Sequence[Tensor], rows: Sequence[Row], chance: Chance) -> list[Tensor]:
    """Applies every row to all levels.

    Consecutive affine operations are one resampling, bilinear and zero outside the map. A cell is cut if its middle is
    in the box. The cell at the box's centre is always cut.

    Args:
        levels: Floating-point maps ``(N, C, H, W)``; channels and sizes may differ.
        rows: Names and values of operations, such as ``[[('Rotate', 5.), ('Cutout', 0.1)], []]``.
        chance: Random values, the same for all rows.

    Returns:
        For each level, a new map or a view of it, ``(R, N, C, H, W)``, at least float32.

    Raises:
        ValueError: A level is not a floating-point map.
    """
    for x in levels:
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f'features: expected floating-point tensors of shape (N, C, H, W), '
                             f'got {x.dtype} of shape {tuple(x.shape)}')
    wide = functools.reduce(torch.promote_types, (x.dtype for x in levels), torch.float32)
    levels = [x.detach().to(wide) for x in levels]
    split = [_segments(row) for row in rows]
    spread = None  # (L, N)
    if any(segment.noise for segments in split for segment in segments):
        spread = torch.stack([x.std((1, 2, 3), unbiased=False) for x in levels])
    levels = [x.expand(len(rows), *x.shape) for x in levels]
    for index in range(max(map(len, split))):
        segments = [each[index] if index < len(each) else _Segment() for each in split]
        levels = _one_pass(levels, segments, chance._replace(seed=chance.seed + index), spread)
    return levels


def _one_pass(levels: list[Tensor], segments: Sequence[_Segment], chance: Chance,
              spread: Tensor | None) -> list[Tensor]:
    sizes = _sizes(levels)
    grid = _grid(sizes, levels[0].dtype, levels[0].device)
    areas, rows = [h * w for h, w in sizes], len(segments)
    warps, cuts, adds_noise, shuffles, drops = (any(parts) for parts in zip(*(
        (each.warps, each.cutout, each.noise, each.shuffle, each.drop) for each in segments), strict=True))
    if warps:
        sources = _sources(segments, grid).split(areas, 1)
    if cuts:  # centre and half extent of a box; far outside if a row has none
        boxes = send([[*(chance.centre if each.cutout else (9., 9.)), each.cutout / 2] for each in segments],
                     grid.centre)[:, None]
        cut = (grid.centre - boxes[..., :2]).abs() <= torch.maximum(boxes[..., 2:], grid.half)  # (R, P, 2)
        cut = cut.all(-1).split(areas, 1)
    if adds_noise:
        generator = torch.Generator(levels[0].device).manual_seed(chance.seed)
        noise = send([each.noise for each in segments], levels[0])[:, None] * spread[:, None]  # (L, R, N)
        values = [x[0].numel() for x in levels]
        normal = torch.randn(sum(values), generator=generator, dtype=levels[0].dtype,
                             device=levels[0].device).split(values)
    tables = {}
    if shuffles or drops:
        for count in {x.shape[2] for x in levels}:
            channels, factors = _channel_tables(segments, count, chance.seed)
            tables[count] = (send(channels, levels[0])[:, None, :, None, None] if shuffles else None,
                             send(factors, levels[0])[:, None, :, None, None] if drops else None)
    out = []
    for level, x in enumerate(levels):  # (R, N, C, H, W)
        h, w = sizes[level]
        channels, factors = tables.get(x.shape[2], (None, None))
        if shuffles:
            x = x.gather(2, channels.expand_as(x))
        if warps:
            where = sources[level].view(rows, 1, h, w, 2).expand(-1, x.shape[1], -1, -1, -1)
            x = F.grid_sample(x.flatten(0, 1), where.flatten(0, 1), align_corners=False).view(x.shape)
        if cuts:
            x = x.masked_fill(cut[level].view(rows, 1, 1, h, w), 0)
        if adds_noise:
            x = torch.addcmul(x, normal[level].view(x.shape[1:]), noise[level][..., None, None, None])
        if drops:
            x = x * factors
        out.append(x)
    return out


def inside(levels: Sequence[Tensor], rows: Sequence[Row]) -> Tensor:
    """Returns which positions of all levels, (R, P), a row fills only from inside the map, without zeros outside."""
    grid = _grid(_sizes(levels), torch.float32, levels[0].device)
    affine = [_segments([step for step in row if OPERATIONS[step[0]].symmetric])[0] for row in rows]
    return (_sources(affine, grid).abs() <= grid.limit + 1e-4).all(-1)


def position_weights(levels: Sequence[Tensor]) -> Tensor:
    """Returns weights, (P,), with which a sum over positions is the mean over levels of the means over positions."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in levels), torch.float32)
    return _grid(_sizes(levels), dtype, levels[0].device).weight
