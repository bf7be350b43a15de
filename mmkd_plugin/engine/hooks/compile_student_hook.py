"""Hook that compiles the student with ``torch.compile`` and keeps its recorders working."""
from collections.abc import Iterator

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmrazor.models.algorithms.base import BaseAlgorithm
from torch import nn

from ...registry import HOOKS
from ...utils import unwrapped


@HOOKS.register_module()
class CompileStudentHook(Hook):
    """Compiles the largest parts of the student without a recorder inside, using ``torch.compile``.

    MMEngine's ``compile=True`` compiles the whole training step. That may skip recorders, which are module hooks, and
    MMDetection's losses may fail, because their shapes vary (both seen with torch 2.1). With this hook, recorders read
    the outputs of compiled parts. Losses and teacher are not compiled, and checkpoints do not change.

    Args:
        backend: as in ``torch.compile``.

    Raises:
        ValueError: the model has no student (raised before training).
    """

    def __init__(self, backend: str = 'inductor') -> None:
        self.backend = backend

    def before_train(self, runner: Runner) -> None:
        model = unwrapped(runner.model)
        if not hasattr(model, 'student'):
            raise ValueError(f'CompileStudentHook: {type(model).__name__} has no student. For a plain model, set '
                             'compile=True in the config')
        runner.logger.info(f'Compiled parts of the student: {", ".join(compile_student(model, self.backend))}')


def compile_student(model: BaseAlgorithm, backend: str = 'inductor') -> list[str]:
    """Compiles the parts that :class:`CompileStudentHook` compiles, and returns their names."""
    distillers = model.distiller.values() if isinstance(model.distiller, nn.ModuleDict) else [model.distiller]
    recorded = {recorder.source for distiller in distillers
                for recorder in distiller.student_recorders.recorders.values()}
    parts = dict(_parts(model.student, recorded))
    for part in parts.values():
        part.forward = torch.compile(part.forward, backend=backend)
    return list(parts)


def _parts(module: nn.Module, recorded: set[str], prefix: str = '') -> Iterator[tuple[str, nn.Module]]:
    """Yields the largest modules that have parameters and no recorder inside."""
    for name, child in module.named_children():
        path = prefix + name
        if any(source.startswith(f'{path}.') for source in recorded):
            yield from _parts(child, recorded, f'{path}.')
        elif any(True for _ in child.parameters()) and type(child).forward is not nn.Module.forward:
            yield path, child
