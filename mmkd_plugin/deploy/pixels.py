"""The preprocessor as part of an exported graph."""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.algorithms.teacher_inputs import pixel_statistics, reverses_channels


class Pixels(nn.Module):
    """Converts pixels (N, C, H, W) between 0 and 255, RGB or grey, to the input of the network.

    It applies the steps of ``DetDataPreprocessor`` in the same order: channel order, normalisation, padding. Pixels
    outside of ``image_sizes`` get the padding value, and the images are padded at the right and the bottom to the
    preprocessor's multiple.

    Args:
        preprocessor: the preprocessor of the model.
        channels: number of channels of the images.
        from_file: whether the model's pipeline reads files, which MMCV reads as BGR. Data sets in memory have RGB
            images.
    """

    def __init__(self, preprocessor: nn.Module, channels: int, from_file: bool) -> None:
        super().__init__()
        mean, std = pixel_statistics(preprocessor)
        self.register_buffer('mean', mean)
        self.register_buffer('std', std)
        self.reverse = channels == 3 and reverses_channels(preprocessor) != from_file
        self.divisor = int(getattr(preprocessor, 'pad_size_divisor', None) or 1)
        self.pad_value = float(getattr(preprocessor, 'pad_value', None) or 0)

    def forward(self, images: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """Args: ``images`` (N, C, H, W); ``image_sizes`` (N, 2), height and width of each without its padding."""
        if self.reverse:
            images = images[:, [2, 1, 0]]
        images = (images.float() - self.mean) / self.std
        height, width = images.shape[-2:]
        if image_sizes is not None:
            rows = torch.arange(height, device=images.device) < image_sizes[:, :1]  # (N, H)
            columns = torch.arange(width, device=images.device) < image_sizes[:, 1:]  # (N, W)
            inside = rows[:, None, :, None] & columns[:, None, None, :]
            images = images.masked_fill(~inside, self.pad_value)
        if self.divisor > 1:
            images = F.pad(images, (0, -width % self.divisor, 0, -height % self.divisor), value=self.pad_value)
        return images
