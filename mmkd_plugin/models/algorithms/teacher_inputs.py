"""Converts a batch of the student's preprocessor to the form of the teacher's preprocessor."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from ..alignment import resize
from ..dummy_input import Size, padded


class TeacherInputs(nn.Module):
    """Maps a batch of the student's preprocessor to the teacher's normalisation, channel order, size and padding.

    With means and standard deviations :math:`\\mu, \\sigma`:
    :math:`x_T = (x_S \\sigma_S + \\mu_S - \\mu_T) / \\sigma_T`. The channels are reversed if the channel orders differ.
    A preprocessor without normalisation has :math:`\\mu = 0, \\sigma = 1`. Padding in the batch gets the pad value of
    the teacher's preprocessor. The batch is padded at the bottom and at the right to a multiple of the teacher's
    ``pad_size_divisor``.

    Args:
        student: the preprocessor of the batch.
        teacher: the teacher's preprocessor.
        size: height and width to which the batch, with its padding, is resized for the teacher.

    Raises:
        ValueError: the teacher would pad an image of ``size``.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, size: Size | None = None) -> None:
        super().__init__()
        self.reverse = reverses_channels(student) != reverses_channels(teacher)
        (mean_s, std_s), (mean_t, std_t) = pixel_statistics(student), pixel_statistics(teacher)
        if self.reverse:
            mean_s, std_s = mean_s.flip(0), std_s.flip(0)
        factor, shift = std_s / std_t, (mean_s - mean_t) / std_t
        self.renormalizes = self.reverse or bool((factor != 1).any() or (shift != 0).any())
        device = getattr(getattr(student, 'mean', None), 'device', None)  # that of the batch
        self.register_buffer('factor', factor.to(device), persistent=False)
        self.register_buffer('shift', shift.to(device), persistent=False)
        self.pad_value = float(getattr(teacher, 'pad_value', 0))
        self.fills = self.renormalizes or self.pad_value != float(getattr(student, 'pad_value', 0))
        self.divisor = getattr(teacher, 'pad_size_divisor', 1)
        self.size = size
        if size and padded(size, self.divisor) != size:
            raise ValueError(f'teacher_input_size: not a multiple of the teacher\'s pad_size_divisor, got {size}, '
                             f'expected multiples of {self.divisor}. Give {padded(size, self.divisor)}')

    @classmethod
    def between(cls, student: nn.Module, teacher: nn.Module, size: Size | None = None) -> 'TeacherInputs | None':
        """Returns the mapping and logs what it does, or returns None if no conversion is needed.

        If the teacher's preprocessor is not for images, the teacher gets the batch unchanged.
        """
        if not hasattr(teacher, '_enable_normalize'):
            if size:
                raise ValueError('teacher_input_size: the teacher has no preprocessor for images, got '
                                 f'{type(teacher).__name__}. Leave out teacher_input_size')
            return None
        self = cls(student, teacher, size)
        if self.renormalizes:
            print_log('The teacher expects another normalisation or channel order than the student: '
                      f'every batch is converted (channels reversed: {self.reverse}, '
                      f'factor {self.factor.cpu().flatten().tolist()}, shift {self.shift.cpu().flatten().tolist()}).',
                      logger='current')
        if size:
            print_log(f'Every batch is resized to {size[0]} x {size[1]} for the teacher, and its maps are interpolated '
                      'to the size of the student\'s.', logger='current')
        pads = self.divisor > 1 and getattr(student, 'pad_size_divisor', 1) % self.divisor
        return self if self.renormalizes or self.fills or pads or size else None

    def forward(self, inputs: Tensor, data_samples: Sequence | None) -> Tensor:
        """Converts ``inputs``, (N, C, H, W). ``img_shape`` of the samples tells where the padding begins."""
        out = inputs
        if self.renormalizes:
            out = (inputs.flip(1) if self.reverse else inputs) * self.factor + self.shift
        if self.fills:
            out = self._fill(out, data_samples)
        if self.size:
            return resize(out, self.size)
        height, width = inputs.shape[-2:]
        bottom, right = -height % self.divisor, -width % self.divisor
        return F.pad(out, (0, right, 0, bottom), value=self.pad_value) if bottom or right else out

    def _fill(self, out: Tensor, data_samples: Sequence | None) -> Tensor:
        shapes = [sample.metainfo.get('img_shape') for sample in data_samples or []]
        height, width = out.shape[-2:]
        if not shapes or None in shapes or all(tuple(shape[:2]) == (height, width) for shape in shapes):
            return out
        sizes = torch.tensor([shape[:2] for shape in shapes], pin_memory=out.is_cuda).to(out.device, non_blocking=True)
        rows = torch.arange(height, device=out.device) < sizes[:, :1]  # (N, H)
        columns = torch.arange(width, device=out.device) < sizes[:, 1:]  # (N, W)
        return out.masked_fill(~(rows[:, :, None] & columns[:, None, :]).unsqueeze(1), self.pad_value)

    def samples(self, data_samples: Sequence | None, before: Size, after: Size) -> Sequence | None:
        """Returns the samples with new sizes, for a batch whose size (h, w) changed from ``before`` to ``after``."""
        if before == after or not data_samples or not hasattr(data_samples[0], 'metainfo'):
            return data_samples
        return [self._sample(sample, before, after) for sample in data_samples]

    def _sample(self, sample, before: Size, after: Size):
        info = dict(batch_input_shape=tuple(after), pad_shape=tuple(after))
        if self.size:
            ratios = [new / old for new, old in zip(after, before)]
            if 'img_shape' in sample.metainfo:
                info['img_shape'] = tuple(round(length * ratio) for length, ratio in zip(sample.img_shape, ratios))
            scale_w, scale_h = sample.metainfo.get('scale_factor', (1., 1.))[:2]
            info['scale_factor'] = (scale_w * ratios[1], scale_h * ratios[0])
        new = sample.clone()
        new.set_metainfo(info)
        return new


def reverses_channels(preprocessor: nn.Module) -> bool:
    return bool(getattr(preprocessor, '_channel_conversion', False) or getattr(preprocessor, 'to_rgb', False))


def pixel_statistics(preprocessor: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of each channel, (C, 1, 1), on the CPU; 0 and 1 without normalisation."""
    if getattr(preprocessor, '_enable_normalize', False):
        return preprocessor.mean.detach().cpu().clone(), preprocessor.std.detach().cpu().clone()
    return torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
