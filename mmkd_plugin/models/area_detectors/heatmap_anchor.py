"""What ties DAM's heads to objects: CenterNet targets from boxes, or the teacher's attention.

``L_D`` alone is minimised by heads that say the same everywhere, and ``L_DA`` sends no gradient through its
boxes, so nothing in the paper's objective makes a distinctive area distinctive. An anchor does.

[0] Zhou et al., Objects as Points, arXiv 1904.07850, 2019: the targets and the loss.
[1] Law, Deng, CornerNet: Detecting Objects as Paired Keypoints, ECCV 2018: the radius.

Letters: N images, B boxes of the whole batch, L cells of all levels of a pyramid, level after level.
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .areas import Detection, Shapes, cells_of, mean_of_levels


class CenterNetTarget(NamedTuple):
    """Targets of a pyramid."""
    heat: Tensor  # (N, L), 1 at centres, Gaussian around
    exists: Tensor  # (B,), 1, or 0 where nothing is left of the box inside the input
    image: Tensor  # (B,), index of the image
    cell: Tensor  # (B,), the centre's, in the pyramid
    size: Tensor  # (B, 2), width and height in cells
    offset: Tensor  # (B, 2), x and y of the centre within its cell


def level_stride(image_length: int, level_length: int) -> float:
    """Pixels per cell along one axis.

    Strided networks halve and round up: 800 pixels at stride 128 are 7 cells. Where a power of two explains
    the length so, it is the stride; else (patches of 14 pixels, resized maps) the ratio is.
    """
    ratio = image_length / level_length
    power = 2.**round(math.log2(ratio))
    return power if math.ceil(image_length / power) == level_length else ratio


def gaussian_radius(width: Tensor, height: Tensor, min_overlap: float) -> Tensor:
    """Largest shift of a box's corners that keeps IoU ``min_overlap`` with it, [1].

    [1] takes the least of three cases (both corners move together, inwards, outwards). Inwards, that is
    ``(w - 2r)(h - 2r) >= o w h``, is always the least, so it is the only one computed.
    """
    total = width + height
    return (total - (total * total - 4 * (1 - min_overlap) * width * height).sqrt()) / 4


def centernet_targets(gt_boxes: Sequence[Tensor],
                      image_shape: tuple[int, int],
                      shapes: Shapes,
                      max_cells: float = 8.,
                      min_overlap: float = 0.3) -> CenterNetTarget:
    """CenterNet's targets [0] for a pyramid, levels shallow to deep.

    ``gt_boxes`` has per image an (n_i, 4) tensor, x1 y1 x2 y2 in pixels of the padded input of
    ``image_shape`` (H, W); n_i may be 0. A box belongs to the first level on which its longer side is at
    most ``max_cells`` cells, else to the deepest. Boxes are cut to the input, and count for nothing if
    nothing is left of them.

    No loop over images, boxes or levels and no host sync. Each box draws once, on its level, and only the
    square a Gaussian can reach, which on all levels but the deepest is bounded by ``max_cells``: memory is
    ``B (2 reach + 1)^2``, not ``B L``.
    """
    boxes = torch.cat(list(gt_boxes)).float() if gt_boxes else torch.zeros(0, 4)
    device = boxes.device
    images = torch.tensor([len(each) for each in gt_boxes], dtype=torch.long)
    image = torch.repeat_interleave(images).to(device, non_blocking=True)
    levels, limits, reach = _levels(image_shape, shapes, max_cells, min_overlap)

    height, width = image_shape
    corners = torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], 2)
    low, high = corners.unbind(1)  # (B, 2) each, x and y as all that follows
    extent = high - low
    exists = (extent > 0).all(1)
    level = (extent.amax(1, keepdim=True) > limits.to(device, non_blocking=True)).sum(1)
    mine = levels.to(device, non_blocking=True)[level]  # (B, 5)
    stride, length, start = mine[:, :2], mine[:, 2:4], mine[:, 4].long()

    centre, size = (low + high) / 2 / stride, extent / stride
    cell = centre.floor().clamp(min=0).minimum(length - 1)  # (B, 2), column and row
    offset = (centre - cell).clamp(0, 1 - 2**-20)

    radius = gaussian_radius(size[:, 0], size[:, 1], min_overlap).floor()
    sigma = (2 * radius + 1) / 6
    step = torch.arange(-reach, reach + 1, device=device, dtype=boxes.dtype)
    move = torch.stack(torch.meshgrid(step, step, indexing='ij'), -1).flatten(0, 1)  # (K, 2)
    near = cell.unsqueeze(1) + move  # (B, K, 2)
    # inside the map, because the radius is below half the shorter side of a box inside the input
    drawn = (move.abs().amax(1) <= radius.unsqueeze(1)) & exists.unsqueeze(1)  # (B, K)
    gauss = torch.exp(-move.square().sum(1) / (2 * sigma * sigma).unsqueeze(1)) * drawn
    total = sum(cells_of(shapes))
    index = start.unsqueeze(1) + (near[..., 1] * length[:, :1] + near[..., 0]).long()
    index = torch.where(drawn, image.unsqueeze(1) * total + index, 0)  # what is not drawn adds a zero
    heat = boxes.new_zeros(len(gt_boxes) * total)
    heat = heat.scatter_reduce(0, index.flatten(), gauss.flatten(), 'amax').view(-1, total)
    at_centre = start + (cell[:, 1] * length[:, 0] + cell[:, 0]).long()
    return CenterNetTarget(heat, exists.float(), image, at_centre, size, offset)


def _levels(image_shape: tuple[int, int], shapes: Shapes, max_cells: float,
            min_overlap: float) -> tuple[Tensor, Tensor, int]:
    """Per level the x and y stride, w, h and first cell (levels, 5); the longest sides in pixels that all
    levels but the deepest take; how far a Gaussian can reach, in cells."""
    height, width = image_shape
    rows, limits, start, reach = [], [], 0, 0
    for i, (h, w) in enumerate(shapes):
        stride_x, stride_y = level_stride(width, w), level_stride(height, h)
        limit = math.inf if i == len(shapes) - 1 else max_cells * max(stride_x, stride_y)
        largest = torch.tensor([min(limit, width) / stride_x, min(limit, height) / stride_y]).double()
        reach = max(reach, int(gaussian_radius(*largest, min_overlap) + 1e-3))
        rows.append((stride_x, stride_y, w, h, start))
        limits.append(limit)
        start += h * w
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(limits[:-1]), reach


def centernet_loss(detection: Detection, target: CenterNetTarget, size_weight: float = 0.1) -> Tensor:
    """CenterNet's loss [0], summed over levels and divided by the number of objects in the batch.

    Penalty-reduced focal loss of the heatmap (alpha 2, beta 4), ``size_weight`` times L1 of the size in
    cells, L1 of the offset.
    """
    z, p = detection.heat, detection.heat.sigmoid()  # (N, L)
    positive = (1 - p).square() * F.logsigmoid(z)
    negative = (1 - target.heat).pow(4) * p.square() * F.logsigmoid(-z)
    focal = -torch.where(target.heat == 1, positive, negative).sum()
    size = (detection.size[target.image, :, target.cell] - target.size).abs()  # (B, 2)
    offset = (detection.offset[target.image, :, target.cell] - target.offset).abs()
    l1 = ((size_weight * size + offset).sum(1) * target.exists).sum()
    return (focal + l1) / target.exists.sum().clamp(min=1)


def attention_map(feature: Tensor) -> Tensor:
    """Mean square over channels of an (N, C, H, W) feature, per image scaled to [0, 1]; (N, H, W)."""
    energy = feature.float().square().mean(1)
    low, high = energy.flatten(1).amin(1), energy.flatten(1).amax(1)
    scale = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    return (energy - low[:, None, None]) / scale[:, None, None]


def attention_loss(detection: Detection, attention: Tensor, shapes: Shapes) -> Tensor:
    """Cross-entropy of the heatmap against the attention (N, L) as soft target, mean of cells and levels.

    Size and offset have no target here and keep close to where they start: areas of 3 x 3 cells.
    """
    loss = F.binary_cross_entropy_with_logits(detection.heat, attention, reduction='none')
    return mean_of_levels(loss, shapes)
