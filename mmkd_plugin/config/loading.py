"""Reading the config of a command, with its options and paths."""
from pathlib import Path

from mmengine.config import Config

from ..utils import closest
from .teachers import teachers_in

PATHS = ('model.architecture.cfg_path', 'model.student_ckpt', 'load_from')  # and those of each teacher


def read_config(path: str, cfg_options: dict | None = None) -> Config:
    """Reads a config file for a command.

    The paths in the fields :data:`PATHS`, and in ``cfg_path`` and ``teacher_ckpt`` of each teacher, are relative to the
    working directory. If a path does not exist there, but exists in the folder of the config file, that one is used.

    Args:
        path: the file.
        cfg_options: options of the command line, which override fields. Their paths are relative to the working
            directory.

    Raises:
        ValueError: the file does not exist. The message names the closest.
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
