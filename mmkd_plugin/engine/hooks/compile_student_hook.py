"""Compiles the student without losing what is recorded in it."""
from collections.abc import Iterator

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmrazor.models.algorithms.base import BaseAlgorithm
from torch import nn

from ...registry import HOOKS


@HOOKS.register_module()
class CompileStudentHook(Hook):
    """Compiles the largest parts of the student that have no recorder within, by ``torch.compile``.

    MMEngine's ``compile=True`` compiles the whole training step. There recorders, which are hooks of modules, may be
    skipped, and MMDetection's losses, whose shapes vary, may fail (both seen with torch 2.1). Here what is recorded
    is what a compiled part puts out. Losses and teacher are not compiled, and checkpoints stay as they are.

    Args:
        backend: as in ``torch.compile``.

    Raises:
        ValueError: before training: the model has no student.
    """

    def __init__(self, backend: str = 'inductor') -> None:
        self.backend = backend

    def before_train(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not hasattr(model, 'student'):
            raise ValueError(f'CompileStudentHook: {type(model).__name__} has no student; for a plain model set '
                             'compile=True in the config')
        runner.logger.info(f'Compiled parts of the student: {", ".join(compile_student(model, self.backend))}')


def compile_student(model: BaseAlgorithm, backend: str = 'inductor') -> list[str]:
    """Compiles what :class:`CompileStudentHook` does, and returns the names of the parts."""
    distillers = model.distiller.values() if isinstance(model.distiller, nn.ModuleDict) else [model.distiller]
    recorded = {recorder.source for distiller in distillers
                for recorder in distiller.student_recorders.recorders.values()}
    parts = dict(_parts(model.student, recorded))
    for part in parts.values():
        part.forward = torch.compile(part.forward, backend=backend)
    return list(parts)


def _parts(module: nn.Module, recorded: set[str], prefix: str = '') -> Iterator[tuple[str, nn.Module]]:
    """Yields the largest modules with parameters within which nothing is recorded."""
    for name, child in module.named_children():
        path = prefix + name
        if any(source.startswith(f'{path}.') for source in recorded):
            yield from _parts(child, recorded, f'{path}.')
        elif any(True for _ in child.parameters()) and type(child).forward is not nn.Module.forward:
            yield path, child
