"""Check for missing data and weights before training starts."""
import os
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import init_default_scope

from ..checkpoints.reading import read_checkpoint
from .cfg_path import read_cfg_path
from .datasets import downloads
from .teachers import teachers_in


def missing_inputs(cfg: Config, training: bool = True, trust_checkpoint: bool = False) -> list[str]:
    """Returns a sentence for each file that is missing, cannot be downloaded or is refused.

    The sentence names the field, the path and the option that supplies the file. Weights files in fields that are not
    checked here are still read as data, see :func:`.data_only`.

    Args:
        cfg: the whole config.
        training: whether to check training and validation data and weights, or test data alone.
        trust_checkpoint: whether weights may run code when they are loaded, as in ``model.trust_checkpoint``.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    loaders = ('train_dataloader', 'val_dataloader') if training else ('test_dataloader', )
    evaluators = ('val_evaluator', ) if training else ('test_evaluator', )
    found = [sentence for name in loaders for sentence in missing_data(cfg, name)]
    unlabelled = (cfg.get('train_cfg') or {}).get('unlabelled_dataloader')
    if training and unlabelled:
        found += _missing_data(unlabelled.get('dataset', {}), 'train_cfg.unlabelled_dataloader.dataset')
    for name in evaluators:
        metrics = cfg.get(name) or []
        for metric in metrics if isinstance(metrics, list) else [metrics]:
            ann_file = metric.get('ann_file')
            if ann_file and not metric.get('backend_args') and '://' not in ann_file and not Path(ann_file).exists():
                found.append(_sentence(f'{name}.ann_file', ann_file))
    if found and cfg.get('data_command'):
        found.append(f'To make this data: {cfg.data_command}')
    return found + (
        list(_missing_weights(cfg, trust_checkpoint)) if training else [])


def missing_data(cfg: Config, loader: str) -> list[str]:
    """Returns such a sentence for each file that is missing from the data set of a data loader, if there is one."""
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    return list(_missing_data((cfg.get(loader) or {}).get('dataset', {}), f'{loader}.dataset'))


def _sentence(option: str, path: str | Path, why: str = '') -> str:
    return (f'{option} not found: looked for {str(path)!r}'
            f'{f" in {Path.cwd()}" if not (why or Path(path).is_absolute()) else ""}{why}; '
            f'supply it with --cfg-options {option}=PATH')


def _missing_data(dataset: dict, option: str) -> Iterator[str]:
    if not isinstance(dataset, dict):
        yield f'{option} must be a dict, got {type(dataset).__name__}. For several data sets, use ConcatDataset'
        return
    for key in ('dataset', 'datasets'):  # wrappers such as RepeatDataset and ConcatDataset
        inner = dataset.get(key, [])
        for index, child in enumerate(inner if isinstance(inner, (list, tuple)) else [inner]):
            place = f'{option}.{key}' + (f'.{index}' if isinstance(inner, (list, tuple)) else '')
            yield from _missing_data(child, place)
    if dataset.get('backend_args') or downloads(dataset):
        return  # not on this disk, or not downloaded yet
    root = Path(dataset.get('data_root') or '')
    if '://' in str(dataset.get('data_root')):
        return
    if dataset.get('data_root') and not root.exists():
        yield _sentence(f'{option}.data_root', root)
        return
    parts = {f'{option}.ann_file': dataset.get('ann_file')}
    prefix = dataset.get('data_prefix') or {}
    parts.update({f'{option}.data_prefix.{key}': value for key, value in prefix.items()}
                 if isinstance(prefix, dict) else {f'{option}.data_prefix': prefix})
    for name, part in parts.items():
        if isinstance(part, (list, tuple)):
            yield f'{name} must be one path, got {len(part)}. For several data sets, use ConcatDataset'
        elif part and '://' not in part and not (root / part).exists():
            yield _sentence(name, root / part)


def _missing_weights(cfg: Config, trust: bool) -> Iterator[str]:
    model = cfg.model
    trust = trust or model.get('trust_checkpoint', False)
    teachers = list(teachers_in(model))
    for field, path in (*((f'teacher_ckpt{name}', weights) for name, _, weights in teachers),
                        ('student_ckpt', model.get('student_ckpt'))):
        if path:
            yield from _missing_file(path, f'model.{field}', trust)
    if cfg.get('load_from'):
        yield from _missing_file(cfg.load_from, 'load_from', trust)
    if not model.get('student_ckpt'):
        yield from _missing_of('architecture', model.get('architecture'), 'student', 'student_ckpt', trust)
    for name, teacher, weights in teachers:
        if model.get('allow_random_teacher') and not weights:
            yield from _missing_of(f'teacher{name}', teacher, 'teacher', f'teacher_ckpt{name}', trust)
    if 'architecture' not in model:
        yield from _missing_named(model, 'model', trust)


def _missing_of(field: str, model: dict | None, whose: str, weights: str, trust: bool) -> Iterator[str]:
    """Checks the weights that the student's or a teacher's own config starts from."""
    if not isinstance(model, dict):
        return  # building the model reports it
    if not model.get('cfg_path'):
        yield from _missing_named(model, f'model.{field}', trust)
        return
    # fields of a model by cfg_path cannot be set with --cfg-options
    for sentence in _missing_named(read_cfg_path(model.cfg_path, field).model, 'its', trust):
        yield (f'{sentence.split("; supply it")[0]}; supply the whole {whose} with --cfg-options '
               f'model.{weights}=PATH, or inherit its config')


def _missing_named(node: dict | list | str, option: str, trust: bool) -> Iterator[str]:
    """Checks weights files in ``init_cfg``, with or without ``type``, and in ``pretrained``, at any depth."""
    key = option.rpartition('.')[2]
    if isinstance(node, str):
        if key == 'checkpoint' or key == 'pretrained' and ('://' in node or Path(node).suffix):
            yield from _missing_file(node, option, trust)
        return
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for name, value in items:
        yield from _missing_named(value, f'{option}.{name}', trust)


def _missing_file(path: str, option: str, trust: bool) -> Iterator[str]:
    if '://' not in path and not Path(os.path.expanduser(path)).exists():
        yield _sentence(option, path)
        return
    try:
        read_checkpoint(path, option, trust)  # downloads it once, to torch's cache
    except ValueError as error:
        cannot_download = '://' in path and isinstance(error.__cause__, OSError)
        yield _sentence(option, path, f' ({error.__cause__})') if cannot_download else str(error)
