"""The config of a command: its file, its options, and the paths in it."""
from pathlib import Path

from mmengine.config import Config

from ..utils import closest
from .teachers import teachers_in

PATHS = ('model.architecture.cfg_path', 'model.student_ckpt', 'load_from')  # and those of each teacher


def read_config(path: str, cfg_options: dict | None = None) -> Config:
    """Reads a config file for a command.

    A path in the config is relative to the working directory. Where nothing is there, but something is relative to the
    config's own folder, as ``_base_`` is, that is taken: see :data:`PATHS`, and ``cfg_path`` and ``teacher_ckpt`` of
    each teacher.

    Args:
        path: the file.
        cfg_options: of the command line, which override fields; their paths are relative to the working directory.

    Raises:
        ValueError: there is no such file; names the closest.
    """
    if not Path(path).is_file():
        known = [file.as_posix() for file in Path('configs').rglob('*.py') if '_base_' not in file.parts]
        raise ValueError(f'config: {path!r} not found in {Path.cwd()}; {closest(path, known)}')
    cfg = Config.fromfile(path)
    beside = {}
    model = cfg.get('model')
    names = [name for name, _, _ in teachers_in(model)] if isinstance(model, dict) else []
    for field in (*PATHS, *(field for name in names for field in (
            f'model.teacher{name}.cfg_path', f'model.teacher_ckpt{name}'))):
        value = cfg
        for key in field.split('.'):
            value = value.get(key) if isinstance(value, (dict, Config)) else None
        if isinstance(value, str) and '://' not in value and '::' not in value and not Path(value).exists():
            found = Path(path).parent / value
            if found.exists():
                beside[field] = str(found)
    cfg.merge_from_dict(beside)
    cfg.merge_from_dict(cfg_options or {})
    return cfg
