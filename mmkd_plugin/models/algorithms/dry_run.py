"""Tries every distillation loss on one blank image, when the model is built."""
import logging

import torch
from mmengine.logging import print_log
from mmrazor.models.distillers import ConfigurableDistiller
from torch import Tensor, nn

from ..recording import record_blank_image
from .inherit import num_classes


@torch.no_grad()
def dry_run(distiller: ConfigurableDistiller, student: nn.Module, teacher: nn.Module) -> dict[str, int]:
    """Returns how many calls of each recorded layer of the teacher are read.

    Losses that read what is recorded in the loss only (functions, methods), or something other than
    tensors (data samples), are not tried: they would need ground truth.

    Raises:
        ValueError: a layer does not run, strides differ, a loss or connector
            cannot take what is recorded for it, or logits are of different classes.
    """
    mappings = distiller.loss_forward_mappings
    calls: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for record in (record for inputs in mappings.values() for record in inputs.values()):
        counts, name = calls[record['from_student']], record['recorder']
        counts[name] = max(counts.get(name, 1), record.get('record_idx', 0) + 1)
    record_blank_image(student, distiller.student_recorders, calls[True])
    record_blank_image(teacher, distiller.teacher_recorders, calls[False])
    _check_classes(distiller, student, teacher)
    training = distiller.training
    distiller.eval()  # running statistics of connectors are not for blank images
    for loss, inputs in mappings.items():
        if all(_is_recorded(distiller, record) for record in inputs.values()):
            _check_strides(distiller, loss, inputs)
            _try_loss(distiller, loss, inputs)
    distiller.train(training)
    return calls[False]


def _recorder(distiller: ConfigurableDistiller, record: dict):
    recorders = distiller.student_recorders if record['from_student'] else distiller.teacher_recorders
    return recorders.get_recorder(record['recorder'])


def _is_recorded(distiller: ConfigurableDistiller, record: dict) -> bool:
    if len(_recorder(distiller, record).data_buffer) <= record.get('record_idx', 0):
        return False
    value = _raw(distiller, record)
    return isinstance(value, Tensor) or isinstance(value, (list, tuple)) and bool(value) and all(
        isinstance(part, Tensor) for part in value)


def _raw(distiller: ConfigurableDistiller, record: dict):
    """Returns what is recorded, before any connector."""
    return distiller.get_record(**{key: value for key, value in record.items() if 'connector' not in key})


def _check_strides(distiller: ConfigurableDistiller, loss: str, inputs: dict[str, dict]) -> None:
    sizes = {True: [], False: []}
    for record in inputs.values():
        value = _raw(distiller, record)
        if isinstance(value, Tensor) and value.dim() == 4 and 'connector' not in record:
            sizes[record['from_student']].append(tuple(value.shape[2:]))
    if len(sizes[True]) == len(sizes[False]) == 1 and sizes[True] != sizes[False]:
        raise ValueError(f'{loss}: the strides differ: an image of 224 x 224 gives maps of {sizes[True][0]} in the '
                         f'student and {sizes[False][0]} in the teacher; choose layers of equal stride')


def _try_loss(distiller: ConfigurableDistiller, loss: str, inputs: dict[str, dict]) -> None:
    try:
        arguments = {name: distiller.get_record(**record) for name, record in inputs.items()}
        distiller.distill_losses[loss](**arguments)
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError, AttributeError) as error:
        raw = {name: _raw(distiller, record) for name, record in inputs.items()}
        given = ', '.join(f'{name} from {inputs[name]["recorder"]!r} '
                          f'{tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}'
                          for name, value in raw.items())
        raise ValueError(f'{loss} or its connectors cannot take what is recorded for it ({given}): {error}') from error


def _check_classes(distiller: ConfigurableDistiller, student: nn.Module, teacher: nn.Module) -> None:
    s_classes, t_classes = num_classes(student), num_classes(teacher)
    if s_classes == t_classes:
        return
    message = f'the student tells {s_classes} classes apart, the teacher {t_classes}'
    unseen = []
    for loss, inputs in distiller.loss_forward_mappings.items():
        seen = {record['from_student'] for record in inputs.values() if _is_recorded(distiller, record)}
        if seen != {record['from_student'] for record in inputs.values()}:
            unseen.append(loss)
        shapes = {record['from_student']: _raw(distiller, record).shape for record in inputs.values()
                  if 'head' in _recorder(distiller, record).source and _is_recorded(distiller, record)
                  and isinstance(_raw(distiller, record), Tensor)}
        if len(shapes) == 2 and shapes[True][1:2] != shapes[False][1:2]:  # logits, not features inside a head
            raise ValueError(f'{loss} compares outputs of heads, {tuple(shapes[True])} and {tuple(shapes[False])}, but '
                             f'{message}')
    what = (f'only training shows whether these compare classes: {", ".join(unseen)}' if unseen else
            'only features are distilled')
    print_log(f'num_classes: {message}; {what}.', logger='current', level=logging.WARNING)
