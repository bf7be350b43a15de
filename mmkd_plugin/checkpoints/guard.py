"""Context in which every loader of weights files reads them as data.

A config can name a weights file in many places: ``init_cfg`` with and without ``type``, ``pretrained``,
``teacher_ckpt`` of MMDetection's own distillers, the path of a tokenizer. All of them call the same functions of torch.
:func:`data_only` replaces these functions and restores them at the end:

- ``torch.load``, also as ``torch.serialization.load``, reads with :func:`read_file`. It is called by MMEngine's
  ``CheckpointLoader`` with all its schemes (files, ``http(s)://``, ``torchvision://``, ``open-mmlab://``,
  ``mmcls://``, ``pavi://``, ``s3://`` and ``petrel://``), and thus by ``load_checkpoint``, ``_load_checkpoint`` and
  ``init_cfg=dict(type='Pretrained')``; by ``Runner.load_checkpoint`` and ``Runner.resume``; by
  ``torch.hub.load_state_dict_from_url``, also as ``load_url``; by PVT, Swin, DetectoRS, LAD and
  ``KnowledgeDistillationSingleStageDetector`` of MMDetection; by MILAN, the codebooks of BEiT, MiniGPT-4, LLaVA,
  Otter, Flamingo, ``SwAVHook`` and the retrievers of MMPretrain; by MMRazor's algorithms and predictors; by timm and
  torchvision.
- ``torch.jit.load`` raises an error, because TorchScript is code.
- ``torch.hub.download_url_to_file`` raises an error if downloads are not allowed.

Two cases are not guarded: a model that calls ``pickle.load`` itself (of the three libraries' models, only MMPretrain's
RAM does), and code that imported ``torch.load`` by name before (none of the libraries does).
"""
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .unpickler import RefusedError, read_file

_Place = tuple[Any, str]  # a module and the name in it
_lock = threading.Lock()
_users: Counter[_Place] = Counter()
_originals: dict[_Place, Callable] = {}


@contextmanager
def data_only(trust_checkpoint: bool = False, download: bool = True) -> Iterator[None]:
    """Context in which weights files are read as data, by any code and in any thread.

    Contexts can be nested. A file may run code only if none of them forbids it.

    Args:
        trust_checkpoint: whether files may run code when they are loaded. If so, nothing is guarded.
        download: whether files that are not in torch's cache yet may be downloaded.

    Raises:
        ValueError: raised by the loader if the file contains more than data, or would have to be downloaded.
    """
    replacements: dict[_Place, Callable] = {}
    if not trust_checkpoint:
        replacements.update({(torch, 'load'): _load, (torch.serialization, 'load'): _load,
                             (torch.jit, 'load'): _refuse_script})
    if not download:
        replacements[torch.hub, 'download_url_to_file'] = _refuse_download
    with _lock:
        for (owner, name), replacement in replacements.items():
            if not _users[owner, name]:
                _originals[owner, name] = getattr(owner, name)
                setattr(owner, name, replacement)
            _users[owner, name] += 1
    try:
        yield
    finally:
        with _lock:
            for owner, name in replacements:
                _users[owner, name] -= 1
                if not _users[owner, name]:
                    setattr(owner, name, _originals.pop((owner, name)))


def refusal(path: Any, error: RefusedError) -> str:
    """Returns the error message for a file that contains more than data."""
    name = repr(path) if not hasattr(path, 'read') else 'the file'
    return (f'{name} is refused because of {error.wanted}: a file that contains more than tensors, numbers, text, '
            'NumPy arrays, containers and the objects that MMEngine stores can run code when it is loaded. If you '
            'trust its source, set trust_checkpoint=True in model, or pass --trust-checkpoint to the tools')


def _load(f: Any, *_, **__) -> Any:
    """Replaces ``torch.load``. Tensors are on the CPU whatever ``map_location`` is; models copy them."""
    try:
        return read_file(f)
    except RefusedError as error:
        raise ValueError(refusal(f, error)) from error


def _refuse_script(f: Any, *_, **__) -> None:
    error = RefusedError('TorchScript code')
    raise ValueError(refusal(f, error)) from error


def _refuse_download(url: str, *_, **__) -> None:
    raise ValueError(f'{url!r} would have to be downloaded, but downloads are disabled here')
