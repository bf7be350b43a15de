"""Hooks that make a run resumable, and the checkpoint to resume from."""
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

from ..utils import type_name
from .reading import STUDENT_PREFIX, read_checkpoint

HOOKS = dict(
    reseed='mmkd_plugin.ReseedHook',
    non_finite_loss='mmkd_plugin.NonFiniteLossHook',
    best_student='mmkd_plugin.BestStudentHook')


def add_safety_hooks(cfg: Config) -> None:
    """Adds hooks to ``cfg.default_hooks`` that make a run resume exactly, stop on a bad loss and keep the best student.

    It adds ``HOOKS``. Fields of the config stay, and None removes a hook. The last one is added only if a student is
    distilled and validated. :class:`SafeCheckpointHook` replaces MMEngine's ``CheckpointHook``.
    """
    if not cfg.get('default_hooks'):
        cfg.default_hooks = {}
    hooks = cfg.default_hooks
    has_student = 'architecture' in cfg.model and cfg.get('val_dataloader') is not None
    for name, kind in HOOKS.items():
        if name != 'best_student' or has_student:
            hooks.setdefault(name, {})
        if hooks.get(name) is not None:
            hooks[name].setdefault('type', kind)
        elif name in hooks:
            del hooks[name]  # MMEngine accepts None for its own hooks only
    hooks.setdefault('checkpoint', {})
    checkpoint = hooks['checkpoint']  # a ConfigDict copies what it gets
    if checkpoint is not None and type_name(checkpoint.get('type', 'CheckpointHook')) == 'CheckpointHook':
        checkpoint['type'] = 'mmkd_plugin.SafeCheckpointHook'


def resume_from(cfg: Config, trust_checkpoint: bool = False, start: str | None = None) -> list[str]:
    """Sets the checkpoint that ``cfg`` resumes from, and the seed of that run if the config has none.

    Without ``cfg.load_from``, this is the latest complete checkpoint in ``cfg.work_dir``. If there is none, training
    starts from the beginning, with the weights in ``start``.

    Returns:
        Messages for the user: which checkpoints are damaged, and which one is used.

    Raises:
        ValueError: ``cfg.load_from`` or all checkpoints in ``cfg.work_dir`` are damaged, or the checkpoint is not one
            of a training with this kind of model.
    """
    said = []
    noted = find_latest_checkpoint(cfg.work_dir) if Path(cfg.work_dir, 'last_checkpoint').exists() else None
    if not cfg.get('load_from') and '://' in (noted or ''):
        return []  # MMEngine reads other storages
    if cfg.get('load_from'):
        if '://' not in cfg.load_from and not is_whole(Path(cfg.load_from)):
            raise ValueError(f'--resume: {cfg.load_from!r} is {_fault(Path(cfg.load_from))}')
    else:
        candidates = checkpoints_in(Path(cfg.work_dir), noted)
        good = next((path for path in candidates if is_whole(path)), None)
        said = [f'--resume: {path} is {_fault(path)}'
                for path in candidates[:candidates.index(good) if good else None]]
        if candidates and not good:
            raise ValueError('\n'.join(said + [f'--resume: no complete checkpoint is left in {cfg.work_dir}. To start '
                                               'again, leave out --resume']))
        if not good:
            cfg.load_from, cfg.resume = start, False
            return [f'--resume: no checkpoint in {cfg.work_dir} yet; training starts from {start or "the beginning"}']
        cfg.load_from = str(good)
    trust_checkpoint = trust_checkpoint or cfg.model.get('trust_checkpoint', False)
    content = read_checkpoint(cfg.load_from, '--resume', trust_checkpoint)
    _check_run(content, cfg, trust_checkpoint)
    if (cfg.get('randomness') or {}).get('seed') is None:
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=content['meta'].get('seed'))
    return [*said, f'--resume: continues {cfg.load_from}, after {content["meta"]["iter"]} iterations']


def _check_run(content: Any, cfg: Config, trust_checkpoint: bool) -> None:
    """Raises ``ValueError`` for a file with weights that is not a checkpoint this config can resume from."""
    start = ('To start from its weights, leave out --resume, and set model.student_ckpt to the file and model.inherit '
             'to []' if 'architecture' in cfg.model else
             'To start from its weights, leave out --resume and set load_from to the file')
    place = f'--resume: {cfg.load_from!r}'
    if not isinstance(content, Mapping) or not isinstance(content.get('state_dict'), Mapping):
        raise ValueError(f'{place} has no state_dict, expected a training checkpoint. {start}')
    meta = content.get('meta') if isinstance(content.get('meta'), Mapping) else {}
    lacking = [name for name, there in (('meta.epoch', 'epoch' in meta), ('meta.iter', 'iter' in meta),
                                        ('message_hub', 'message_hub' in content)) if not there]
    if lacking:
        raise ValueError(f'{place} is not a training checkpoint: it has no {", ".join(lacking)}. {start}')
    distilled = any(key.startswith(STUDENT_PREFIX) for key in content['state_dict'])
    if distilled != ('architecture' in cfg.model):
        raise ValueError(f'{place} is of {"a distillation" if distilled else "a plain model"}, expected a checkpoint '
                         f'of {"a plain model" if distilled else "a distillation"}, because this config trains one. '
                         f'{start}')
    if 'config' in meta and not trust_checkpoint:
        raise ValueError(f'{place} is refused: to resume, MMEngine would run the config in its meta as Python. If you '
                         'trust its source, add --trust-checkpoint')


def checkpoints_in(work_dir: Path, noted: str | None = None) -> list[Path]:
    """Returns the checkpoints of a run in the order to try them: the one in MMEngine's record, then the latest."""
    steps = {path: int(found[1]) for path in work_dir.glob('*.pth')
             if (found := re.fullmatch(r'(?:epoch|iter)_(\d+)', path.stem))}
    latest = sorted(steps, key=steps.get, reverse=True)
    if not noted:
        return latest
    return [Path(noted)] + [path for path in latest if path.resolve() != Path(noted).resolve()]


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is complete, by the checksums of its parts."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _fault(path: Path) -> str:
    return 'missing' if not path.exists() else f'damaged or incomplete ({path.stat().st_size} bytes)'
