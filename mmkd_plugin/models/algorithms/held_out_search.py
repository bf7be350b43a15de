"""A policy searched on a split of its own: MMRazor's loops with two loaders give a pair of batches."""
from mmengine.model import BaseDataPreprocessor

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
