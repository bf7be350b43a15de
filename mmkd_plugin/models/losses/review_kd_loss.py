"""Hierarchical context loss of ReviewKD.

Letters: N images, C channels, (H, W) size of a level's map.
"""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...registry import MODELS
from ...utils import check_number
from .pooling import adaptive_average_pool

POOLED_SIZES = (4, 2, 1)


def hierarchical_context_loss(s_feature: Tensor, t_feature: Tensor) -> Tensor:
    """Mean squared difference of the full maps and of the maps pooled to 4x4, 2x2 and 1x1, float32.

    The weights are 1, 1/2, 1/4 and 1/8, divided by their sum. A size that would not shrink the map is left out, and
    the next size gets its weight. If pooling would enlarge the smaller side of an oblong map, this side is kept.
    """
    difference = s_feature.float() - t_feature.float()  # pooling is linear, so the difference is pooled once
    height, width = difference.shape[2:]
    loss, weight, total = _mean_square(difference), 1., 1.
    for size in POOLED_SIZES:
        if size >= max(height, width):
            continue
        weight /= 2
        total += weight
        pooled = adaptive_average_pool(difference, (min(size, height), min(size, width)))
        loss = loss + weight * _mean_square(pooled)
    return loss / total


def _mean_square(x: Tensor) -> Tensor:
    return x.square().sum() / max(x.numel(), 1)


@MODELS.register_module()
class ReviewKDLoss(nn.Module):
    """The loss of ReviewKD [0], to be used with :class:`ReviewKDConnector` on the student's side.

    [0] Chen, Liu, Zhao, Jia, Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv 2104.09044.

    The teacher's features are detached.

    Args:
        loss_weight: Weight of the loss; [0] has 1 on ImageNet.
    """

    def __init__(self, loss_weight: float = 1.):
        super().__init__()
        self.loss_weight = check_number('ReviewKDLoss.loss_weight', loss_weight, least=0)

    def extra_repr(self) -> str:
        return f'loss_weight={self.loss_weight}'

    def forward(self, s_feature: Tensor | Sequence[Tensor], t_feature: Tensor | Sequence[Tensor]) -> Tensor:
        """Returns the sum over levels for features (N, C, H, W), one of each network or a sequence of levels.

        Raises:
            ValueError: the numbers of levels or the shapes differ.
        """
        s_levels = [s_feature] if isinstance(s_feature, Tensor) else list(s_feature)
        t_levels = [t_feature] if isinstance(t_feature, Tensor) else list(t_feature)
        shapes = [[tuple(level.shape) for level in levels] for levels in (s_levels, t_levels)]
        if not s_levels or shapes[0] != shapes[1] or any(len(shape) != 4 for shape in shapes[0]):
            raise ValueError('ReviewKDLoss expects s_feature and t_feature of equal shapes (N, C, H, W), '
                             f'level by level, got {shapes[0]} and {shapes[1]}')
        with torch.autocast(s_levels[0].device.type, enabled=False):
            return self.loss_weight * sum(
                hierarchical_context_loss(s, t.detach()) for s, t in zip(s_levels, t_levels, strict=True))
