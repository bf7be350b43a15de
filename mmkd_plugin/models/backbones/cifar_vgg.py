"""VGG for images of 32 x 32."""
from mmpretrain.models.backbones import VGG
from torch import nn

from ...registry import MODELS
from ...utils import closest


@MODELS.register_module()
class CIFARVGG(VGG):
    """MMPretrain's VGG with batch norm, three of its five pooling layers, and depth 8 as a further option [0].

    [0] Tian, Krishnan, Isola, Contrastive Representation Distillation, arXiv 1910.10699, and its benchmark.

    Depth 8 has one convolution per stage. An image (N, 3, 32, 32) gives (N, 512, 4, 4). The stages output 64, 128,
    256, 512 and 512 channels with sides 32, 16, 8, 4 and 4. Parameters have the names and shapes of ``VGG``'s.

    Args:
        depth: 8, 11, 13, 16 or 19. It counts three fully connected layers that this network does not have.
        kwargs: as in ``VGG``.

    Raises:
        ValueError: ``depth`` is not one of these.
    """

    arch_settings = {8: (1, 1, 1, 1, 1), **VGG.arch_settings}

    def __init__(self, depth: int, **kwargs) -> None:
        if depth not in self.arch_settings:
            raise ValueError(f'CIFARVGG.depth must be one of {list(self.arch_settings)}, got {depth!r}; '
                             f'{closest(depth, map(str, self.arch_settings))}')
        super().__init__(depth, norm_cfg=dict(type='BN'), with_last_pool=False, **kwargs)
        fourth_pool = self.range_sub_modules[3][1] - 1
        self.features[fourth_pool] = nn.Identity()  # keeps the names of later layers
