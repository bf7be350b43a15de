"""Initialises modules of the student from the teacher's weights."""
from collections.abc import Sequence

import torch
from mmengine.logging import print_log
from torch import nn

from ...utils import closest


def num_classes(model: nn.Module, within: str = '') -> list[int]:
    """Returns the numbers of classes of the heads of ``model``. Region proposal networks are left out.

    ``within`` restricts the search to the module of that name and its submodules.
    """
    return sorted({module.num_classes for name, module in model.named_modules()
                   if 'head' in name and 'rpn' not in name and f'{name}.'.startswith(f'{within}.' if within else '')
                   and isinstance(getattr(module, 'num_classes', None), int)})


def check_inherit(inherit: Sequence[str], student: nn.Module, teacher: nn.Module) -> list[str]:
    """Checks ``inherit`` and returns it as a list.

    Raises:
        ValueError: a name is not a module of both networks, no weight of it fits, or it is a head with another number
            of classes.
    """
    if isinstance(inherit, str) or not isinstance(inherit, Sequence) or not all(isinstance(x, str) for x in inherit):
        raise ValueError(f'inherit must be a list of names such as ["neck", "bbox_head"], got {inherit!r}')
    for name in inherit:
        for whose, model in (('student', student), ('teacher', teacher)):
            modules = dict(model.named_modules())
            if not name or name not in modules:
                raise ValueError(f'inherit: the {whose}, {type(model).__name__}, has no module {name!r}; '
                                 f'{closest(name, filter(None, modules))}')
        s_module, t_module = student.get_submodule(name), teacher.get_submodule(name)
        s_classes, t_classes = num_classes(student, name), num_classes(teacher, name)
        if s_classes != t_classes:
            raise ValueError(f'inherit: {name!r} has num_classes {s_classes} in the student and {t_classes} '
                             'in the teacher')
        if not _fitting(s_module, t_module)[0]:
            raise ValueError(f'inherit: no weight of {name!r} has the same name and shape in student and teacher')
    return list(inherit)


@torch.no_grad()
def inherit_modules(inherit: list[str], student: nn.Module, teacher: nn.Module) -> None:
    """Copies the weights that fit, and logs which were inherited and which were not."""
    for name in inherit:
        s_module, t_module = student.get_submodule(name), teacher.get_submodule(name)
        fitting, others = _fitting(s_module, t_module)
        for key in fitting:
            s_module.state_dict()[key].copy_(t_module.state_dict()[key])
        message = f'inherit: {len(fitting)} of {len(fitting) + len(others)} weights of {name!r} come from the teacher'
        print_log(f'{message}; not found in the teacher with the same name and shape: {", ".join(others)}'
                  if others else f'{message}.', logger='current')


def _fitting(s_module: nn.Module, t_module: nn.Module) -> tuple[list[str], list[str]]:
    """Returns the names of the student's weights that the teacher has in the same shape, and the other names."""
    s_state, t_state = ({key: value for key, value in module.state_dict().items() if 'num_batches_tracked' not in key}
                        for module in (s_module, t_module))
    fitting = [key for key, value in s_state.items() if key in t_state and t_state[key].shape == value.shape]
    return fitting, [key for key in s_state if key not in fitting]
