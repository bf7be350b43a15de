"""Train steps that get two batches: to search a policy on a split of its own, or to learn from unlabelled images.

MMRazor's loops with two loaders give a pair of batches, of which the second is for the search; ours give
:class:`WithUnlabelled`.
"""
from typing import NamedTuple

from mmengine.model import BaseDataPreprocessor

_KEY = '_second_batch'


class WithUnlabelled(NamedTuple):
    """The data of a train step with unlabelled images, both as a data loader gives them."""
    labelled: dict
    unlabelled: dict


def set_second_batch_aside(preprocessor: BaseDataPreprocessor, args: tuple) -> tuple | None:
    """Forward pre-hook of a preprocessor: of two batches, lets the first through and keeps the second.

    Every ``train_step``, also that of ``MMDistributedDataParallel``, begins with the preprocessor, so
    that none of them needs to know of pairs.
    """
    data, *rest = args
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(batch, dict) for batch in data):
        preprocessor.__dict__[_KEY] = data
        return data[0], *rest
    return None


def take_second_batch(preprocessor: BaseDataPreprocessor) -> tuple[dict | None, dict | None]:
    """Returns what was set aside, once: the batch of the search and the unlabelled one, at most one of them."""
    data = preprocessor.__dict__.pop(_KEY, None)
    if isinstance(data, WithUnlabelled):
        return None, data.unlabelled
    return (data[1] if data else None), None
