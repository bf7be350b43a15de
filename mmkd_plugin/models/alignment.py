"""Bringing maps of student and teacher to the same size.

Maps of equal stride differ in size if the networks pad differently: in their preprocessors (to multiples of 32, or
not), or by rounding (a ResNet rounds up, a ConvNeXt down). Their upper left cells still cover the same pixels.
Therefore the larger map is cropped at the bottom and the right; interpolation would shift every cell. Only maps of
different strides are interpolated.

Letters: N images, C channels of the student, D of the teacher, H x W cells.
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from mmrazor.models.distillers import ConfigurableDistiller
from mmrazor.models.task_modules import ParameterRecorder
from mmrazor.models.task_modules.recorder.base_recorder import BaseRecorder
from torch import Tensor

from .origin import derive

Ratio = tuple[float, float]  # teacher's stride over student's, vertically and horizontally


def crop_to_common(s_map: Tensor, t_map: Tensor) -> tuple[Tensor, Tensor]:
    """Crops maps of equal stride, (N, C, H, W) and (N, D, H', W'), at the bottom and the right to the smaller size."""
    size = tuple(min(lengths) for lengths in zip(s_map.shape[2:], t_map.shape[2:]))
    return tuple(x if x.shape[2:] == size else derive(x, lambda x: x[:, :, :size[0], :size[1]].contiguous())
                 for x in (s_map, t_map))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolates a map (N, C, H, W) to ``size`` (h, w), bilinearly, with antialiasing if the size shrinks."""
    if x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x.float(), tuple(size), mode='bilinear', antialias=True).to(x.dtype)


def stride_ratio(s_cells: int, t_cells: int, s_pixels: int, t_pixels: int) -> float:
    """Returns the ratio of the teacher's to the student's stride along one axis, from the lengths of maps and images.

    The ratio is 1 if both lengths fit the same power of two, with one network rounding up and the other down.
    """
    if s_pixels * t_cells == t_pixels * s_cells:
        return 1.
    least = max(s_pixels / (s_cells + 1), t_pixels / (t_cells + 1))
    most = min(s_pixels / max(s_cells - 1, 1e-6), t_pixels / max(t_cells - 1, 1e-6))
    stride = 2.**(math.floor(math.log2(least)) + 1)  # the first power of two above the lower bound
    return 1. if stride < most else (t_pixels / t_cells) / (s_pixels / s_cells)


class Place(NamedTuple):
    """The place of a map in a recorder: the call of the recorder's source, then indices into the call's output."""
    recorder: BaseRecorder
    path: tuple[int, ...]

    def get(self) -> Tensor:
        value = self.recorder.data_buffer
        for index in self.path:
            value = value[index]
        return value

    def put(self, value: Tensor) -> None:
        self.recorder.data_buffer[:] = _replaced(self.recorder.data_buffer, self.path, value)


def _replaced(values: Sequence, path: Sequence[int], value: Tensor) -> Sequence:
    items = list(values)
    items[path[0]] = _replaced(items[path[0]], path[1:], value) if len(path) > 1 else value
    return type(values)(items)


class Alignment:
    """Aligns the recorded maps that losses compare, in the recorders.

    Args:
        pairs: by (place in the student, place in the teacher), the ratio by which the teacher's map is enlarged before
            the larger map is cropped; (1, 1) means cropping alone. With None, the teacher's map is interpolated to the
            size of the student's, for a teacher that gets the whole batch resized.
    """

    def __init__(self, pairs: Mapping[tuple[Place, Place], Ratio | None]) -> None:
        self.pairs = dict(pairs)

    def __call__(self) -> None:
        if all(ratio == (1., 1.) and student.get().shape[2:] == teacher.get().shape[2:]
               for (student, teacher), ratio in self.pairs.items()):
            return
        for teacher, ratio in {teacher: ratio for (_, teacher), ratio in self.pairs.items() if ratio}.items():
            t_map = teacher.get()
            teacher.put(resize(t_map, [max(round(cells * r), 1) for cells, r in zip(t_map.shape[2:], ratio)]))
        changed = True
        while changed:  # a map may be in several pairs
            changed = False
            for (student, teacher), ratio in self.pairs.items():
                s_map, t_map = student.get(), teacher.get()
                if s_map.shape[2:] != t_map.shape[2:]:
                    s_map, t_map = (s_map, resize(t_map, s_map.shape[2:])) if ratio is None else crop_to_common(
                        s_map, t_map)
                    student.put(s_map)
                    teacher.put(t_map)
                    changed = True


def compared_maps(distiller: ConfigurableDistiller) -> list[tuple[Place, Place]]:
    """Returns the pairs of maps (student, teacher) that the losses of ``distiller`` compare.

    These are the maps of the ``layers`` of a :class:`.FeatureDistiller`, and the maps of each loss that reads one map,
    or one sequence of maps, from each network. The recorders must be filled.
    """
    entries = [([distiller.place(layer, level, True)], [distiller.place(layer, level, False)])
               for layer in getattr(distiller, 'layers', ()) for level in range(len(distiller.maps(layer, True)))]
    for inputs in distiller.loss_forward_mappings.values():
        entries.append(tuple([entry for entry in inputs.values() if entry['from_student'] is side]
                             for side in (True, False)))
    found = {}
    for sides in entries:
        groups = [list(dict.fromkeys(filter(None, (_places(distiller, entry, side) for entry in group))))
                  for group, side in zip(sides, (True, False))]
        if [len(group) for group in groups] == [1, 1] and len(groups[0][0]) == len(groups[1][0]):
            found.update(dict.fromkeys(zip(groups[0][0], groups[1][0])))
    return list(found)


def _places(distiller: ConfigurableDistiller, entry: dict, from_student: bool) -> tuple[Place, ...]:
    """Returns the places of the maps (N, C, H, W) that an entry of ``loss_forward_mappings`` reads, if any."""
    recorder = (distiller.student_recorders if from_student else distiller.teacher_recorders).get_recorder(
        entry['recorder'])
    path = (entry.get('record_idx', 0), *([] if entry.get('data_idx') is None else [entry['data_idx']]))
    if isinstance(recorder, ParameterRecorder) or len(recorder.data_buffer) <= path[0]:
        return ()
    value: Any = recorder.data_buffer
    for index in path:
        if not isinstance(value, (list, tuple)) or len(value) <= index:
            return ()
        value = value[index]
    if isinstance(value, (list, tuple)):
        places, maps = [Place(recorder, (*path, level)) for level in range(len(value))], value
    else:
        places, maps = [Place(recorder, path)], [value]
    return tuple(places) if all(isinstance(x, Tensor) and x.dim() == 4 for x in maps) else ()
