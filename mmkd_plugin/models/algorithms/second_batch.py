"""Train steps with a second batch, for the search of a policy on its own split or for unlabelled images.

MMRazor's loops with two loaders give a pair of batches, and the second is for the search. The loops of this package
give :class:`WithUnlabelled`.
"""
from typing import NamedTuple

from mmengine.model import BaseDataPreprocessor

_KEY = '_second_batch'


class WithUnlabelled(NamedTuple):
    """The data of a train step with unlabelled images; both batches are as data loaders return them."""
    labelled: dict
    unlabelled: dict


def set_second_batch_aside(preprocessor: BaseDataPreprocessor, args: tuple) -> tuple | None:
    """Forward pre-hook of a preprocessor that passes on the first of two batches and stores the second.

    Every ``train_step``, including that of ``MMDistributedDataParallel``, calls the preprocessor first. So no
    ``train_step`` has to handle pairs.
    """
    data, *rest = args
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(batch, dict) for batch in data):
        preprocessor.__dict__[_KEY] = data
        return data[0], *rest
    return None


def take_second_batch(preprocessor: BaseDataPreprocessor) -> tuple[dict | None, dict | None]:
    """Returns the stored batch and removes it: (batch of the search, unlabelled batch), at least one of them None."""
    data = preprocessor.__dict__.pop(_KEY, None)
    if isinstance(data, WithUnlabelled):
        return None, data.unlabelled
    return (data[1] if data else None), None
