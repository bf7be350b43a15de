"""MobileNetV2 for images of 32 x 32."""
from mmcv.cnn import ConvModule
from mmpretrain.models.backbones import MobileNetV2
from torch import nn

from ...registry import MODELS


@MODELS.register_module()
class CIFARMobileNetV2(MobileNetV2):
    """MMPretrain's MobileNetV2 with the strides, widths and activations of the CIFAR benchmark [0].

    [0] Tian, Krishnan, Isola, Contrastive Representation Distillation, arXiv 1910.10699, and its benchmark.

    - Stride 16 instead of 32: ``layer2`` keeps the size.
    - Widths are not rounded to multiples of 8: 12 channels, not 16, at half width.
    - ReLU instead of ReLU6, and a 1x1 convolution before the first block too, which does not expand.

    An image (N, 3, 32, 32) gives (N, 1280, 2, 2). ``layer2``, ``layer3``, ``layer5`` and ``layer7`` have maps of side
    16, 8, 4 and 2, with 12, 16, 48 and 160 channels at half width.

    Args:
        widen_factor: factor of all widths except the last.
        kwargs: as in ``MobileNetV2``.
    """

    arch_settings = [[ratio, channels, blocks, 1 if channels == 24 else stride]
                     for ratio, channels, blocks, stride in MobileNetV2.arch_settings]

    def __init__(self, widen_factor: float = 0.5, **kwargs) -> None:
        super().__init__(widen_factor, act_cfg=dict(type='ReLU'), **kwargs)

    def make_layer(self, out_channels: int, num_blocks: int, stride: int, expand_ratio: int) -> nn.Sequential:
        in_channels, width = self.in_channels, self.arch_settings[len(self.layers)][1] * self.widen_factor
        layer = super().make_layer(int(width), num_blocks, stride, expand_ratio)
        if expand_ratio == 1:
            layer.insert(0, ConvModule(in_channels, in_channels, 1, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg))
        return layer
