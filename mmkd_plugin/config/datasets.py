"""The data sets of a config."""
from collections.abc import Iterator
from inspect import signature

from mmengine.registry import DATASETS


def wrapped(dataset: dict | None) -> Iterator[dict]:
    """Yields the config of a data set and of those that it wraps, the outermost first.

    Of several, as in ConcatDataset, the first is taken.
    """
    while dataset:
        yield dataset
        inner = dataset.get('dataset') or dataset.get('datasets')
        dataset = next(iter(inner), None) if isinstance(inner, (list, tuple)) else inner


def pipeline_of(dataset: dict | None) -> list[dict]:
    """Returns the pipeline of the outermost data set that has one; [] if there is none."""
    return next((each['pipeline'] for each in wrapped(dataset) if each.get('pipeline')), [])


def dataset_class(dataset: dict, scope: str | None = None) -> type | None:
    """Returns the class of a data set, or None if its type is unknown in ``scope``, by default the current one."""
    kind = dataset.get('type')
    if not isinstance(kind, str):
        return kind
    with DATASETS.switch_scope_and_registry(scope) as registry:
        return registry.get(kind)


def downloads(dataset: dict) -> bool:
    """Whether the data set downloads itself, as CIFAR and MNIST do."""
    kind = dataset_class(dataset)
    return kind is not None and 'download' in signature(kind).parameters and dataset.get('download', True)
