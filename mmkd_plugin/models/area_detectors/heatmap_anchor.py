"""Anchors of DAM's head: CenterNet targets from boxes, or the teacher's attention.

A head with a constant output minimises ``L_D``, and ``L_DA`` has no gradient through its boxes. So nothing in the
paper's objective makes the head find distinctive areas. An anchor supervises the head.

[0] Zhou et al., Objects as Points, arXiv 1904.07850, 2019: the targets and the loss.
[1] Law, Deng, CornerNet: Detecting Objects as Paired Keypoints, ECCV 2018: the radius.

Letters: S networks, N images, B boxes of the whole batch, C channels, V levels, L cells of all levels, K cells of the
largest square of a Gaussian.
"""
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .areas import Shapes, cells_of, constants, decode, pyramid_grid

Number = TypeVar('Number', float, Tensor)
_MIN_OVERLAP = 0.3  # of a box and the box of the same size at the edge of its Gaussian


class CenterNetTarget(NamedTuple):
    """Targets of a pyramid."""
    heat: Tensor  # (N, L), 1 at centres, Gaussian around
    exists: Tensor  # (B,), whether a part of the box is inside the input
    image: Tensor  # (B,), index of the image
    cell: Tensor  # (B,), cell of the centre in the row
    size: Tensor  # (B, 2), width and height in cells
    offset: Tensor  # (B, 2), x and y of the centre in its cell, in [0, 1]


class _Levels(NamedTuple):
    """Values of a pyramid's levels for the targets."""
    zero: Tensor  # ()
    image_size: Tensor  # (4,), W H W H
    longest: Tensor  # (V - 1,), pixels; the longest side of a box on each level except the deepest
    table: Tensor  # (V, 8), strides of x and y, twice the strides, last column and row, first cell, width
    moves: Tensor  # (V, K), from the centre of a Gaussian to each of its cells
    gaussians: Tensor  # (largest radius + 2, K), by radius, 0 beyond it; the last is 0 everywhere
    nothing: Tensor  # (), index of the last


def level_stride(image_length: int, level_length: int) -> float:
    """Returns the pixels per cell along one axis.

    Strided networks halve and round up, so 800 pixels at stride 128 are 7 cells. If a power of two gives this length,
    it is the stride. Otherwise (patches of 14 pixels, resized maps), the stride is the ratio.
    """
    ratio = image_length / level_length
    power = 2.**round(math.log2(ratio))
    return power if math.ceil(image_length / power) == level_length else ratio


def gaussian_radius(width: Number, height: Number, min_overlap: float) -> Number:
    """Returns the largest shift of a box's corners that keeps an IoU of ``min_overlap`` with it, [1].

    [1] takes the smallest of three cases (both corners move together, inwards, outwards). The case inwards,
    ``(w - 2r)(h - 2r) >= o w h``, is always the smallest, so only this one is computed.
    """
    total = width + height
    return (total - (total * total - 4 * (1 - min_overlap) * (width * height))**0.5) / 4


@torch.no_grad()
def centernet_targets(gt_boxes: Sequence[Tensor],
                      image_shape: tuple[int, int],
                      shapes: Shapes,
                      device: torch.device,
                      max_cells: float = 8.) -> CenterNetTarget:
    """Returns CenterNet's targets [0] for a pyramid, levels shallow to deep.

    ``gt_boxes`` has one (n_i, 4) tensor per image on ``device``, x1 y1 x2 y2 in pixels of the padded input of
    ``image_shape`` (H, W); n_i may be 0. A box belongs to the first level on which its longer side is at most
    ``max_cells`` cells, or to the deepest level if there is none. Boxes are cropped to the input. Boxes outside the
    input are ignored.

    There is no loop over boxes or levels, no tensor from the host and no host sync. Each box draws only the square of
    its Gaussian, on its level. Except on the deepest level, ``max_cells`` limits this square. So memory is ``B K``
    instead of ``B L``.
    """
    levels = _levels(tuple(image_shape), shapes, max_cells, device)
    boxes, image = _one_batch(gt_boxes, device)
    low, high = boxes.clamp(levels.zero, levels.image_size).split(2, 1)  # (B, 2), x and y
    extent = high - low
    exists = (extent > 0).all(1)
    level = torch.bucketize(extent.amax(1), levels.longest)
    stride, two_strides, last, place = levels.table.index_select(0, level).split(2, 1)
    centre, size = (low + high) / two_strides, extent / stride
    column_row = centre.floor().minimum(last)
    start, width = place.unbind(1)
    cell = torch.addcmul(start + column_row[:, 0], column_row[:, 1], width).long()

    radius = gaussian_radius(size[:, 0], size[:, 1], _MIN_OVERLAP).long()
    gaussian = levels.gaussians.index_select(0, torch.where(exists, radius, levels.nothing))  # (B, K)
    cells = sum(cells_of(shapes))
    # a Gaussian is zero outside the map and beyond its radius, and a zero does not change a maximum in any cell
    index = torch.add(cell, image, alpha=cells).unsqueeze(1) + levels.moves.index_select(0, level)
    heat = torch.zeros(len(gt_boxes) * cells, device=device)
    index = index.flatten().clamp(0, max(len(heat) - 1, 0))
    heat = heat.scatter_reduce(0, index, gaussian.flatten(), 'amax').view(len(gt_boxes), cells)
    return CenterNetTarget(heat, exists, image, cell, size, centre - column_row)


