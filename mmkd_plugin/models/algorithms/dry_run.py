"""Tries every distillation loss on dummy inputs, when the model is built."""
import logging
from collections.abc import Callable

import torch
from mmengine.logging import print_log
from mmrazor.models.distillers import ConfigurableDistiller
from torch import Tensor, nn

from ...utils import in_words
from ..alignment import Alignment, compared_maps, stride_ratio
from ..dummy_input import dummy_inputs, dummy_size, padded, size_divisor
from ..recording import PartialForward, change_records, evaluating, record_dummy_input
from .inherit import num_classes

_ODD = (150, 101)  # not a multiple of any stride, so networks round differently


@torch.no_grad()
def dry_run(distiller: ConfigurableDistiller, student: nn.Module, teacher: nn.Module,
            resized: bool) -> tuple[dict[str, int], Alignment]:
    """Returns how many calls of each recorded teacher layer the losses read, and the alignment of the maps.

    A loss is not tried if it reads records of the task loss (functions, methods) or records that are not tensors (data
    samples), because these need ground truth.

    Args:
        resized: whether the teacher gets a resized batch. If so, its maps are interpolated.

    Raises:
        ValueError: a layer does not run, strides differ, a loss or connector does not accept its records, or the
            numbers of classes of the logits differ.
    """
    calls = read_calls(distiller, False)
    record_dummy_input(student, distiller.student_recorders, read_calls(distiller, True))
    record_dummy_input(teacher, distiller.teacher_recorders, calls)
    _check_classes(distiller, student, teacher)
    alignment = _alignment(distiller, student, teacher, resized)
    alignment()
    _try_losses(distiller)
    return calls, alignment


def read_calls(distiller: ConfigurableDistiller, from_student: bool) -> dict[str, int]:
    """Returns how many calls of a recorder's source the losses read, by the recorder's name."""
    counts: dict[str, int] = {}
    for record in (record for inputs in distiller.loss_forward_mappings.values() for record in inputs.values()):
        if record['from_student'] is from_student:
            counts[record['recorder']] = max(counts.get(record['recorder'], 1), record.get('record_idx', 0) + 1)
    return counts


def losses_without_labels(distiller: ConfigurableDistiller) -> list[str]:
    """Returns the losses whose inputs are all recorded on a dummy input. Run the dummy input first."""
    return [loss for loss, inputs in distiller.loss_forward_mappings.items()
            if all(_is_recorded(distiller, record) for record in inputs.values())]


@torch.no_grad()
def try_odd_size(distiller: ConfigurableDistiller, student: nn.Module, teacher: PartialForward,
                 teacher_batch: Callable[[Tensor, list | None], tuple[Tensor, list | None]],
                 alignment: Alignment) -> None:
    """Warns if the teacher or a loss fails on an image with odd sides, padded as the student pads it.

    Records of the task loss cannot be tried.

    Args:
        teacher: forward of the teacher.
        teacher_batch: converts a batch of the student to one of the teacher.
        alignment: result of :func:`dry_run`.
    """
    size = padded(_ODD, size_divisor(student))
    inputs, samples = dummy_inputs(student, size)
    forward = PartialForward(student, distiller.student_recorders, {})
    try:
        if 'loss' in (forward.mode, teacher.mode):
            return
        with evaluating(student):
            forward(inputs, samples)
    except Exception:  # the student does not accept such images, so there are none
        return
    finally:
        forward.remove()
    try:
        inputs, samples = teacher_batch(inputs, samples)
        teacher(inputs.to(next(teacher.model.parameters()).device), samples)
        for recorders in (distiller.student_recorders, distiller.teacher_recorders):
            change_records(recorders, Tensor.cpu)
        alignment()
        _try_losses(distiller)
    except Exception as error:  # models raise different errors for an image that they do not accept
        print_log(f'Distillation fails on an image of {size[0]} x {size[1]}, which the student accepts: '
                  f'{in_words(error)}. If all training images have one size, set input_size to it. If the teacher '
                  'needs another size, set teacher_input_size to that.', logger='current', level=logging.WARNING)


def _try_losses(distiller: ConfigurableDistiller) -> None:
    training = distiller.training
    distiller.eval()  # dummy inputs must not change the running statistics of connectors
    try:
        for loss in losses_without_labels(distiller):
            _try_loss(distiller, loss, distiller.loss_forward_mappings[loss])
    finally:
        distiller.train(training)


def _alignment(distiller: ConfigurableDistiller, student: nn.Module, teacher: nn.Module, resized: bool) -> Alignment:
    """Decides how each pair of maps is resized to one size.

    Maps of different strides are interpolated if the config has two different layers or a pair of equal names, or if
    the teacher gets a resized batch. A connector does its own resizing.
    """
    images = dummy_size(student), dummy_size(teacher)
    connected = {_recorder(distiller, record) for inputs in distiller.loss_forward_mappings.values()
                 for record in inputs.values() if 'connector' in record}
    pairs = {}
    for s_place, t_place in compared_maps(distiller):
        s_size, t_size = (tuple(place.get().shape[2:]) for place in (s_place, t_place))
        ratio = tuple(stride_ratio(*lengths) for lengths in zip(s_size, t_size, *images))
        s_layer, t_layer = s_place.recorder.source, t_place.recorder.source
        if resized:
            ratio = None
        elif ratio != (1., 1.):
            if {s_place.recorder, t_place.recorder} & connected:
                continue
            sizes = (f'an image of {images[0][0]} x {images[0][1]} gives maps of {s_size} in the student and {t_size} '
                     'in the teacher')
            if s_layer == t_layer and s_layer not in getattr(distiller, 'given_as_pairs', ()):
                raise ValueError(f'{s_layer}: the strides differ: {sizes}. Choose layers of equal stride, or give a '
                                 'pair (student\'s layer, teacher\'s layer), whose maps are interpolated')
            if any(t_place == other and ratios != ratio for (_, other), ratios in pairs.items()):
                raise ValueError(f'{t_layer}: the strides differ: it is compared with maps of several strides, got '
                                 f'{sizes}, expected one stride. Record the layer under a separate name for each')
            print_log(f'{s_layer} and {t_layer} have different strides ({sizes}): the teacher\'s map is interpolated '
                      'to the student\'s size.', logger='current', level=logging.WARNING)
        pairs[s_place, t_place] = ratio
    return Alignment(pairs)


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
    """Returns the record before any connector."""
    return distiller.get_record(**{key: value for key, value in record.items() if 'connector' not in key})


def _try_loss(distiller: ConfigurableDistiller, loss: str, inputs: dict[str, dict]) -> None:
    try:
        arguments = {name: distiller.get_record(**record) for name, record in inputs.items()}
        distiller.distill_losses[loss](**arguments)
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError, AttributeError) as error:
        raw = {name: _raw(distiller, record) for name, record in inputs.items()}
        given = ', '.join(f'{name} from {inputs[name]["recorder"]!r} '
                          f'{tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}'
                          for name, value in raw.items())
        raise ValueError(f'{loss} or its connectors do not accept the records ({given}): {error}') from error


def _check_classes(distiller: ConfigurableDistiller, student: nn.Module, teacher: nn.Module) -> None:
    s_classes, t_classes = num_classes(student), num_classes(teacher)
    if s_classes == t_classes:
        return
    message = f'the student has {s_classes} classes, the teacher {t_classes}'
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
    what = (f'these losses may compare classes, which only training shows: {", ".join(unseen)}' if unseen else
            'only features are distilled')
    print_log(f'num_classes: {message}; {what}.', logger='current', level=logging.WARNING)
