"""The size of the training images, if the data pipeline fixes it."""
from mmengine.config import Config

from .datasets import pipeline_of

_VARIES = ('ResizeEdge', 'RandomResize', 'RandomChoiceResize', 'ResizeShortestEdge', 'Mosaic', 'RandomAffine')
_FIXES = {'RandomResizedCrop': 'scale', 'EfficientNetRandomCrop': 'scale', 'CenterCrop': 'crop_size',
          'EfficientNetCenterCrop': 'crop_size', 'Resize': 'scale', 'Pad': 'size'}


def fixed_input_size(cfg: Config) -> tuple[int, int] | None:
    """Returns height and width of the images of the training pipeline of ``cfg``, or None if they vary.

    The last transform that sets a size counts. A resize that keeps the aspect ratio does not fix the size. Neither does
    a random crop of MMDetection, because its images may be smaller.
    """
    found = None
    for transform in pipeline_of((cfg.get('train_dataloader') or {}).get('dataset')):
        scope, _, kind = str(transform.get('type')).rpartition('.')
        if kind in _VARIES or kind == 'Resize' and transform.get('keep_ratio'):
            found = None
        elif kind == 'RandomCrop':
            found = _size(transform.get('crop_size'), height_first=True) if (
                scope or cfg.get('default_scope')) == 'mmpretrain' else None
        elif kind in _FIXES and transform.get(_FIXES[kind]):
            found = _size(transform[_FIXES[kind]], height_first=kind == 'RandomResizedCrop')
    return found


def _size(scale: int | tuple[int, int], height_first: bool = False) -> tuple[int, int] | None:
    """Converts a size or the side in a pipeline to (height, width).

    Sizes are (width, height) in MMCV and, as ``height_first``, (height, width) in MMPretrain's random crops.
    """
    if isinstance(scale, (list, tuple)):
        if len(scale) != 2 or not all(isinstance(x, int) for x in scale):
            return None
        return tuple(scale) if height_first else (scale[1], scale[0])
    return (scale, scale) if isinstance(scale, int) else None
