"""Reads weights out of any of the files people have, and loads them completely or not at all."""
import re
from collections.abc import Mapping

import torch
from mmengine.runner.checkpoint import CheckpointLoader, load_state_dict
from torch import Tensor, nn

STUDENT_PREFIX = 'architecture.'


def read_weights(path: str, field: str) -> dict[str, Tensor]:
    """Returns the weights of one plain model, by name.

    Accepts a plain state dict, a file that holds one under ``state_dict`` or
    ``model``, an MMEngine checkpoint, and a distillation checkpoint, of which
    it takes the student. The ``module.`` of a parallel wrapper is dropped.

    Args:
        path: a file, or an address that MMEngine can load.
        field: what the file is for; begins the error message.

    Raises:
        ValueError: the file cannot be had, or holds no weights.
    """
    try:
        content = CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')
    except Exception as error:  # what a file, a zip archive or a network can do wrong is not for us to list
        raise ValueError(f'{field}: cannot load {path!r} ({type(error).__name__}: {error})') from error
    for key in ('state_dict', 'model'):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not any(torch.is_tensor(value) for value in content.values()):
        raise ValueError(f'{field}: {path!r} holds no weights: expected tensors by name, or such a dict '
                         'under "state_dict" or "model"')
    weights = {name.removeprefix('module.'): value for name, value in content.items()}
    for name in [name for name in weights if re.search(r'(^|\.)data_preprocessor\.(mean|std)$', name)]:
        del weights[name]  # old files hold what now only the config states
    if any(name.startswith(STUDENT_PREFIX) for name in weights):
        weights = {name.removeprefix(STUDENT_PREFIX): value
                   for name, value in weights.items() if name.startswith(STUDENT_PREFIX)}
    return weights


def load_completely(model: nn.Module, path: str, field: str) -> None:
    """Loads the file at ``path`` into ``model``; every weight must fit.

    Raises:
        ValueError: lists what is missing, unexpected and of another shape.
    """
    weights = read_weights(path, field)
    try:
        load_state_dict(model, weights, strict=True)
    except RuntimeError as error:
        lines = [line if len(line) < 1500 else f'{line[:1500]}... ({line.count(",") + 1} in all)'
                 for line in str(error).splitlines() if line]
        raise ValueError(f'{field}: {path!r} does not fit {type(model).__name__}:\n' +
                         '\n'.join(lines[:30])) from error
