"""What makes a run one that can be interrupted: hooks that it needs, and the checkpoint that it goes on from."""
import re
import zipfile
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

from .reading import read_checkpoint

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
        ValueError: there are only damaged checkpoints, or the named one is.
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
    if (cfg.get('randomness') or {}).get('seed') is None:
        seed = read_checkpoint(cfg.load_from, '--resume', trust_checkpoint)['meta'].get('seed')
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=seed)
    return said


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
