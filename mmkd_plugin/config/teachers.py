"""The fields of a config for one teacher, or for several teachers by name."""
from collections.abc import Iterator
from typing import Any, NamedTuple

from mmengine.model import BaseModel
from torch import nn

from ..utils import check_dict, closest

_SHARED = ('teacher_precision', 'teacher_input_size')  # a value that is not a dict applies to all teachers


class TeacherFields(NamedTuple):
    """The arguments of :class:`.TeacherStudentDistill` for one teacher."""
    teacher: dict | BaseModel
    distiller: dict
    teacher_ckpt: str | None = None
    inherit: Any = ()
    teacher_precision: str = 'auto'
    teacher_input_size: Any = None


def names_of(teacher: Any) -> list[str]:
    """Returns the names of the teachers in ``model.teacher``; [''] if it is one, with ``type`` or ``cfg_path``."""
    several = isinstance(teacher, dict) and not {'type', 'cfg_path'} & set(teacher) and all(
        isinstance(each, (dict, BaseModel)) for each in teacher.values())
    return list(teacher) if several and teacher else ['']


def teachers_in(model: dict) -> Iterator[tuple[str, Any, str | None]]:
    """Yields for each teacher in a config the end of its fields ('' or '.NAME'), its config and its weights."""
    teacher, weights = model.get('teacher'), model.get('teacher_ckpt')
    for name in names_of(teacher):
        if name:
            yield f'.{name}', teacher[name], weights.get(name) if isinstance(weights, dict) else None
        elif teacher is not None or isinstance(weights, str):
            yield '', teacher, weights if isinstance(weights, str) else None


def split_by_teacher(fields: TeacherFields) -> dict[str, TeacherFields]:
    """Returns the fields of each teacher by name; the name of a single teacher is ''.

    Raises:
        ValueError: a name is not valid, or the fields have different names.
    """
    names = names_of(fields.teacher)
    if names == ['']:
        for field in ('teacher_ckpt', 'inherit', *_SHARED):
            if isinstance(getattr(fields, field), dict):
                raise ValueError(f'{field}: is a dict by teacher, got {list(getattr(fields, field))}, but teacher is a '
                                 'single one. Give teacher as a dict with the same names')
        return {'': fields}
    for name in names:
        if not (isinstance(name, str) and name.isidentifier()) or hasattr(nn.ModuleDict, name):
            raise ValueError(f'teacher: {name!r} cannot be the name of a teacher. Use another name, of letters, digits '
                             'and "_". A single teacher needs type or cfg_path')
    given = {field: value for field, value in fields._asdict().items() if value or field == 'distiller'}
    shared = {field: given.pop(field) for field in _SHARED if not isinstance(given.get(field, {}), dict)}
    for field, value in given.items():
        _check_names(field, value, names)
    return {name: TeacherFields(**{field: value[name] for field, value in given.items() if name in value}, **shared)
            for name in names}


def _check_names(field: str, value: Any, names: list[str]) -> None:
    is_one = not isinstance(value, dict) or 'type' in value
    if is_one:
        raise ValueError(f'{field} must be a dict by the names of the teachers, {", ".join(names)}, because teacher '
                         f'has several, got {value!r}. A single teacher needs type or cfg_path')
    for name in check_dict(field, value):
        if name not in names:
            raise ValueError(f'{field}: no teacher is named {name!r}; {closest(name, names)}')
    missing = [name for name in names if name not in value]
    if field == 'distiller' and missing:
        raise ValueError(f'distiller: none for {", ".join(missing)}, expected one for each teacher: '
                         f'{", ".join(names)}')
