"""Initialisation of a model, with errors that name the field of a missing weights file."""
from typing import Any

from mmengine.model import BaseModule
from torch import nn

from .guard import data_only


def initialize(model: BaseModule, field: str, trust_checkpoint: bool = False) -> None:
    """Calls ``model.init_weights`` and reads weights files as data.

    Args:
        model: the model to initialise.
        field: the config field of the model, for error messages.
        trust_checkpoint: whether these files may run code, as in :func:`data_only`.

    Raises:
        ValueError: the model names a weights file that cannot be read. The message names the field.
    """
    with data_only(trust_checkpoint):
        try:
            model.init_weights()
        except Exception as error:  # loaders raise many types
            files = weights_files(model)
            if not files:
                raise
            guilty = {name: path for name, path in files.items() if path in str(error)} or files
            named = ', '.join(f'{field}.{name}={path!r}' for name, path in guilty.items())
            raise ValueError(f'{named}: cannot initialise {type(model).__name__} with it ({type(error).__name__}: '
                             f'{error}). Name an existing file, or remove the field') from error


def weights_files(model: nn.Module) -> dict[str, str]:
    """Returns the weights files that modules start from, by field, such as ``backbone.init_cfg``."""
    found = {}
    for name, module in model.named_modules():
        for field in ('init_cfg', 'pretrained'):
            path = _named_file(getattr(module, field, None), field)
            if path:
                found[f'{name}.{field}'.lstrip('.')] = path
    return found


def forget_weights_files(model: nn.Module) -> None:
    """Makes modules of ``model`` that would start from a file start from random weights."""
    for module in model.modules():
        for field in ('init_cfg', 'pretrained'):
            value = getattr(module, field, None)
            if _named_file(value, field):
                rest = [part for part in value if not _named_file(part, field)] if isinstance(value, list) else None
                setattr(module, field, rest or None)


def _named_file(value: Any, field: str) -> str | None:
    """Returns the first weights file in the value of ``init_cfg`` or ``pretrained``, with or without ``type``."""
    if isinstance(value, str):
        return value if field in ('checkpoint', 'pretrained') else None
    items = value.items() if isinstance(value, dict) else [
        (field, part) for part in value] if isinstance(value, (list, tuple)) else []
    return next((path for key, part in items if (path := _named_file(part, key))), None)
