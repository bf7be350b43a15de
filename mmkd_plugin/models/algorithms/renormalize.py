"""Gives a teacher the image as its own preprocessor would have, from the one made for the student."""
import torch
from mmengine.logging import print_log
from torch import Tensor, nn


class Renormalize(nn.Module):
    """Maps a batch normalised for the student to the teacher's normalisation and channel order.

    With means and standard deviations :math:`\\mu, \\sigma` and, where the
    channel orders differ, channels reversed:
    :math:`x_T = (x_S \\sigma_S + \\mu_S - \\mu_T) / \\sigma_T`. A preprocessor
    without normalisation has :math:`\\mu = 0, \\sigma = 1`. The padding of an image
    smaller than its batch stays at the value it has in the batch.

    Args:
        student: the preprocessor that made the batch.
        teacher: the teacher's own.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.reverse = reverses_channels(student) != reverses_channels(teacher)
        (mean_s, std_s), (mean_t, std_t) = pixel_statistics(student), pixel_statistics(teacher)
        if self.reverse:
            mean_s, std_s = mean_s.flip(0), std_s.flip(0)
        self.register_buffer('factor', std_s / std_t)
        self.register_buffer('shift', (mean_s - mean_t) / std_t)

    @classmethod
    def between(cls, student: nn.Module, teacher: nn.Module) -> 'Renormalize | None':
        """Returns None where there is nothing to do, or the teacher's preprocessor is not one of images."""
        if not hasattr(teacher, '_enable_normalize'):
            return None
        self = cls(student, teacher)
        if not self.reverse and bool((self.factor == 1).all() and (self.shift == 0).all()):
            return None
        print_log('The teacher expects another normalisation or channel order than the student: '
                  f'every batch is renormalised for it (channels reversed: {self.reverse}, '
                  f'factor {self.factor.flatten().tolist()}, shift {self.shift.flatten().tolist()}).',
                  logger='current')
        return self

    def forward(self, inputs: Tensor, data_samples: list | None) -> Tensor:
        """Args: ``inputs`` (N, C, H, W), and the samples, whose ``img_shape`` tells what is padding."""
        out = (inputs.flip(1) if self.reverse else inputs) * self.factor + self.shift
        shapes = [sample.metainfo.get('img_shape') for sample in data_samples or []]
        height, width = inputs.shape[-2:]
        if not shapes or None in shapes or all(tuple(shape[:2]) == (height, width) for shape in shapes):
            return out
        sizes = torch.tensor([shape[:2] for shape in shapes]).to(inputs.device, non_blocking=True)
        rows = torch.arange(height, device=inputs.device) < sizes[:, :1]  # (N, H)
        columns = torch.arange(width, device=inputs.device) < sizes[:, 1:]  # (N, W)
        return torch.where((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), out, inputs)


def reverses_channels(preprocessor: nn.Module) -> bool:
    return bool(getattr(preprocessor, '_channel_conversion', False) or getattr(preprocessor, 'to_rgb', False))


def pixel_statistics(preprocessor: nn.Module) -> tuple[Tensor, Tensor]:
    if getattr(preprocessor, '_enable_normalize', False):
        return preprocessor.mean.detach().clone(), preprocessor.std.detach().clone()
    return torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
