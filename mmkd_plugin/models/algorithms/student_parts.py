"""Access to the student's attributes for hooks that are written for the plain model."""
from typing import Any

from torch import nn


class StudentParts(nn.Module):
    """A module that has the attributes of ``student`` in addition to its own.

    Hooks of a student's config are written for the plain model: MMDetection's ``YOLOXModeSwitchHook`` sets
    ``model.bbox_head.use_l1``, MMPretrain's ``SwitchRecipeHook`` looks for ``model.head.loss_module``, and MMEngine's
    ``activation_checkpointing`` uses ``backbone.layer1``. Here ``model.bbox_head`` is that of the student. Setting an
    attribute that only the student has sets it in the student. Names that begin with an underscore, and
    ``state_dict``, ``named_parameters`` and ``named_modules``, are the module's own.
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
