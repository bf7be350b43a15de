"""The input of zeros on which a model is tried when it is built: how many channels, how large, with which samples."""
import logging
import math
from collections.abc import Iterator, Sequence

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

Size = tuple[int, int]  # height and width

_STATED = ('img_size', 'input_size', 'init_input_size', 'pretrain_img_size')  # attributes that hold a size in pixels
_LARGEST_DIVISOR = 256


def check_size(field: str, size: int | Sequence[int]) -> Size:
    """Returns ``size`` as (height, width), else raises ``ValueError``."""
    pair = (size, size) if isinstance(size, int) and not isinstance(size, bool) else size
    if not (isinstance(pair, (list, tuple)) and len(pair) == 2
            and all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in pair)):
        raise ValueError(f'{field}: not a size in pixels, got {size!r}, expected (height, width). Give two positive '
                         'whole numbers')
    return tuple(pair)


def input_channels(model: nn.Module) -> int:
    """Returns how many channels the images of ``model`` have.

    A preprocessor with several means states it. Else the first convolution does; one behind the ``Focus`` of YOLOX,
    which moves blocks of 2 x 2 pixels into channels, reads four times as many.
    """
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
    if mean is not None and len(mean) > 1:
        return len(mean)
    parents = dict(model.named_modules())
    for name, module in parents.items():
        if isinstance(module, nn.Conv2d):
            behind_focus = any(type(parents[name.rsplit('.', i)[0]]).__name__ == 'Focus'
                               for i in range(1, name.count('.') + 1))
            return module.in_channels // 4 if behind_focus else module.in_channels
    return 3


def dummy_size(model: nn.Module) -> Size:
    """Returns the size of the model's dummy inputs: what :func:`set_dummy_sizes` found, else 224 x 224."""
    return model.__dict__.get('dummy_size') or (224, 224)


def dummy_inputs(model: nn.Module, size: Size | None = None) -> tuple[Tensor, list | None]:
    """Returns a batch of one image of zeros, where the model is, and its data samples (None for a classifier).

    Args:
        model: of MMDetection or MMPretrain.
        size: height and width; by default :func:`dummy_size`.
    """
    from mmdet.models.detectors import BaseDetector
    from mmdet.structures import DetDataSample
    size = size or dummy_size(model)
    image = next(model.parameters()).new_zeros(1, input_channels(model), *size)
    if not isinstance(model, BaseDetector):
        return image, None
    return image, [DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size,
                                               scale_factor=(1.0, 1.0), img_id=0))]


def size_divisor(model: nn.Module) -> int:
    """Returns what height and width of a batch are multiples of after the model's preprocessor."""
    divisor = getattr(getattr(model, 'data_preprocessor', None), 'pad_size_divisor', 1)
    return divisor if isinstance(divisor, int) and divisor >= 1 else 1


def padded(size: Size, divisor: int) -> Size:
    """Returns ``size`` rounded up to multiples of ``divisor``."""
    return tuple(math.ceil(length / divisor) * divisor for length in size)


@torch.no_grad()
def set_dummy_sizes(student: nn.Module, teacher: nn.Module, input_size: Size | None, teacher_size: Size | None) -> None:
    """Decides the size of the dummy inputs of both models; maps of equal stride then have equal sizes.

    The size is ``input_size``, by default 256 x 256 for detectors and 224 x 224 for others, padded as both
    preprocessors pad. If a model does not run at it, and states a size of its own, both take that.

    Args:
        student, teacher: the models; each gets an attribute ``dummy_size``.
        input_size: of the student's images, where the data pipeline fixes it.
        teacher_size: of the teacher's images, if it sees the batch resized.

    Raises:
        ValueError: the models take images of different channels.
    """
    from mmdet.models.detectors import BaseDetector
    channels = input_channels(student), input_channels(teacher)
    if channels[0] != channels[1]:
        raise ValueError(f'teacher: images of another kind, got a model of {channels[1]} channel(s), expected '
                         f'{channels[0]} as the student has. Take a teacher of such images')
    size = input_size or ((256, 256) if isinstance(student, BaseDetector) else (224, 224))
    divisor = math.lcm(size_divisor(student), size_divisor(teacher))
    first = padded(size, divisor if divisor <= _LARGEST_DIVISOR else size_divisor(student))
    stated = [*_stated_sizes(student), *([] if teacher_size else _stated_sizes(teacher))]
    found = first
    if any(other != first for other in stated):  # else there is nothing to choose from, and nothing to try
        found = next((size for size in dict.fromkeys([first, *stated])
                      if _runs(student, size) and _runs(teacher, teacher_size or size)), first)
    if found != first:
        print_log(f'The models do not both run on an image of {_text(first)}, but do on one of {_text(found)}: the '
                  'losses are tried at that size. If the images of training have another size, give the '
                  "teacher's as teacher_input_size.", logger='current', level=logging.WARNING)
    student.__dict__['dummy_size'] = found
    teacher.__dict__['dummy_size'] = teacher_size or found


def _text(size: Size) -> str:
    return ' x '.join(map(str, size))


def _stated_sizes(model: nn.Module) -> Iterator[Size]:
    """Yields the sizes, in pixels, that the modules of the backbone state as theirs; outer modules first."""
    for module in getattr(model, 'backbone', nn.Identity()).modules():
        for name in _STATED:
            size = getattr(module, name, None)
            size = (size, size) if isinstance(size, int) else size
            if isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(x, int) and x > 0 for x in size):
                yield tuple(size)


def _runs(model: nn.Module, size: Size) -> bool:
    """Whether the backbone takes an image of this size."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        model.backbone(dummy_inputs(model, size)[0])
    except Exception:  # whatever a model answers to an image that it cannot take
        return False
    finally:
        for module, training in modes.items():
            module.training = training
    return True
