"""Distinctive areas of SoKD: where they are, the mask they make, the losses of features and of detections.

A pyramid is handled as one row of cells, level after level, each level in reading order: the number of
operations hardly grows with the number of levels.

Letters: N images, C channels, (h, w) one level's map, L cells of all levels, P areas per image and level,
A areas of all levels (P each, or h w where that is less).
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = Sequence[tuple[int, int]]  # (h, w) of every level


class Detection(NamedTuple):
    """What DAM's head says of one network's features, float32, one value per cell of the pyramid."""
    heat: Tensor  # (N, L), logits
    size: Tensor  # (N, 2, L), width and height in cells, positive
    offset: Tensor  # (N, 2, L), x and y of the centre within its cell, in [0, 1)


class Areas(NamedTuple):
    """The best areas of each image, level after level, in each level the best first."""
    boxes: Tensor  # (N, A, 4), x1 y1 x2 y2 in whole cells, inside the map, at least one cell large
    scores: Tensor  # (N, A), heatmap value at the peak (of both sides multiplied, if both are asked)
    valid: Tensor  # (N, A), False where the level had fewer than P peaks


#: Whose heatmap places the areas, as indices into (student, teacher).
REGIONS = {'mutual': (0, 1), 'student': (0, ), 'teacher': (1, )}


def cells_of(shapes: Shapes) -> list[int]:
    """Number of cells of every level, to split a row of L."""
    return [h * w for h, w in shapes]


def areas_of(shapes: Shapes, num_areas: int) -> list[int]:
    """Number of areas of every level, to split a row of A."""
    return [min(num_areas, cells) for cells in cells_of(shapes)]


def mean_of_levels(x: Tensor, shapes: Shapes) -> Tensor:
    """Mean over images and cells of each level of (N, L), then the mean of the levels; 0 of no images."""
    return sum(level.sum() / max(level.numel(), 1) for level in x.split(cells_of(shapes), 1)) / len(shapes)


@torch.no_grad()
def find_areas(student: Detection, teacher: Detection, shapes: Shapes, num_areas: int,
               region: str = 'mutual') -> Areas:
    """3x3 local maxima of the heatmap, the best P per level, each with the box of its offset and size.

    'mutual' multiplies both heatmaps and averages both sizes and offsets. The heatmaps are ranked by
    their logarithm, in which saturated and vanishing values stay apart. Of equal neighbours (common in
    half precision, and a whole map may be constant) the first in reading order is the maximum, so every
    map has at least one and a plateau is not a crowd of boxes.

    A box covers the cells whose centre it contains, and always the cell of its peak.
    """
    sides = [(student, teacher)[i] for i in REGIONS[region]]
    log_heat = F.logsigmoid(torch.stack([side.heat for side in sides])).sum(0)
    size = sum(side.size for side in sides) / len(sides)
    offset = sum(side.offset for side in sides) / len(sides)

    cell = torch.arange(max(cells_of(shapes)), device=log_heat.device)
    best = []
    for heat, (h, w), p in zip(
            log_heat.split(cells_of(shapes), 1), shapes, areas_of(shapes, num_areas), strict=True):
        _, first_maximum = F.max_pool2d(heat.unflatten(1, (1, h, w)), 3, 1, 1, return_indices=True)
        best.append(heat.masked_fill(first_maximum.flatten(1) != cell[:h * w], -torch.inf).topk(p))
    scores, cells = (torch.cat(each, 1) for each in zip(*best, strict=True))  # (N, A)

    start, h, w = _of_every_area(shapes, num_areas, cells.device)  # (A,) each
    at_peak = (cells + start).unsqueeze(1).expand(-1, 2, -1)
    length = torch.stack([w, h])  # (2, A), x and y as all that follows
    peak = torch.stack([cells % w, cells // w], 1)  # (N, 2, A)
    centre = peak + offset.gather(2, at_peak)
    half = size.gather(2, at_peak) / 2
    first = (centre - half - 0.5).ceil().clamp(min=0).minimum(peak)
    last = (centre + half - 0.5).floor().minimum(length - 1).maximum(peak)
    boxes = torch.cat([first, last + 1], 1).transpose(1, 2)
    return Areas(boxes, scores.exp(), scores > -torch.inf)


def _of_every_area(shapes: Shapes, num_areas: int, device: torch.device) -> Tensor:
    """First cell, height and width of the level of every area, (3, A)."""
    rows, start = [], 0
    for (h, w), p in zip(shapes, areas_of(shapes, num_areas), strict=True):
        rows += [(start, h, w)] * p
        start += h * w
    return torch.tensor(rows).t().to(device, non_blocking=True)


def count_areas(areas: Areas, shapes: Shapes, num_areas: int) -> Tensor:
    """``sum_i M(A_i)``: the number of boxes over each cell, (N, L).

    Per level, over all images and boxes at once: the product of the rows and the columns they cover.
    """
    x1, y1, x2, y2 = areas.boxes.unsqueeze(-1).unbind(2)  # (N, A, 1) each
    step = torch.arange(max(max(shape) for shape in shapes), device=x1.device)
    in_x = ((step >= x1) & (step < x2)).float()  # (N, A, longest side)
    in_y = ((step >= y1) & (step < y2) & areas.valid.unsqueeze(-1)).float()
    split = areas_of(shapes, num_areas)
    levels = zip(in_y.split(split, 1), in_x.split(split, 1), shapes, strict=True)
    return torch.cat([(ys[..., :h].transpose(1, 2) @ xs[..., :w]).flatten(1) for ys, xs, (h, w) in levels], 1)


def area_loss(s_features: Sequence[Tensor], t_features: Sequence[Tensor], counts: Tensor) -> Tensor:
    """``L_DA``: squared difference of (N, C, h, w) features inside the areas, float32.

    The paper's ``sum_i || M(A_i) (S - T) ||^2`` over boxes, channels and positions, divided by C and by the
    number of positions summed (a position under two boxes is two), per image and level; then the mean of
    both. Multiply by ``C * counts.sum(1)`` per image and sum to have the paper's.
    """
    square = torch.cat([(s.float() - t.float()).square().mean(1).flatten(1)
                        for s, t in zip(s_features, t_features, strict=True)], 1)  # (N, L)
    cells = cells_of([s.shape[2:] for s in s_features])
    inside = torch.stack([level.sum(1) for level in (square * counts).split(cells, 1)])
    summed = torch.stack([level.sum(1) for level in counts.split(cells, 1)])
    return (inside / summed.clamp(min=1)).sum() / max(inside.numel(), 1)


def detection_loss(student: Detection, teacher: Detection, shapes: Shapes) -> Tensor:
    """``L_D``: mean squared difference of each branch's output, summed over the branches; mean of levels.

    Outputs are what the branches mean: heat in (0, 1), size in cells, offset in cells.
    """
    heat = (student.heat.sigmoid() - teacher.heat.sigmoid()).square()
    size = (student.size - teacher.size).square().mean(1)
    offset = (student.offset - teacher.offset).square().mean(1)
    return mean_of_levels(heat + size + offset, shapes)
