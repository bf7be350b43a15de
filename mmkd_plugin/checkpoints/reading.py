"""Reads weights out of any of the files people have, and loads them completely or not at all."""
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_rank
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader, load_state_dict
from torch import Tensor, nn

from ..utils import closest
from .guard import refusal
from .unpickler import RefusedError, read_file

STUDENT_PREFIX = 'architecture.'

_ZOOS = {
    'torchvision': mmengine_checkpoint.get_torchvision_models,
    'modelzoo': mmengine_checkpoint.get_torchvision_models,
    'open-mmlab': mmengine_checkpoint.get_external_models,
    'openmmlab': mmengine_checkpoint.get_external_models,
    'mmcls': mmengine_checkpoint.get_mmcls_models,
}


def read_checkpoint(path: str, field: str, trust_checkpoint: bool = False) -> Any:
    """Returns all that a file holds, tensors on the CPU, without running anything in it.

    See :mod:`.unpickler` for what it may hold. What is at an address is downloaded once, to where MMEngine looks.

    Args:
        path: a file, or an address that MMEngine can load.
        field: what the file is for; begins the error message.
        trust_checkpoint: whether to let MMEngine load a file that asks for more than data, which runs whatever code
            is in it.

    Raises:
        ValueError: the file cannot be had, is damaged, or asks for more than data.
    """
    try:
        content = read_file(_local_copy(path))
    except RefusedError as error:
        if not trust_checkpoint:
            raise ValueError(f'{field}: {refusal(path, error)}') from error
        return _run(path, field)
    except Exception as error:  # what a file, a zip archive or a network can do wrong is not for us to list
        raise ValueError(f'{field}: cannot load {path!r} ({type(error).__name__}: {error})') from error
    return mmengine_checkpoint._process_mmcls_checkpoint(content) if path.startswith('mmcls://') else content


def _run(path: str, field: str) -> Any:
    """Returns what MMEngine's own loader makes of a file that is trusted."""
    try:
        return CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')
    except Exception as error:
        raise ValueError(f'{field}: cannot load {path!r} ({type(error).__name__}: {error})') from error


def _local_copy(path: str) -> str:
    """Returns the file at ``path``; what is at an address is downloaded to the cache that MMEngine uses."""
    scheme, is_address, name = path.partition('://')
    if not is_address:
        return str(Path(path).expanduser())
    if scheme in _ZOOS:
        addresses = _ZOOS[scheme]()
        name = mmengine_checkpoint.get_deprecated_model_names().get(name, name) if 'mmlab' in scheme else name
        if name not in addresses:
            raise ValueError(f'no model {name!r}; {closest(name, addresses)}')
        path = addresses[name]
        if '://' not in path:
            return str(Path(mmengine_checkpoint._get_mmengine_home(), path))
    elif scheme not in ('http', 'https'):
        raise RefusedError(f'{scheme}://, an address that only MMEngine\'s own loader reads')
    file = Path(torch.hub.get_dir(), 'checkpoints', Path(urlparse(path).path).name)
    try:
        if get_rank() == 0:
            _download(path, file)
    finally:
        barrier()
    _download(path, file)  # another machine has another cache
    return str(file)


def _download(address: str, file: Path) -> None:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(file), progress=sys.stderr.isatty())


def read_weights(path: str, field: str, trust_checkpoint: bool = False) -> dict[str, Tensor]:
    """Returns the weights of one plain model, by name.

    Accepts a plain state dict, a file that holds one under ``state_dict`` or
    ``model``, an MMEngine checkpoint, and a distillation checkpoint, of which
    it takes the student. The ``module.`` of a parallel wrapper is dropped.

    Args and raises: as :func:`read_checkpoint`; ``ValueError`` also if the file holds no weights.
    """
    content = read_checkpoint(path, field, trust_checkpoint)
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


def load_completely(model: nn.Module, path: str, field: str, trust_checkpoint: bool = False) -> None:
    """Loads the file at ``path`` into ``model``; every weight must fit.

    Raises:
        ValueError: lists what is missing, unexpected and of another shape; or as :func:`read_checkpoint`.
    """
    weights = read_weights(path, field, trust_checkpoint)
    try:
        load_state_dict(model, weights, strict=True)
    except RuntimeError as error:
        lines = [line if len(line) < 1500 else f'{line[:1500]}... ({line.count(",") + 1} in all)'
                 for line in str(error).splitlines() if line]
        raise ValueError(f'{field}: {path!r} does not fit {type(model).__name__}:\n' +
                         '\n'.join(lines[:30])) from error