def _one_batch(gt_boxes: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns all boxes, (B, 4), and the index of the image of each, (B,)."""
    if not gt_boxes:
        return torch.zeros(0, 4, device=device), torch.zeros(0, dtype=torch.long, device=device)
    index = _image_index(len(gt_boxes), device).split(1)
    image = torch.cat([i.expand(len(boxes)) for i, boxes in zip(index, gt_boxes, strict=True)])
    return torch.cat(list(gt_boxes)).float(), image


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _image_index(images: int, device: torch.device) -> Tensor:
    return torch.arange(images, device=device)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _levels(image_shape: tuple[int, int], shapes: Shapes, max_cells: float, device: torch.device) -> _Levels:
    height, width = image_shape
    strides = [(level_stride(width, w), level_stride(height, h)) for h, w in shapes]
    longest = [max_cells * max(stride) for stride in strides[:-1]]
    largest = [(min(limit, width) / x, min(limit, height) / y)
               for limit, (x, y) in zip([*longest, math.inf], strides, strict=True)]
    reach = max(int(gaussian_radius(*box, _MIN_OVERLAP) + 1e-3) for box in largest)

    step = torch.arange(-reach, reach + 1, device=device)
    radius = torch.arange(reach + 2, device=device)[:, None, None]
    distance, far = step.square().unsqueeze(1) + step.square(), step.abs().unsqueeze(1).maximum(step.abs())
    gaussians = torch.exp(-distance / (2 * ((2 * radius + 1) / 6)**2)) * ((far <= radius) & (radius <= reach))
    moves = torch.stack([step.unsqueeze(1) * w + step for _, w in shapes])

    def columns(pairs: Sequence[Sequence[float]]) -> Tensor:
        return torch.stack([constants(column, device) for column in zip(*pairs, strict=True)], 1)

    starts = [sum(cells_of(shapes)[:i]) for i in range(len(shapes))]
    return _Levels(
        zero=torch.zeros((), device=device),
        image_size=constants([width, height] * 2, device),
        longest=constants(longest, device),
        table=columns([(x, y, 2 * x, 2 * y, w - 1, h - 1, start, w)
                       for (x, y), start, (h, w) in zip(strides, starts, shapes, strict=True)]),
        moves=moves.flatten(1),
        gaussians=gaussians.flatten(1),
        nothing=torch.full((), reach + 1, device=device))


def centernet_loss(raw: Tensor, target: CenterNetTarget, shapes: Shapes, factor: float = 1.) -> Tensor:
    """Returns CenterNet's loss [0], summed over levels, divided by the number of objects in the batch and averaged over
    networks.

    The loss is the sum of the penalty-reduced focal loss of the heatmap (alpha 2, beta 4), 0.1 times L1 of the size
    in cells, and L1 of the offset, times ``factor``. ``raw`` is (S, N, 5, L), float32.

    With the sign of the logit z flipped at the centres, both cases of the focal loss are
    ``w sigmoid(z)^2 softplus(z)``, where w is 1 at the centres and ``(1 - heat)^4`` elsewhere.
    """
    centre = target.heat.floor()  # 1 at centres, 0 elsewhere
    weight = (1 - target.heat).pow(4) + centre
    z = raw.select(2, 0) * torch.rsub(centre, 1, alpha=2)
    focal = (z.sigmoid().square() * F.softplus(z) * weight).sum()

    grid = pyramid_grid(shapes, raw.device)
    total = raw.shape[-1]
    at = torch.add(target.cell, target.image, alpha=5 * total) + grid.branch  # (4, B), into N 5 L
    size, offset = decode(raw.flatten(1).index_select(1, at.flatten()).unflatten(1, at.shape), 1)  # (S, 2, B)
    error = (torch.cat([size, offset], 1) - torch.cat([target.size, target.offset], 1).t()).abs()
    l1 = (error * (target.exists * _l1_weights(raw.device))).sum()
    return (focal + l1) * (factor / len(raw)) / target.exists.sum().clamp(min=1)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _l1_weights(device: torch.device) -> Tensor:
    return constants([0.1, 0.1, 1, 1], device).unsqueeze(1)


def attention_map(row: Tensor, shapes: Shapes) -> Tensor:
    """Returns the mean square over channels of (N, C, L) features, scaled to [0, 1] per image and level, (N, L)."""
    grid = pyramid_grid(shapes, row.device)
    energy = row.float().square().mean(1)
    low, high = energy.index_select(1, grid.cell).unflatten(1, (len(shapes), -1)).aminmax(dim=2)  # (N, V)
    scale = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    return (energy - low.index_select(1, grid.level)) / scale.index_select(1, grid.level)


def attention_loss(raw: Tensor, attention: Tensor, shapes: Shapes, factor: float = 1.) -> Tensor:
    """Returns the cross-entropy of the heatmap with the attention (N, L) as soft target, times ``factor``.

    It is the mean over cells, levels and networks, and zero without images. Size and offset have no target here and
    stay near their initial values, areas of 3 x 3 cells. ``raw`` is (S, N, 5, L), float32.
    """
    heat = raw.select(2, 0)
    share = pyramid_grid(shapes, raw.device).share[0]
    loss = F.binary_cross_entropy_with_logits(heat, attention.expand_as(heat), share, reduction='sum')
    return loss * (factor / max(len(raw) * len(attention), 1))
