"""Losses of CrossKD between the predictions of two dense heads.

[0] Wang, Chen, Zheng, Li, Cheng, Hou, CrossKD: Cross-Head Knowledge Distillation for Object Detection, CVPR 2024,
arXiv 2306.11369.

All losses are sums in float32; the caller divides them. Letters: N images, A anchors per position, K classes, R bins of
a distance, (H, W) size of a level's map.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def quality_focal_loss(s_logits: Tensor, t_logits: Tensor, beta: float = 1.) -> Tensor:
    """Returns the sum of ``|p_S - p_T|^beta BCE(p_S, p_T)``, where p are sigmoids of logits of any shape.

    The factor makes the loss zero where both agree; the cross-entropy of soft targets alone is not zero there.
    """
    s_logits, target = s_logits.float(), t_logits.detach().float().sigmoid()
    distance = (s_logits.sigmoid() - target).abs()
    return (distance**beta * F.binary_cross_entropy_with_logits(s_logits, target, reduction='none')).sum()


def box_loss(s_boxes: Tensor, t_boxes: Tensor, weight: Tensor) -> Tensor:
    """Returns the sum of ``1 - GIoU`` of (n, 4) boxes, x1 y1 x2 y2, weighted by (n,)."""
    from mmdet.structures.bbox import bbox_overlaps
    giou = bbox_overlaps(s_boxes.float(), t_boxes.detach().float(), mode='giou', is_aligned=True)
    return ((1 - giou) * weight).sum()


def distribution_loss(s_logits: Tensor, t_logits: Tensor, weight: Tensor) -> Tensor:
    """Returns the sum of ``KL(T || S)`` of the (N, 4, R, H, W) distributions of a box's four distances, averaged over
    the four and weighted by (N, H, W)."""
    s_log, t_log = (F.log_softmax(x.float(), dim=2) for x in (s_logits, t_logits.detach()))
    return ((t_log.exp() * (t_log - s_log)).sum(2).mean(1) * weight).sum()


def best_score(logits: Tensor, classes: int) -> Tensor:
    """Returns the largest class probability of each anchor, (N, A, H, W), from logits (N, A K, H, W)."""
    return logits.detach().float().unflatten(1, (-1, classes)).amax(2).sigmoid()


def align_statistics(feature: Tensor, target: Tensor) -> Tensor:
    """Gives each channel of (N, C, H, W) the mean and standard deviation that it has in ``target``, float32."""
    feature, target = feature.float(), target.detach().float()
    variance, mean = torch.var_mean(feature, (0, 2, 3), correction=0, keepdim=True)
    t_variance, t_mean = torch.var_mean(target, (0, 2, 3), correction=0, keepdim=True)
    return (feature - mean) * ((variance + 1e-12).rsqrt() * t_variance.sqrt()) + t_mean
