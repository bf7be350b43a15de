"""Reading configs and building models by ``cfg_path``: a library's config (``mmdet::...``) or a file."""
import re
from pathlib import Path

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hub import get_config, get_model
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import get_installed_path, is_installed
from mmrazor.registry import MODELS as RAZOR_MODELS

from ..checkpoints.guard import data_only
from ..checkpoints.reading import load_completely
from ..utils import closest, type_name


def read_cfg_path(cfg_path: str, field: str = 'cfg_path') -> Config:
    """Returns the config at ``cfg_path``; its ``model`` has its own ``data_preprocessor``.

    Raises:
        ValueError: the config does not exist (the message names the closest), has a name that MMEngine does not read,
            is of a library that is not installed, or has no plain model.
    """
    library = cfg_path.partition('::')[0] if '::' in cfg_path else None
    if library and not is_installed(MODULE2PACKAGE.get(library, library)):  # MMEngine would install it
        raise ValueError(f'{field}: the library {library!r} of {cfg_path!r} is not installed; '
                         f'{closest(library, filter(is_installed, MODULE2PACKAGE))}')
    try:
        cfg = get_config(cfg_path) if '::' in cfg_path else Config.fromfile(cfg_path)
    except (FileNotFoundError, KeyError, OSError) as error:
        raise ValueError(f'{field}: no config {cfg_path!r}; {closest(cfg_path, _neighbours(cfg_path))}') from error
    except ValueError as error:
        if '::' not in cfg_path or re.match(r'\w+::\w+/', cfg_path):
            raise
        raise ValueError(f'{field}: MMEngine does not read the name {cfg_path!r}, expected LIBRARY::FOLDER/FILE.py '
                         'with letters, digits and "_" in FOLDER. Use the path of the file instead') from error
    if 'model' not in cfg:
        raise ValueError(f'{field}: {cfg_path!r} has no model')
    if 'architecture' in cfg.model:
        raise ValueError(f'{field}: {cfg_path!r} is a {type_name(cfg.model.get("type"))} with a model inside. Name the '
                         'config of the plain model')
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return cfg


def build_cfg_path(cfg_path: str, field: str, pretrained: bool = False, trust_checkpoint: bool = False) -> BaseModel:
    """Builds the model at ``cfg_path``, in the scope of its library.

    Args:
        cfg_path: as in :func:`read_cfg_path`.
        field: the config field that names it, for error messages.
        pretrained: whether to load the library's official weights; all of them must fit.
        trust_checkpoint: whether these weights, and files that the model reads when it is built, may run code, as in
            :func:`read_checkpoint`.
    """
    cfg = read_cfg_path(cfg_path, field)
    if '::' in cfg_path:
        with data_only(trust_checkpoint):
            model = get_model(cfg_path)
        if pretrained:
            try:
                weights = get_config(cfg_path, pretrained=True).model_path
            except (AssertionError, AttributeError) as error:
                raise ValueError(f'{field}: the library has no weights for {cfg_path!r}') from error
            load_completely(model, weights, f'{field}.pretrained', trust_checkpoint)
            model._is_init = True
        return model
    if pretrained:
        raise ValueError(f'{field}: pretrained=True is for a library\'s config, not for the file {cfg_path!r}')
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmengine'), data_only(trust_checkpoint):
        return MODELS.build(cfg.model)


def build_model(field: str, model: dict | BaseModel, trust_checkpoint: bool) -> BaseModel:
    """Builds the model of a config or of ``dict(cfg_path=...)``; returns a model unchanged.

    Raises:
        ValueError: ``model`` is none of these, or has options besides ``cfg_path``.
    """
    if not isinstance(model, (dict, BaseModel)):
        raise ValueError(f'{field} must be a config or a model, got {type(model).__name__}. For a config file, use '
                         f'{field}=dict(cfg_path=...)')
    if isinstance(model, BaseModel):
        return model
    if not (model.get('cfg_path') or model.get('type')):
        raise ValueError(f'{field} needs type or cfg_path, got {", ".join(model) or "an empty dict"}')
    if not model.get('cfg_path') or model.get('type'):
        with data_only(trust_checkpoint):
            return RAZOR_MODELS.build(model)
    dropped = sorted(set(model) - {'cfg_path', 'pretrained'})
    if dropped:
        raise ValueError(f'{field}: {", ".join(dropped)} beside cfg_path would be dropped silently. Write a config '
                         f'file that inherits {model["cfg_path"]!r} and changes these fields, and set cfg_path to it')
    return build_cfg_path(model['cfg_path'], field, model.get('pretrained', False), trust_checkpoint)


def _neighbours(cfg_path: str) -> list[str]:
    package, _, path = cfg_path.rpartition('::')
    root = Path(get_installed_path(package)) / '.mim/configs' if package else Path(path).parent
    found = [file.relative_to(root).as_posix() for file in root.rglob('*.py')] if package else [
        file.as_posix() for file in root.glob('*.py')]
    return [f'{package}::{name}' if package else name for name in found]
