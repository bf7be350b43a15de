"""Guards every loader of weights files while models are built, initialised, trained or tested.

A config can name a weights file in more places than anybody can list: ``init_cfg`` with and without ``type``,
``pretrained``, ``teacher_ckpt`` of MMDetection's own distillers, a tokenizer's path. All of them end in the same
functions of torch. These are what :func:`data_only` replaces, and puts back:

- ``torch.load``, also as ``torch.serialization.load``, reads by :func:`read_file`. It is what these call: MMEngine's
  ``CheckpointLoader`` with all its schemes (files, ``http(s)://``, ``torchvision://``, ``open-mmlab://``,
  ``mmcls://``, ``pavi://``, ``s3://`` and ``petrel://``), and so ``load_checkpoint``, ``_load_checkpoint`` and
  ``init_cfg=dict(type='Pretrained')``; ``Runner.load_checkpoint`` and ``Runner.resume``;
  ``torch.hub.load_state_dict_from_url``, by that name or as ``load_url``; PVT, Swin, DetectoRS, LAD and
  ``KnowledgeDistillationSingleStageDetector`` of MMDetection; MILAN, the codebooks of BEiT, MiniGPT-4, LLaVA, Otter,
  Flamingo, ``SwAVHook`` and the retrievers of MMPretrain; MMRazor's algorithms and predictors; timm, torchvision.
- ``torch.jit.load`` is refused: TorchScript is code.
- ``torch.hub.download_url_to_file``, where nothing may be downloaded.

Not guarded: a model's own call of ``pickle.load`` (of the three libraries' models only MMPretrain's RAM has one), and
who has taken ``torch.load`` by name before (none of the libraries does).
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
    """Within it, weights files are read as data, by whatever code and in whatever thread.

    Contexts may lie within each other; a file may run code only where none of them forbids it.

    Args:
        trust_checkpoint: whether files may run code when they are loaded, so that nothing is guarded.
        download: whether a file may be downloaded that is not in torch's cache yet.

    Raises:
        ValueError: from the loader: the file asks for more than data, or would have to be downloaded.
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
    """Returns the sentence for a file that asks for more than data."""
    name = repr(path) if not hasattr(path, 'read') else 'the file'
    return (f'{name} is refused because of {error.wanted}: beyond tensors, numbers, text, NumPy arrays, containers and '
            'what MMEngine stores, a file could run any code when it is loaded. If you trust whoever made it, allow '
            'that with trust_checkpoint=True in the model, --trust-checkpoint for the tools')


def _load(f: Any, *_, **__) -> Any:
    """Stands for ``torch.load``; tensors come on the CPU, whatever ``map_location`` says, for a model to copy."""
    try:
        return read_file(f)
    except RefusedError as error:
        raise ValueError(refusal(f, error)) from error


def _refuse_script(f: Any, *_, **__) -> None:
    error = RefusedError('TorchScript, which is code')
    raise ValueError(refusal(f, error)) from error


def _refuse_download(url: str, *_, **__) -> None:
    raise ValueError(f'{url!r} would have to be downloaded, which is not done here')
