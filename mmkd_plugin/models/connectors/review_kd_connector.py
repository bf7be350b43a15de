"""Attention-based fusion of ReviewKD.

Letters: N images, C channels of a level, M mid channels, (H, W) size of a level's map.
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmrazor.models.architectures.connectors.base_connector import BaseConnector
from torch import Tensor, nn

from ...registry import MODELS
from ...utils import check_number


class AttentionBasedFusion(BaseModule):
    """Fuses the feature of one level with the fused feature of the deeper level, with weights per position."""

    def __init__(self, in_channels: int, out_channels: int, mid_channels: int, fuse: bool, norm_cfg: dict):
        super().__init__()
        self.own = ConvModule(in_channels, mid_channels, 1, norm_cfg=norm_cfg, act_cfg=None)
        self.attention = nn.Conv2d(2 * mid_channels, 2, 1) if fuse else None
        self.out = ConvModule(mid_channels, out_channels, 3, padding=1, norm_cfg=norm_cfg, act_cfg=None)
        for conv in (self.own.conv, self.out.conv):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, feature: Tensor, deeper: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps (N, C, H, W) and the deeper (N, M, h, w) to the output, and the (N, M, H, W) for the next level."""
        mid = self.own(feature)
        if self.attention is not None:
            deeper = F.interpolate(deeper, mid.shape[2:], mode='nearest')
            weights = self.attention(torch.cat([mid, deeper], 1)).sigmoid()  # (N, 2, H, W)
            mid = mid * weights[:, :1] + deeper * weights[:, 1:]
        return self.out(mid), mid


@MODELS.register_module()
class ReviewKDConnector(BaseConnector):
    """Fuses each of the student's features with all deeper ones, to predict the teacher's features [0].

    [0] Chen, Liu, Zhao, Jia, Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv 2104.09044.

    A level keeps the student's height and width. A pooled embedding (N, C, 1, 1) can be the deepest level.

    Args:
        in_channels: Channels of the student's levels, shallow to deep.
        out_channels: Channels of the teacher's levels, shallow to deep.
        mid_channels: Channels of the fusion. [0] has 512 on ImageNet, and on CIFAR at most the student's deepest
            channels.
        norm_cfg: Normalisation after the convolutions, as in any MMCV module; [0] has batch norm.

    Raises:
        ValueError: the numbers of channels are not positive whole numbers, or the lists differ in length.
    """

    def __init__(self,
                 in_channels: Sequence[int],
                 out_channels: Sequence[int],
                 mid_channels: int = 512,
                 norm_cfg: dict | None = None):
        super().__init__()
        for field, values in (('in_channels', in_channels), ('out_channels', out_channels)):
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise ValueError(f'ReviewKDConnector.{field} must be a list with one number per level, '
                                 f'got {values!r}')
            for i, value in enumerate(values):
                check_number(f'ReviewKDConnector.{field}[{i}]', value, least=1, whole=True)
        if len(in_channels) != len(out_channels):
            raise ValueError('ReviewKDConnector.in_channels and out_channels must have equally many levels, '
                             f'got {list(in_channels)} and {list(out_channels)}')
        check_number('ReviewKDConnector.mid_channels', mid_channels, least=1, whole=True)
        self.in_channels = tuple(in_channels)
        norm_cfg = dict(type='BN') if norm_cfg is None else norm_cfg
        deepest = len(in_channels) - 1
        self.levels = nn.ModuleList(
            AttentionBasedFusion(c_in, c_out, mid_channels, fuse=i < deepest, norm_cfg=norm_cfg)
            for i, (c_in, c_out) in enumerate(zip(in_channels, out_channels, strict=True)))

    def forward_train(self, feature: Sequence[Tensor]) -> list[Tensor]:
        """Maps the student's features, shallow to deep, to the same number of features with the teacher's channels.

        Raises:
            ValueError: the features do not have ``in_channels``.
        """
        channels = () if isinstance(feature, Tensor) else tuple(level.size(1) for level in feature)
        if channels != self.in_channels:
            given = f'one tensor {tuple(feature.shape)}' if isinstance(feature, Tensor) else list(channels)
            raise ValueError(f'ReviewKDConnector expects a list of features with in_channels '
                             f'{list(self.in_channels)}, shallow to deep, got {given}')
        outputs, mid = [], None
        for level, x in zip(reversed(self.levels), reversed(feature), strict=True):
            out, mid = level(x, mid)
            outputs.append(out)
        return outputs[::-1]
