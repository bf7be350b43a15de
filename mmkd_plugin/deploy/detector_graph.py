"""The graph of a one-stage detector, from pixels to boxes, scores and labels.

MMDetection's own post-processing handles one image at a time and branches on the data, which tracing would freeze. Here
the whole batch is processed at once, removed candidates keep their place with a score of -1, and no branch depends on
the data.

Letters: N images, L levels, K candidates, M detections per image.
"""
from typing import NamedTuple

import torch
from mmdet.models.dense_heads import GFLHead, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import SingleStageDetector
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from torch import Tensor, nn

from .nms import keep_best
from .pixels import Pixels

UNLIMITED = 300  # detections per image if the head has no limit (YOLOX); COCO evaluates 100


class Candidates(NamedTuple):
    """Candidates for NMS, per image."""
    boxes: Tensor  # (N, K, 4), left, top, right, bottom
    scores: Tensor  # (N, K), -1 for removed candidates
    labels: Tensor  # (N, K)


class DetectorGraph(nn.Module):
    """Maps ``images`` (N, C, H, W) and ``image_sizes`` (N, 2) to ``boxes`` (N, M, 4), ``scores`` and ``labels`` (N, M).

    Boxes are in pixels of ``images``. Detections are sorted by score. After the last detection, scores are 0 and labels
    -1. Candidates with equal scores are ordered by level (the finest first), row, column, anchor and label.

    Args:
        model: a model for which :func:`why_not` returns None.
        pixels: preprocessing of the model.
    """

    outputs = ('boxes', 'scores', 'labels')

    def __init__(self, model: SingleStageDetector, pixels: Pixels) -> None:
        super().__init__()
        self.network = model
        self.pixels = pixels

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        limit = self.test_cfg.get('max_per_img', UNLIMITED)
        return keep_best(*self.candidates(images, image_sizes), self.test_cfg.nms, limit if limit > 0 else UNLIMITED)

    def candidates(self, images: Tensor, image_sizes: Tensor) -> Candidates:
        outputs = self.network(self.pixels(images, image_sizes), mode='tensor')
        head = self.network.bbox_head
        return _rule(head)(head, outputs, image_sizes)

    @property
    def test_cfg(self) -> dict:
        return self.network.bbox_head.test_cfg


def why_not(model: nn.Module) -> str | None:
    """Returns the reason why a detector has no such graph, or None if it has one."""
    name = type(model).__name__
    head = getattr(model, 'bbox_head', None)
    if not isinstance(model, SingleStageDetector) or head is None:
        return f'{name} is neither a classifier nor a one-stage or two-stage detector with a box head'
    if _rule(head) is None:
        return f'the post-processing of {type(head).__name__} is not supported'
    if getattr(getattr(head, 'loss_cls', None), 'custom_cls_channels', False):
        return f'the scores of {type(head.loss_cls).__name__} are not supported'
    if not isinstance(head, YOLOXHead) and type(head.bbox_coder) not in (DeltaXYWHBBoxCoder, DistancePointBBoxCoder):
        return f'the boxes of {type(head.bbox_coder).__name__} are not supported'
    return why_not_nms(head.test_cfg, 'test_cfg')


def why_not_nms(test_cfg: dict, name: str) -> str | None:
    """Returns the reason why ONNX does not support the NMS of ``test_cfg``, or None; ``name`` is for the message."""
    nms = test_cfg.get('nms') or {}
    odd = set(nms) - {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}
    if nms.get('type', 'nms') != 'nms' or 'iou_threshold' not in nms or odd:
        return f'{name}.nms is {dict(nms)}, expected the NMS of ONNX, dict(type=\'nms\', iou_threshold=...)'
    return None


def _rule(head: nn.Module):
    """Returns the function for a head's candidates, or None if the head's post-processing is not supported."""
    kind = type(head)
    if getattr(kind, 'predict_by_feat', None) is YOLOXHead.predict_by_feat:
        return yolox_candidates
    if (getattr(kind, 'predict_by_feat', None) is not BaseDenseHead.predict_by_feat
            or kind._bbox_post_process is not BaseDenseHead._bbox_post_process):
        return None
    if kind._predict_by_feat_single is GFLHead._predict_by_feat_single:
        return gfl_candidates
    return dense_candidates if kind._predict_by_feat_single is BaseDenseHead._predict_by_feat_single else None


def dense_candidates(head: BaseDenseHead, outputs: tuple, image_sizes: Tensor) -> Candidates:
    """For RetinaNet, FCOS, ATSS, RTMDet and others with ``BaseDenseHead``'s post-processing."""
    factors = outputs[2] if len(outputs) > 2 and outputs[2] is not None else [None] * len(outputs[0])
    levels = []
    for scores, boxes, factor, priors in zip(*outputs[:2], factors, priors_of(head, outputs[0]), strict=True):
        scores, labels, places = best_of_level(head, scores)
        boxes = boxes_at(head, boxes, priors, places)
        if factor is not None:
            scores = scores * _flat(factor, 1).squeeze(2).sigmoid().gather(1, places)  # -1 stays negative
        levels.append((boxes, scores, labels))
    return within(head, levels, image_sizes)


