"""Class names of a config's data, and of its teachers' checkpoints."""
from collections.abc import Iterator, Mapping

from mmengine.config import Config

from ..checkpoints.reading import read_checkpoint
from .datasets import dataset_class, wrapped
from .teachers import teachers_in


def class_names(cfg: Config) -> tuple[str, ...] | None:
    """Returns the class names of the training data, or None if the config does not have them."""
    *_, dataset = {}, *wrapped((cfg.get('train_dataloader') or {}).get('dataset'))
    names = dataset.get('classes') or (dataset.get('metainfo') or {}).get('classes')  # `classes` is MMPretrain's
    if names is None:
        kind = dataset_class(dataset, cfg.get('default_scope'))
        names = (getattr(kind, 'METAINFO', None) or {}).get('classes')
    return tuple(names) if isinstance(names, (list, tuple)) else None


def other_classes(cfg: Config, trust_checkpoint: bool = False) -> Iterator[str]:
    """Yields a sentence for each teacher whose checkpoint has as many classes as the data, but other names or order."""
    own, trust_checkpoint = class_names(cfg), trust_checkpoint or cfg.model.get('trust_checkpoint', False)
    for name, _, weights in teachers_in(cfg.model):
        if not (own and weights):
            continue
        try:
            content = read_checkpoint(weights, f'model.teacher_ckpt{name}', trust_checkpoint)
        except ValueError:  # loading the teacher reports it
            continue
        meta = content.get('meta') if isinstance(content, Mapping) else None
        meta = meta if isinstance(meta, Mapping) else {}
        classes = (meta.get('dataset_meta') or {}).get('classes') or meta.get('CLASSES')  # of MMDetection 2
        if isinstance(classes, (list, tuple)) and len(classes) == len(own) and tuple(classes) != own:
            different = [f'{theirs!r} instead of {ours!r}' for theirs, ours in zip(classes, own) if theirs != ours]
            yield (f"model.teacher_ckpt{name}: {len(different)} class names of the teacher differ from the data's, "
                   f'such as {different[0]}. inherit and losses of predictions need the same classes in the same order')
