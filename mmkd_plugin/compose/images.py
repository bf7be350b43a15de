"""Synthetic images and annotations in the size and format of a config's pipeline."""
from collections.abc import Iterator

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import nn

from ..models.algorithms.inherit import num_classes
from ..models.dummy_input import input_channels

DETECTOR_IMAGE = 256  # side in pixels; the deepest level of a pyramid, with stride 128, has more than one cell
CLASSIFIER_IMAGE = 224  # if the pipeline has no size


def image_sides(cfg: Config, is_detector: bool) -> list[int]:
    """Returns sides of square images to try a model on, the cheapest first."""
    found = [side for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader')
             for side in _sides((cfg.get(loader) or {}).get('dataset') or {})]
    divisor = (cfg.model.get('data_preprocessor') or {}).get('pad_size_divisor') or 1
    sides = [-(-side // divisor) * divisor for side in found[:1]]
    if not is_detector:
        return sides or [CLASSIFIER_IMAGE]
    return [DETECTOR_IMAGE, *(side for side in sides if side != DETECTOR_IMAGE)]


def _sides(dataset: dict) -> Iterator[int]:
    """Yields the last side in the pipeline of a data set, and of each data set that it wraps."""
    steps = [step for step in dataset.get('pipeline') or [] if isinstance(step, dict)]
    stated = [value for step in steps for value in (
        next((step[key] for key in ('crop_size', 'scale', 'img_scale', 'size') if step.get(key)), None), ) if value]
    for value in reversed(stated):
        value = value[-1] if isinstance(value, list) and isinstance(value[-1], (list, tuple)) else value
        numbers = value if isinstance(value, (list, tuple)) else [value]
        whole = [int(number) for number in numbers if isinstance(number, (int, float)) and number >= 1]
        if whole:
            yield min(whole)
            break
    inner = dataset.get('dataset') or dataset.get('datasets') or []
    for each in inner if isinstance(inner, (list, tuple)) else [inner]:
        if isinstance(each, dict):
            yield from _sides(each)


def synthetic_batch(model: BaseModel, cfg: Config, side: int, samples: int = 2) -> dict:
    """Returns a batch of random images in the format of a data loader."""
    from mmdet.models.detectors import BaseDetector
    channels = input_channels(model)
    if not isinstance(model, BaseDetector):
        return dict(inputs=torch.randint(0, 256, (samples, channels, side, side), dtype=torch.uint8),
                    data_samples=synthetic_samples(model, samples))
    from mmdet.testing import demo_mm_inputs, demo_mm_proposals
    classes = min(num_classes(model), default=1)  # separate heads may count things and stuff
    batch = demo_mm_inputs(
        samples, [(channels, side, side)] * samples, num_items=[2] * samples, num_classes=max(classes, 2),
        with_mask=_loads(cfg.train_dataloader, 'with_mask'), with_semantic=_loads(cfg.train_dataloader, 'with_seg'))
    proposals = demo_mm_proposals([(channels, side, side)] * samples, 50)
    for sample, proposed in zip(batch['data_samples'], proposals):
        sample.gt_instances.labels.clamp_(max=classes - 1)
        if not hasattr(model, 'rpn_head'):  # Fast R-CNN reads the proposals of its data set
            sample.proposals = proposed
    return batch


def synthetic_samples(model: BaseModel, samples: int) -> list:
    """Returns labels for a classifier, one per task if it has several."""
    return [_sample(model.head, i) for i in range(samples)]


def _sample(head: nn.Module, index: int):
    from mmpretrain.models.heads import MultiTaskHead
    from mmpretrain.structures import DataSample, MultiTaskDataSample
    if isinstance(head, MultiTaskHead):
        sample = MultiTaskDataSample()
        for name, task in head.task_heads.items():
            sample.set_field(_sample(task, index), name)
        return sample
    return DataSample().set_gt_label(index % min(num_classes(nn.ModuleDict(dict(head=head))), default=1))


def _loads(node: dict | list, flag: str) -> bool:
    """Whether a data pipeline within ``node`` loads such annotations."""
    if isinstance(node, dict) and str(node.get('type')).endswith('Annotations'):
        return node.get(flag, 'Panoptic' in str(node.type))
    return any(_loads(child, flag) for child in (node.values() if isinstance(node, dict) else node)
               if isinstance(child, (dict, list)))