def gfl_candidates(head: GFLHead, outputs: tuple, image_sizes: Tensor) -> Candidates:
    """For GFL, where each of the four distances is the mean of a distribution over strides."""
    levels = []
    for scores, boxes, priors, stride in zip(*outputs, priors_of(head, outputs[0]), head.prior_generator.strides,
                                             strict=True):
        scores, labels, places = best_of_level(head, scores)
        bins = _take(_flat(boxes, 4 * (head.reg_max + 1)), places)
        distances = head.integral(bins.flatten(0, 1)) * stride[0]
        points = head.anchor_center(priors[places].flatten(0, 1))
        boxes = head.bbox_coder.decode(points, distances).reshape(*places.shape, 4)
        levels.append((boxes, scores, labels))
    return within(head, levels, image_sizes)


def yolox_candidates(head: YOLOXHead, outputs: tuple, image_sizes: Tensor) -> Candidates:
    """For YOLOX, with the best class of each place, and boxes that are not clipped to the image."""
    priors = torch.cat(head.prior_generator.grid_priors(
        [scores.shape[-2:] for scores in outputs[0]], dtype=outputs[0][0].dtype, device=outputs[0][0].device,
        with_stride=True))
    scores, boxes, objectness = (torch.cat([_flat(level, size) for level in levels], 1)
                                 for levels, size in zip(outputs, (head.cls_out_channels, 4, 1), strict=True))
    scores, labels = scores.sigmoid().max(2)
    scores = scores * objectness.squeeze(2).sigmoid()
    centers = boxes[..., :2] * priors[:, 2:] + priors[:, :2]
    halves = boxes[..., 2:].exp() * priors[:, 2:] / 2
    scores = scores.masked_fill(scores < head.test_cfg.score_thr, -1)
    return Candidates(torch.cat([centers - halves, centers + halves], 2), scores, labels)


def best_of_level(head: nn.Module, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns scores, labels and places of the best ``nms_pre`` pairs of place and label above the threshold.

    Args:
        logits: logits of one level, (N, anchors * classes, H, W).
    """
    scores = scores_of(head, logits).flatten(1)
    classes = head.cls_out_channels if head.use_sigmoid_cls else head.cls_out_channels - 1
    scores = scores.masked_fill(scores <= head.test_cfg.get('score_thr', 0), -1)
    scores, index = top(scores, head.test_cfg.get('nms_pre', -1))
    return scores, index % classes, torch.div(index, classes, rounding_mode='floor')


def scores_of(head: nn.Module, logits: Tensor) -> Tensor:
    """Returns the scores (N, H * W * anchors, classes) of a level."""
    logits = _flat(logits, head.cls_out_channels)
    return logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(2)[..., :-1]


def boxes_at(head: nn.Module, deltas: Tensor, priors: Tensor, places: Tensor) -> Tensor:
    """Returns the boxes (N, K, 4) at ``places`` (N, K) of a level."""
    deltas = _take(_flat(deltas, 4), places)
    return head.bbox_coder.decode(priors[places].flatten(0, 1), deltas.flatten(0, 1)).reshape(deltas.shape)


def top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the largest ``count`` of each row, or all if there are fewer or ``count`` is not positive."""
    length = torch.as_tensor(values.shape[1])
    return values.topk(torch.minimum(length, torch.tensor(count)) if count > 0 else length)


def within(head: BaseDenseHead, levels: list[tuple], image_sizes: Tensor) -> Candidates:
    """Joins the levels, clips boxes to their image, and removes boxes that are too small."""
    boxes, scores, labels = (torch.cat(parts, 1) for parts in zip(*levels))
    boxes = inside(head, boxes, image_sizes)
    smallest = head.test_cfg.get('min_bbox_size', -1)
    if smallest >= 0:
        small = (boxes[..., 2:] - boxes[..., :2]).amin(2) <= smallest
        scores = scores.masked_fill(small, -1)
    return Candidates(boxes, scores, labels)


def inside(head: nn.Module, boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Clips ``boxes`` (N, K, 4) to their image, if the head's coder does."""
    if not head.bbox_coder.clip_border:
        return boxes
    limits = image_sizes.flip(1).repeat(1, 2)[:, None].to(boxes)  # (N, 1, 4)
    return torch.minimum(boxes.clamp(min=0), limits)


def priors_of(head: BaseDenseHead, levels: list[Tensor]) -> list[Tensor]:
    return head.prior_generator.grid_priors([level.shape[-2:] for level in levels], dtype=levels[0].dtype,
                                            device=levels[0].device)


def _flat(level: Tensor, size: int) -> Tensor:
    """Reshapes (N, anchors * size, H, W) to (N, H * W * anchors, size)."""
    return level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, size)


def _take(values: Tensor, places: Tensor) -> Tensor:
    """Returns ``values`` (N, P, size) at ``places`` (N, K)."""
    return values.gather(1, places.unsqueeze(2).expand(-1, -1, values.shape[2]))
