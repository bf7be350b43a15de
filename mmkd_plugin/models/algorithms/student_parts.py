"""Lets a distillation pass for its student, towards hooks that reach into the plain model."""
from typing import Any

from torch import nn


class StudentParts(nn.Module):
    """A module that has, besides its own attributes, those of ``student``.

    Hooks of a student's config are written for the plain model: MMDetection's ``YOLOXModeSwitchHook`` sets
    ``model.bbox_head.use_l1``, MMPretrain's ``SwitchRecipeHook`` looks for ``model.head.loss_module``, MMEngine's
    ``activation_checkpointing`` names ``backbone.layer1``. Here ``model.bbox_head`` is that of the student, and to
    set an attribute that only the student has sets the student's. What begins with an underscore, and all that
    concerns names (``state_dict``, ``named_parameters``, ``named_modules``), is the module's own.
    """

    @property
    def _student(self) -> nn.Module | None:
        return self.__dict__.get('_modules', {}).get('architecture')

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            student = self._student
            if student is None or name.startswith('_') or not hasattr(student, name):
                raise AttributeError(f'{error}, nor has its student, {type(student).__name__}') from None
            return getattr(student, name)

    def __setattr__(self, name: str, value: Any) -> None:
        student = self._student if self.__dict__.get('_passes_for_student') else None
        if student is None or name.startswith('_') or self._has(name) or not hasattr(student, name):
            super().__setattr__(name, value)
        else:
            setattr(student, name, value)

    def _has(self, name: str) -> bool:
        return name in self.__dict__ or hasattr(type(self), name) or any(
            name in self.__dict__[kind] for kind in ('_parameters', '_buffers', '_modules'))
