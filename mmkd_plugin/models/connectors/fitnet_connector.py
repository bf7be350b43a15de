"""FitNet's regressor.

Letters: N images, C channels, (H, W) size of a level's map, L positions of all levels.
"""
from collections.abc import Sequence

from mmrazor.models.architectures.connectors.base_connector import BaseConnector
from torch import Tensor, nn

from ...registry import MODELS
from ...utils import check_number
from ..levels import Levels, to_row


@MODELS.register_module()
class FitNetConnector(BaseConnector):
    """A 1x1 convolution with batch norm, from the student's to the teacher's channels [0].

    [0] Romero, Ballas, Kahou, Chassang, Gatta, Bengio, *FitNets: Hints for Thin Deep Nets*, ICLR 2015,
    arXiv 1412.6550. Its regressor is a convolution without padding. With maps of equal size, as in distillation
    benchmarks, this is a 1x1 convolution.

    All levels of a pyramid share it. Batch norm computes its statistics over the positions of all levels together, so
    that a level with one position does not raise an error.

    Args:
        in_channels: channels of the student's maps.
        out_channels: channels of the teacher's maps.

    Raises:
        ValueError: a number of channels is not a positive whole number.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels = check_number('FitNetConnector.in_channels', in_channels, least=1, whole=True)
        self.out_channels = check_number('FitNetConnector.out_channels', out_channels, least=1, whole=True)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm1d(out_channels)

    def forward_train(self, feature: Tensor | Sequence[Tensor]) -> Tensor | Levels:
        """Maps one feature (N, C, H, W), or a sequence of levels, to one or a tuple with the teacher's channels.

        Raises:
            ValueError: a feature does not have ``in_channels``.
        """
        levels = [feature] if isinstance(feature, Tensor) else list(feature)
        if any(x.dim() != 4 or x.shape[1] != self.in_channels for x in levels):
            raise ValueError(f'FitNetConnector expects features of shape (N, {self.in_channels}, H, W), '
                             f'got {[tuple(x.shape) for x in levels]}')
        row = self.norm(self.conv(to_row(levels).unsqueeze(3)).squeeze(3))  # (N, C, L)
        out = Levels(row, [x.shape[2:] for x in levels])
        return out[0] if isinstance(feature, Tensor) else out
