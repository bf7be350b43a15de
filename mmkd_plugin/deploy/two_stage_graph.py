"""The graph of a two-stage detector (Faster R-CNN), from pixels to boxes, scores and labels.

As in :mod:`.detector_graph`, no branch depends on the data. Each image keeps the places of ``max_per_img`` proposals,
and the RoIAlign of each level processes all of them.

Letters: N images, P proposals per image, C classes.
"""
import torch
from mmcv.ops import RoIAlign
from mmdet.models.dense_heads import RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads import BaseRoIHead, SingleRoIExtractor, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from torch import Tensor
from torchvision.ops import roi_align

from .detector_graph import Candidates, DetectorGraph, boxes_at, inside, priors_of, scores_of, top, why_not_nms, within
from .nms import keep_best


class TwoStageGraph(DetectorGraph):
    """As :class:`DetectorGraph`, for a model for which :func:`why_not_two_stages` returns None.

    Candidates with equal scores are ordered by the scores of their proposals, and then by label.
    """

    def candidates(self, images: Tensor, image_sizes: Tensor) -> Candidates:
        features = self.network.extract_feat(self.pixels(images, image_sizes))
        proposals, scores = propose(self.network.rpn_head, features, image_sizes)
        roi_head = self.network.roi_head
        regions = roi_features(roi_head.bbox_roi_extractor, features, proposals)
        if roi_head.with_shared_head:
            regions = roi_head.shared_head(regions)
        return classify(roi_head.bbox_head, regions, proposals, scores, roi_head.test_cfg.score_thr, image_sizes)

    @property
    def test_cfg(self) -> dict:
        return self.network.roi_head.test_cfg


def why_not_two_stages(model: TwoStageDetector) -> str | None:
    """Returns the reason why a detector has no such graph, or None if it has one."""
    name = type(model).__name__
    rpn, roi_head = getattr(model, 'rpn_head', None), getattr(model, 'roi_head', None)
    if rpn is None or roi_head is None:
        return f'{name} has no {"rpn_head" if rpn is None else "roi_head"}, expected both'
    if roi_head.with_mask:
        return f'the masks of {name} are not supported, only boxes'
    own = [(model, TwoStageDetector, ('predict', 'extract_feat')),
           (rpn, BaseDenseHead, ('predict', 'predict_by_feat')),
           (rpn, RPNHead, ('_predict_by_feat_single', '_bbox_post_process')),
           (roi_head, BaseRoIHead, ('predict', )), (roi_head, StandardRoIHead, ('predict_bbox', '_bbox_forward'))]
    for part, known, methods in own:
        if any(getattr(type(part), method, None) is not getattr(known, method) for method in methods):
            return f'the prediction of {type(part).__name__} is not supported'
    head, extractor = roi_head.bbox_head, roi_head.bbox_roi_extractor
    if any(getattr(type(head), method, None) is not getattr(BBoxHead, method)
           for method in ('predict_by_feat', '_predict_by_feat_single')) or not (head.with_cls and head.with_reg):
        return f'the post-processing of {type(head).__name__} is not supported'
    if head.custom_cls_channels:
        return f'the scores of {type(head.loss_cls).__name__} are not supported'
    for part in (rpn, head):
        if type(part.bbox_coder) is not DeltaXYWHBBoxCoder:
            return f'the boxes of {type(part.bbox_coder).__name__} are not supported'
    if type(extractor) is not SingleRoIExtractor:
        return f'the regions of {type(extractor).__name__} are not supported, expected a SingleRoIExtractor'
    layer = extractor.roi_layers[0]
    if type(layer) is not RoIAlign or layer.pool_mode != 'avg':
        return f'roi_layer is {layer}, expected RoIAlign with pool_mode=\'avg\''
    if rpn.test_cfg.max_per_img < 1:
        return f'test_cfg.rpn.max_per_img is {rpn.test_cfg.max_per_img}, expected at least 1'
    return why_not_nms(rpn.test_cfg, 'test_cfg.rpn') or why_not_nms(roi_head.test_cfg, 'test_cfg.rcnn')


def propose(head: RPNHead, features: tuple[Tensor, ...], image_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the proposals (N, P, 4) and their scores (N, P), both zero after the last proposal.

    NMS gets the level as label, so that it runs for each level separately.
    """
    logits, deltas = head(features)
    levels = []
    for level, (logit, delta, priors) in enumerate(zip(logits, deltas, priors_of(head, logits), strict=True)):
        scores, places = top(scores_of(head, logit).squeeze(2), head.test_cfg.get('nms_pre', -1))
        levels.append((boxes_at(head, delta, priors, places), scores, torch.full_like(places, level)))
    boxes, scores, _ = keep_best(*within(head, levels, image_sizes), head.test_cfg.nms, head.test_cfg.max_per_img)
    return boxes, scores


def roi_features(extractor: SingleRoIExtractor, features: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
    """Returns the extractor's features of ``boxes`` (N, P, 4), as (N * P, channels, height, width).

    Each level processes all boxes. Those of other levels are shrunk to a point, where the adaptive RoIAlign
    (``sampling_ratio`` of 0) does not sample. If each level selected its own boxes, shapes would depend on the data.

    The operator is torchvision's, which gives the same results as mmcv's. mmcv's own symbolic shifts the boxes, and
    ``RoiAlign`` of opset 16 and later would shift them again.
    """
    index = torch.arange(boxes.shape[0], device=boxes.device).to(boxes)[:, None, None].expand(-1, boxes.shape[1], 1)
    rois = torch.cat([index, boxes], 2).flatten(0, 1)
    levels = extractor.map_roi_levels(rois, extractor.num_inputs)
    total = 0
    for level, (layer, feature) in enumerate(zip(extractor.roi_layers, features)):
        here = (levels == level).to(rois)
        found = roi_align(feature, rois * here[:, None], layer.output_size, layer.spatial_scale, layer.sampling_ratio,
                          layer.aligned)
        total = total + found * here[:, None, None, None]
    return total


def classify(head: BBoxHead, regions: Tensor, proposals: Tensor, proposal_scores: Tensor, threshold: float,
             image_sizes: Tensor) -> Candidates:
    """Returns one candidate per proposal and class, (N, P * C)."""
    logits, deltas = head(regions)
    scores = logits.softmax(1)[:, :-1].reshape(*proposals.shape[:2], head.num_classes)
    scores = scores.masked_fill((scores <= threshold) | (proposal_scores <= 0).unsqueeze(2), -1)
    kinds = 1 if head.reg_class_agnostic else head.num_classes
    priors = proposals.unsqueeze(2).expand(-1, -1, kinds, -1)
    boxes = head.bbox_coder.decode(priors.reshape(-1, 4), deltas.reshape(-1, 4)).reshape(priors.shape)
    boxes = inside(head, boxes.expand(-1, -1, head.num_classes, -1).flatten(1, 2), image_sizes)
    labels = torch.arange(head.num_classes, device=scores.device).expand_as(scores)
    return Candidates(boxes, scores.flatten(1), labels.flatten(1))
