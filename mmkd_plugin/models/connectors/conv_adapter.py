"""SoKD's adapter Phi, from the student's features to the teacher's channels.

Letters: N images, C channels, (H, W) size of a level's map, L positions of all levels.
"""
from collections.abc import Sequence

import torch
from mmrazor.models.architectures.connectors.base_connector import BaseConnector
from torch import Tensor, nn

from ...registry import MODELS
from ...utils import check_number
from ..levels import Levels


@MODELS.register_module()
class ConvAdapter(BaseConnector):
    """Two 3x3 convolutions with batch norm and ReLU, shared by all levels of a pyramid [0].

    [0] Shen, Huang, Zhu, Fan, Zhang, Student-Oriented Teacher Knowledge Refinement for Knowledge
    Distillation, arXiv 2409.18785, 2024.

    Batch norm computes its statistics over the positions of all levels together. So a level with one position
    (1 x 1, one image) does not raise an error, and all levels are normalised alike.

    Args:
        in_channels: Channels of the student's maps.
        out_channels: Channels of the teacher's maps.
        signed: Whether the teacher's features have negative values, like the outputs of an FPN. If so, the last ReLU
            is left out, because it would cut them off. Set it to False for features that end in a ReLU, such as the
            stages of a ResNet.

    Raises:
        ValueError: a number of channels is not a positive whole number, or ``signed`` is not a bool.
    """

    def __init__(self, in_channels: int, out_channels: int, signed: bool = True):
        super().__init__()
        if not isinstance(signed, bool):
            raise ValueError(f'ConvAdapter.signed must be True or False, got {signed!r}')
        self.in_channels = check_number('ConvAdapter.in_channels', in_channels, least=1, whole=True)
        self.out_channels = check_number('ConvAdapter.out_channels', out_channels, least=1, whole=True)
        self.signed = signed
        self.convs = nn.ModuleList(nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
                                   for channels in (in_channels, out_channels))
        self.norms = nn.ModuleList(nn.BatchNorm1d(out_channels) for _ in self.convs)

    def extra_repr(self) -> str:
        return f'signed={self.signed}'

    def forward_train(self, feature: Tensor | Sequence[Tensor]) -> Tensor | Levels:
        """Maps one feature (N, C, H, W), or a sequence of levels, to one or a tuple with the teacher's channels.

        Raises:
            ValueError: a feature does not have ``in_channels``.
        """
        levels = [feature] if isinstance(feature, Tensor) else list(feature)
        if any(x.dim() != 4 or x.shape[1] != self.in_channels for x in levels):
            raise ValueError(f'ConvAdapter expects features of shape (N, {self.in_channels}, H, W), '
                             f'got {[tuple(x.shape) for x in levels]}')
        shapes = [x.shape[2:] for x in levels]
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            row = norm(torch.cat([conv(x).flatten(2) for x in levels], 2))  # (N, C, L)
            if i == 1 and not self.signed:
                row = row.relu()
            levels = Levels(row, shapes)
            if i == 0:  # per level, so that each result has the layout of the next convolution
                levels = [level.relu() for level in levels]
        return levels[0] if isinstance(feature, Tensor) else levels
