"""Distinctive areas of SoKD: detection, number of areas per cell, and losses of features and detections.

A pyramid is stored as one row of cells, level by level, each level in reading order. Operations that need neighbours
in two dimensions use a stack of planes, one plane per level. Each plane has the height and width of the largest level,
and the level is in its upper left corner. So the number of operations does not grow with the number of levels.

Letters: S networks, N images, C channels, V levels, (h, w) the map of one level, L cells of all levels, (H, W) the
plane, P areas per level.

The head's outputs are raw, (S, N, 5, L): the logit of the heatmap, then width, height, x and y as inputs of
:func:`decode`.
"""
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]  # (h, w) of every level

#: Averages of :func:`area_loss`.
AREA_REDUCTIONS = ('area', 'map')


class Areas(NamedTuple):
    """The best areas of each image and level, in descending order of their scores."""
    boxes: Tensor  # (N, V, P, 4), x1 y1 x2 y2 in whole cells, inside the map, at least one cell
    log_scores: Tensor  # (N, V, P), logarithm of the heatmap at the peak; -inf if the level has fewer than P peaks


class Grid(NamedTuple):
    """Places of a row's cells in the planes. They depend only on the shapes of the levels."""
    cell: Tensor  # (V * H * W,), the cell at each place of the planes; outside the level, the level's first cell
    outside: Tensor  # (V, H, W), whether the place is outside the level
    place: Tensor  # (L,), the inverse of cell
    index: Tensor  # (H, W), places in one plane, in reading order
    xy: Tensor  # (2, H * W), column and row of each place in one plane
    step: Tensor  # (max(H, W),), 0, 1, 2, ...
    last: Tensor  # (2, V, 1), the last column and row of each level
    zero: Tensor  # ()
    level: Tensor  # (L,), level of each cell
    branch: Tensor  # (4, 1), the first element of each of the box's channels in (5, L)
    share: Tensor  # (5, L), 1 / (h w V); half of that for the branches of two channels


def cells_of(shapes: Shapes) -> list[int]:
    """Returns the number of cells of each level, to split a row."""
    return [h * w for h, w in shapes]


def constants(values: Sequence[float], device: torch.device) -> Tensor:
    """Returns numbers on a device. They are filled in there, because a copy from the host waits for the device."""
    return torch.cat([torch.full((length, ), float(value), device=device)
                      for length, value in [(0, 0), *((1, value) for value in values)]])


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def pyramid_grid(shapes: Shapes, device: torch.device) -> Grid:
    """Returns the grid of a pyramid on a device. Grids are cached by shapes."""
    height, width = (max(side) for side in zip(*shapes, strict=True))
    y, x = (torch.arange(n, device=device) for n in (height, width))
    index = y.unsqueeze(1) * width + x
    cells, outsides, places, levels, start = [], [], [], [], 0
    for level, (h, w) in enumerate(shapes):
        outside = (y >= h).unsqueeze(1) | (x >= w)
        cells.append((start + y.unsqueeze(1) * w + x).masked_fill(outside, start).flatten())
        outsides.append(outside)
        places.append((level * height * width + index[:h, :w]).flatten())
        levels.append(torch.full((h * w, ), level, device=device))
        start += h * w
    share = torch.cat([torch.full((h * w, ), 1 / (h * w * len(shapes)), device=device) for h, w in shapes])
    return Grid(
        cell=torch.cat(cells),
        outside=torch.stack(outsides),
        place=torch.cat(places),
        index=index,
        xy=torch.stack([(index % width).flatten(), index.div(width, rounding_mode='floor').flatten()]).float(),
        step=torch.arange(max(height, width), device=device),
        last=torch.stack([constants([side - 1 for side in sides], device) for sides in list(zip(*shapes))[::-1]]
                         ).unsqueeze(2),
        zero=torch.zeros((), device=device),
        level=torch.cat(levels),
        branch=torch.arange(1, 5, device=device).unsqueeze(1) * start,
        share=constants([1, 0.5, 0.5, 0.5, 0.5], device).unsqueeze(1) * share)


