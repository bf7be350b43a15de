"""A policy searched on a split of its own: MMRazor's loops with two loaders give a pair of batches."""
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.model import BaseDataPreprocessor
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_KEY = '_search_batch'


def set_search_batch_aside(preprocessor: BaseDataPreprocessor, args: tuple) -> tuple | None:
    """Forward pre-hook of a preprocessor: of a pair of batches, lets the first through and keeps the second.

    Every ``train_step``, also that of ``MMDistributedDataParallel``, begins with the preprocessor, so
    that none of them needs to know of pairs.
    """
    data, *rest = args
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(batch, dict) for batch in data):
        preprocessor.__dict__[_KEY] = data[1]
        return data[0], *rest
    return None


def take_search_batch(preprocessor: BaseDataPreprocessor) -> dict | None:
    """Returns what was set aside, once."""
    return preprocessor.__dict__.pop(_KEY, None)


@contextmanager
def keep_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norm in training mode normalises as ever, but its running statistics stay."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
