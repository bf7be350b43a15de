"""What makes a run one that can be interrupted: hooks that it needs, and the checkpoint that it goes on from."""
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

from .reading import STUDENT_PREFIX, read_checkpoint

HOOKS = dict(
    reseed=dict(type='mmkd_plugin.ReseedHook'),
    non_finite_loss=dict(type='mmkd_plugin.NonFiniteLossHook'),
    best_student=dict(type='mmkd_plugin.BestStudentHook'))


def add_safety_hooks(cfg: Config) -> None:
    """Adds to ``cfg.default_hooks`` what makes a run resume exactly, stop in time and keep its best student.

    These are ``HOOKS``, unless the config has its own of that name (None for none); the last only where a
    student is distilled and validated. :class:`SafeCheckpointHook` takes the place of MMEngine's ``CheckpointHook``.
    """
    if not cfg.get('default_hooks'):
        cfg.default_hooks = {}
    hooks = cfg.default_hooks
    has_student = 'architecture' in cfg.model and cfg.get('val_dataloader') is not None
    for name, hook in HOOKS.items():
        if name != 'best_student' or has_student:
            hooks.setdefault(name, hook)
        if name in hooks and hooks[name] is None:
            del hooks[name]  # MMEngine takes None for the names of its own hooks only
    hooks.setdefault('checkpoint', {})
    checkpoint = hooks['checkpoint']  # a ConfigDict keeps a copy of what it is given
    if checkpoint is not None and str(checkpoint.get('type', 'CheckpointHook')).split('.')[-1] == 'CheckpointHook':
        checkpoint['type'] = 'mmkd_plugin.SafeCheckpointHook'


def resume_from(cfg: Config, trust_checkpoint: bool = False) -> list[str]:
    """Names the checkpoint that ``cfg`` is to resume from, and the seed of that run if the config has none.

    Without ``cfg.load_from`` that is the latest whole one in ``cfg.work_dir``. Nothing changes where there is none: the
    run begins.

    Returns:
        Sentences for the user: which files are damaged, and what is taken instead.

    Raises:
        ValueError: there are only damaged checkpoints, or the named one is, or is of something else than a training
            with this kind of model.
    """
    said = []
    noted = find_latest_checkpoint(cfg.work_dir) if Path(cfg.work_dir, 'last_checkpoint').exists() else None
    if not cfg.get('load_from') and '://' in (noted or ''):
        return []  # on another storage, which MMEngine reads
    if cfg.get('load_from'):
        if '://' not in cfg.load_from and not is_whole(Path(cfg.load_from)):
            raise ValueError(f'--resume: {cfg.load_from!r} is {_fault(Path(cfg.load_from))}')
    else:
        candidates = checkpoints_in(Path(cfg.work_dir), noted)
        good = next((path for path in candidates if is_whole(path)), None)
        said = [f'--resume: {path} is {_fault(path)}'
                for path in candidates[:candidates.index(good) if good else None]]
        if candidates and not good:
            raise ValueError('\n'.join(said + [f'--resume: no whole checkpoint is left in {cfg.work_dir}. To begin '
                                               'anew, leave --resume out']))
        if not good:
            return [f'--resume: no checkpoint in {cfg.work_dir} yet; the run begins']
        cfg.load_from = str(good)
        if said:
            said.append(f'--resume: {good} is whole, and taken instead')
    trust_checkpoint = trust_checkpoint or cfg.model.get('trust_checkpoint', False)
    content = read_checkpoint(cfg.load_from, '--resume', trust_checkpoint)
    _check_run(content, cfg, trust_checkpoint)
    if (cfg.get('randomness') or {}).get('seed') is None:
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=content['meta'].get('seed'))
    return said


def _check_run(content: Any, cfg: Config, trust_checkpoint: bool) -> None:
    """Raises ``ValueError`` for a file that holds weights, but no run that this config could go on with."""
    start = ('To start from its weights, leave --resume out, and give the file as load_from or, if it must fit '
             'entirely, as model.student_ckpt' if 'architecture' in cfg.model else
             'To start from its weights, leave --resume out, and give the file as load_from')
    place = f'--resume: {cfg.load_from!r}'
    if not isinstance(content, Mapping) or not isinstance(content.get('state_dict'), Mapping):
        raise ValueError(f'{place} has no state_dict, expected a checkpoint of a training. {start}')
    meta = content.get('meta') if isinstance(content.get('meta'), Mapping) else {}
    lacking = [name for name, there in (('meta.epoch', 'epoch' in meta), ('meta.iter', 'iter' in meta),
                                        ('message_hub', 'message_hub' in content)) if not there]
    if lacking:
        raise ValueError(f'{place} is no checkpoint of a training: it has no {", ".join(lacking)}. {start}')
    distilled = any(key.startswith(STUDENT_PREFIX) for key in content['state_dict'])
    if distilled != ('architecture' in cfg.model):
        raise ValueError(f'{place} is of {"a distillation" if distilled else "a plain model"}, expected one of '
                         f'{"a plain model" if distilled else "a distillation"}, as this config is. {start}')
    if 'config' in meta and not trust_checkpoint:
        raise ValueError(f'{place} is refused: to resume, MMEngine would run the config in its meta as Python. If you '
                         'trust whoever made it, allow that with --trust-checkpoint')


def checkpoints_in(work_dir: Path, noted: str | None = None) -> list[Path]:
    """Returns the checkpoints of a run in the order to try them: the one that MMEngine noted, then the latest."""
    steps = {path: int(found[1]) for path in work_dir.glob('*.pth')
             if (found := re.fullmatch(r'(?:epoch|iter)_(\d+)', path.stem))}
    latest = sorted(steps, key=steps.get, reverse=True)
    if not noted:
        return latest
    return [Path(noted)] + [path for path in latest if path.resolve() != Path(noted).resolve()]


def is_whole(path: Path) -> bool:
    """Whether all of a checkpoint is there, by the checksums of its parts."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _fault(path: Path) -> str:
    return 'not there' if not path.exists() else f'damaged or cut off ({path.stat().st_size} bytes)'
