"""Dummy inputs of zeros to try a model when it is built: their channels, size and data samples."""
import logging
import math
from collections.abc import Iterator, Sequence

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

Size = tuple[int, int]  # height and width

_STATED = ('img_size', 'input_size', 'init_input_size', 'pretrain_img_size')  # attributes with a size in pixels
_LARGEST_DIVISOR = 256


def check_size(field: str, size: int | Sequence[int]) -> Size:
    """Returns ``size`` as (height, width), else raises ``ValueError``."""
    pair = (size, size) if isinstance(size, int) and not isinstance(size, bool) else size
    if not (isinstance(pair, (list, tuple)) and len(pair) == 2
            and all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in pair)):
        raise ValueError(f'{field}: not a size in pixels, got {size!r}, expected (height, width) as two positive '
                         'whole numbers')
    return tuple(pair)


def input_channels(model: nn.Module) -> int:
    """Returns the number of channels of the images of ``model``.

    It is the number of means in the preprocessor if there are several, else the input channels of the first
    convolution. The first convolution after the ``Focus`` of YOLOX has four times as many, because ``Focus`` moves
    blocks of 2 x 2 pixels into channels.
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
    """Returns the size of the model's dummy inputs, set by :func:`set_dummy_sizes`, by default 224 x 224."""
    return model.__dict__.get('dummy_size') or (224, 224)


def dummy_inputs(model: nn.Module, size: Size | None = None) -> tuple[Tensor, list | None]:
    """Returns a batch of one image of zeros on the model's device, and its data samples (None for a classifier).

    Args:
        model: a model of MMDetection or MMPretrain.
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
    """Returns the number that the model's preprocessor pads height and width to multiples of."""
    divisor = getattr(getattr(model, 'data_preprocessor', None), 'pad_size_divisor', 1)
    return divisor if isinstance(divisor, int) and divisor >= 1 else 1


def padded(size: Size, divisor: int) -> Size:
    """Returns ``size`` rounded up to multiples of ``divisor``."""
    return tuple(math.ceil(length / divisor) * divisor for length in size)


@torch.no_grad()
def set_dummy_sizes(student: nn.Module, teacher: nn.Module, input_size: Size | None, teacher_size: Size | None) -> None:
    """Sets the size of the dummy inputs of both models, so that maps of equal stride have equal sizes.

    The size is ``input_size``, by default 256 x 256 for detectors and 224 x 224 for others, padded as in both
    preprocessors. If a model does not run at this size but has a fixed size, both models use the fixed size.

    Args:
        student, teacher: the models; each gets an attribute ``dummy_size``.
        input_size: size of the student's images, if the data pipeline fixes it.
        teacher_size: size of the teacher's images, if it gets the batch resized.
    """
    from mmdet.models.detectors import BaseDetector
    size = input_size or ((256, 256) if isinstance(student, BaseDetector) else (224, 224))
    divisor = math.lcm(size_divisor(student), size_divisor(teacher))
    first = padded(size, divisor if divisor <= _LARGEST_DIVISOR else size_divisor(student))
    stated = [*_stated_sizes(student), *([] if teacher_size else _stated_sizes(teacher))]
    found = first
    if any(other != first for other in stated):  # otherwise there is no other size to try
        found = next((size for size in dict.fromkeys([first, *stated])
                      if _runs(student, size) and _runs(teacher, teacher_size or size)), first)
    if found != first:
        print_log(f'The models do not both run on an image of {_text(first)}, but they do on one of {_text(found)}. '
                  'The losses are tried at that size. If the training images have another size, set '
                  "teacher_input_size to the teacher's size.", logger='current', level=logging.WARNING)
    student.__dict__['dummy_size'] = found
    teacher.__dict__['dummy_size'] = teacher_size or found


def _text(size: Size) -> str:
    return ' x '.join(map(str, size))


def _stated_sizes(model: nn.Module) -> Iterator[Size]:
    """Yields the fixed sizes, in pixels, of modules of the backbone, outer modules first."""
    for module in getattr(model, 'backbone', nn.Identity()).modules():
        for name in _STATED:
            size = getattr(module, name, None)
            size = (size, size) if isinstance(size, int) else size
            if isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(x, int) and x > 0 for x in size):
                yield tuple(size)


def _runs(model: nn.Module, size: Size) -> bool:
    """Whether the backbone runs on an image of this size."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        model.backbone(dummy_inputs(model, size)[0])
    except Exception:  # models raise many types for an image of the wrong size
        return False
    finally:
        for module, training in modes.items():
            module.training = training
    return True
