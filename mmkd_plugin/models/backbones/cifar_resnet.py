"""ResNets for images of 32 x 32."""
from collections.abc import Sequence

from mmpretrain.models.backbones import ResNet_CIFAR
from mmpretrain.models.backbones.resnet import BasicBlock

from ...registry import MODELS
from ...utils import closest


@MODELS.register_module()
class CIFARResNet(ResNet_CIFAR):
    """A ResNet with three stages of n basic blocks each and depth 6n + 2.

    MMPretrain's ``ResNet_CIFAR`` has the depths and the four stages of ImageNet's ResNets. ResNet-20, -56 and -110 [0]
    have ``stem_channels=16, base_channels=16``; ResNet-8x4 and -32x4 [1] have 32 and 64.

    [0] He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2, but with
    projection shortcuts instead of shortcuts without parameters, as in [1].
    [1] Tian, Krishnan, Isola, Contrastive Representation Distillation, arXiv 1910.10699, and its benchmark.

    With the default strides, an image (N, 3, 32, 32) gives (N, 4 C, 8, 8) with C = ``base_channels``. ``layer1``,
    ``layer2`` and ``layer3`` output (N, C, 32, 32), (N, 2 C, 16, 16) and (N, 4 C, 8, 8).

    Args:
        depth: 8, 14, 20, ..., 110.
        stem_channels: channels of the first convolution.
        base_channels: channels of the first stage; each further stage has twice as many.
        strides: strides of the three stages.
        kwargs: as in ``ResNet_CIFAR``.

    Raises:
        ValueError: ``depth`` is not one of these.
    """

    arch_settings = {6 * n + 2: (BasicBlock, (n, n, n)) for n in range(1, 19)}

    def __init__(self, depth: int, stem_channels: int = 16, base_channels: int = 16,
                 strides: Sequence[int] = (1, 2, 2), **kwargs) -> None:
        if depth not in self.arch_settings:
            raise ValueError(f'CIFARResNet.depth must be 6n + 2, from 8 to 110, got {depth!r}; '
                             f'{closest(depth, map(str, self.arch_settings))}')
        super().__init__(depth, stem_channels=stem_channels, base_channels=base_channels, num_stages=3,
                         strides=strides, dilations=(1, 1, 1), out_indices=(2, ), zero_init_residual=False, **kwargs)
