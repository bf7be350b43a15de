"""Reading weights from files and URLs, and loading them strictly."""
import hashlib
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
    """Returns the content of a file, with tensors on the CPU, without running code in it.

    :mod:`.unpickler` lists what the file may contain. A URL is downloaded once, to torch's cache.

    Args:
        path: a file, or a URL that MMEngine can load.
        field: the config field of the file; the error message begins with it.
        trust_checkpoint: whether MMEngine may load a file that contains more than data, which runs the code in it.

    Raises:
        ValueError: the file is missing, cannot be downloaded, is damaged, or contains more than data.
    """
    file = None
    try:
        file = _local_copy(path)
        content = read_file(file)
    except RefusedError as error:
        if not trust_checkpoint:
            raise ValueError(f'{field}: {refusal(path, error)}') from error
        return _run(path, field)
    except Exception as error:  # files, zip archives and networks raise many types
        cached = f'. Delete its copy {file}, and try again' if file and '://' in path else ''
        raise ValueError(f'{field}: cannot load {path!r} ({type(error).__name__}: {error}){cached}') from error
    return mmengine_checkpoint._process_mmcls_checkpoint(content) if path.startswith('mmcls://') else content


def _run(path: str, field: str) -> Any:
    """Returns the content of a trusted file, read with MMEngine's loader."""
    try:
        return CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')
    except Exception as error:
        raise ValueError(f'{field}: cannot load {path!r} ({type(error).__name__}: {error})') from error


def _local_copy(path: str) -> str:
    """Returns the file at ``path``. A URL is downloaded to torch's cache."""
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
        raise RefusedError(f'{scheme}://, a scheme that only MMEngine\'s own loader reads')
    file = _cached(path)
    try:
        if get_rank() == 0:
            _download(path, file)
    finally:
        barrier()
    _download(path, file)  # on every machine, because caches differ
    return str(file)


def _cached(address: str) -> Path:
    """Returns the file of an address in torch's cache.

    Names of OpenMMLab and torchvision have a hash of the content. Beside a file of another name, such as
    ``epoch_12.pth``, is its address, so that a second address with this name gets a file of its own.
    """
    path = Path(urlparse(address).path)
    file, place = Path(torch.hub.get_dir(), 'checkpoints', path.name), _place(address)
    if _source(file).exists() and _source(file).read_text() != place:
        return file.with_stem(f'{file.stem}-{hashlib.sha256(place.encode()).hexdigest()[:8]}')
    return file


def _place(address: str) -> str:
    """Returns an address without its query, which may be a signature, if it has the name of a file."""
    return address.partition('?')[0] if Path(urlparse(address).path).suffix else address


def _source(file: Path) -> Path:
    return file.with_name(f'{file.name}.url')


def _download(address: str, file: Path) -> None:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        if not re.search(r'-[0-9a-f]{8,}$', file.stem):
            _source(file).write_text(_place(address))
        torch.hub.download_url_to_file(address, str(file), progress=sys.stderr.isatty())


def read_weights(path: str, field: str, trust_checkpoint: bool = False) -> dict[str, Tensor]:
    """Returns the weights of one plain model, by name.

    The file can be a state dict, a dict with one under ``state_dict`` or
    ``model``, an MMEngine checkpoint, or a distillation checkpoint. From the
    latter, the student's weights are returned. The prefix ``module.`` of a
    parallel wrapper is removed.

    Args, Raises: as in :func:`read_checkpoint`. A file without weights also raises ``ValueError``.
    """
    content = read_checkpoint(path, field, trust_checkpoint)
    for key in ('state_dict', 'model'):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not any(torch.is_tensor(value) for value in content.values()):
        raise ValueError(f'{field}: {path!r} has no weights, expected a dict of tensors, or such a dict '
                         'under "state_dict" or "model"')
    weights = {name.removeprefix('module.'): value for name, value in content.items()}
    for name in [name for name in weights if re.search(r'(^|\.)data_preprocessor\.(mean|std)$', name)]:
        del weights[name]  # in old files; now it is in the config alone
    if any(name.startswith(STUDENT_PREFIX) for name in weights):
        weights = {name.removeprefix(STUDENT_PREFIX): value
                   for name, value in weights.items() if name.startswith(STUDENT_PREFIX)}
    return weights


def load_completely(model: nn.Module, path: str, field: str, trust_checkpoint: bool = False) -> None:
    """Loads the file at ``path`` into ``model``; every weight must fit.

    Raises:
        ValueError: weights are missing, unexpected or have another shape (the message lists them); or as in
            :func:`read_checkpoint`.
    """
    weights = read_weights(path, field, trust_checkpoint)
    try:
        load_state_dict(model, weights, strict=True)
    except RuntimeError as error:
        lines = [line if len(line) < 1500 else f'{line[:1500]}... ({line.count(",") + 1} in all)'
                 for line in str(error).splitlines() if line]
        raise ValueError(f'{field}: {path!r} does not fit {type(model).__name__}:\n' +
                         '\n'.join(lines[:30])) from error