def decode(raw: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Returns sizes and offsets of raw boxes, with the four channels in dimension ``dim``.

    Returns:
        Width and height in cells, positive, by softplus; x and y of the centre in its cell, in [0, 1], by sigmoid.
    """
    size, offset = raw.split(2, dim)
    return F.softplus(size), offset.sigmoid()


@torch.no_grad()
def find_areas(raw: Tensor, shapes: Shapes, num_areas: int) -> Areas:
    """Returns the best P 3x3 local maxima of the heatmap per level, each with the box of its offset and size.

    The heatmaps of S networks are multiplied, and their sizes and offsets are averaged. Heatmaps are ranked by their
    logarithm, which distinguishes saturated and vanishing values. Equal neighbours are common in half precision and on
    constant maps. The first of them in reading order is the maximum. So each map has at least one area, and a plateau
    has a single one.

    A box covers the cells whose centre it contains, and always the cell of its peak.

    Args:
        raw: (S, N, 5, L), float32.
        num_areas: P; at most the number of places in a plane is used.
    """
    grid = pyramid_grid(shapes, raw.device)
    levels, height, width = grid.outside.shape
    log_heat = F.logsigmoid(raw[:, :, 0]).sum(0).index_select(1, grid.cell)
    log_heat = log_heat.unflatten(1, grid.outside.shape).masked_fill(grid.outside, -torch.inf)
    _, first_maximum = F.max_pool2d(log_heat, 3, 1, 1, return_indices=True)
    peaks = log_heat.masked_fill(first_maximum != grid.index, -torch.inf)  # (N, V, H, W)
    log_scores, places = peaks.flatten(2).topk(min(num_areas, height * width))  # (N, V, P)

    cells = grid.cell.view(levels, -1).expand(len(places), -1, -1).gather(2, places)
    at_peak = cells.flatten(1)[:, None].expand(len(raw), -1, 4, -1)  # (S, N, 4, V P)
    size, offset = (x.mean(0).unflatten(2, places.shape[1:]) for x in decode(raw[:, :, 1:].gather(3, at_peak), 2))
    peak = grid.xy.index_select(1, places.flatten()).view(2, *places.shape).transpose(0, 1)  # (N, 2, V, P)
    centre = peak + (offset - 0.5)  # the centre of cell 0 is 0
    first = torch.clamp(torch.sub(centre, size, alpha=0.5).ceil(), grid.zero, peak)
    last = torch.clamp(torch.add(centre, size, alpha=0.5).floor(), peak, grid.last)
    return Areas(torch.cat([first, last + 1], 1).permute(0, 2, 3, 1), log_scores)


def count_areas(areas: Areas, shapes: Shapes) -> Tensor:
    """Returns ``sum_i M(A_i)``, the number of boxes over each place of the planes, (N, V, H, W) integers."""
    grid = pyramid_grid(shapes, areas.boxes.device)
    _, height, width = grid.outside.shape
    low, high = areas.boxes.unsqueeze(-1).split(2, 3)  # (N, V, P, 2, 1), x and y
    in_x, in_y = ((grid.step >= low) & (grid.step < high)).unbind(3)  # (N, V, P, max(H, W))
    in_y = in_y & (areas.log_scores > -torch.inf).unsqueeze(-1)
    return (in_y[..., :height, None] & in_x[..., None, :width]).sum(2)


def area_loss(s_row: Tensor, t_row: Tensor, counts: Tensor, shapes: Shapes, reduction: str = 'area',
              factor: float = 1.) -> Tensor:
    """Returns ``L_DA``, the squared difference of features inside the areas, float32.

    The paper has ``sum_i || M(A_i) (S - T) ||^2`` over boxes, channels and positions. A position under two boxes counts
    twice. Here the sum is divided by C and, per image and level, by

    - 'area': the number of summed positions. The value is the mean squared difference in the areas, so a position in a
      small area of a large map has a large weight.
    - 'map': the number of positions of the map. A position in an area has the same weight as in a mean squared error
      of whole maps. The only known code of SoKD does this.

    The result is the mean over images and levels. It is 0 without images.

    Args:
        s_row, t_row: (N, C, L), any floating dtype.
        counts: (N, V, H, W), result of :func:`count_areas`.
        factor: Factor of the loss.
    """
    grid = pyramid_grid(shapes, s_row.device)
    if reduction == 'area':
        counts = counts / counts.sum((2, 3), keepdim=True).clamp(min=1)
    weight = counts.flatten(1).index_select(1, grid.place)  # (N, L)
    if reduction == 'map':
        weight = weight * grid.share[0]
    square = F.mse_loss(s_row.float(), t_row.float(), reduction='none').sum(1)
    levels = len(shapes) if reduction == 'area' else 1  # a share already includes the mean over levels
    return (square * weight).sum() * (factor / max(levels * s_row.shape[0] * s_row.shape[1], 1))


def detection_loss(s_raw: Tensor, t_raw: Tensor, shapes: Shapes, factor: float = 1.) -> Tensor:
    """Returns ``L_D`` times ``factor``: the mean squared difference of each branch's output, summed over the three
    branches and averaged over levels.

    Outputs are raw, (N, 5, L), so the heatmap is compared as logits and not as probabilities. A sigmoid has a slope of
    0.09 at 0.1, where the heatmap starts, so its gradient would be small. The loss is zero without images.
    """
    square = F.mse_loss(s_raw, t_raw, reduction='none')
    return (square * pyramid_grid(shapes, s_raw.device).share).sum() * (factor / max(len(s_raw), 1))
