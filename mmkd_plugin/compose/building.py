"""Building models of plain configs without weights files, downloads or process groups."""
import copy
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.config import Config
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope

from ..checkpoints.initialize import forget_weights_files
from ..utils import in_words


def build_random(model: dict, scope: str) -> BaseModel:
    """Builds a model with random parameters.

    Args:
        model: config of the model. It is not changed.
        scope: the default scope of its types.
    """
    with DefaultScope.overwrite_default_scope(scope):
        built = revert_sync_batchnorm(MODELS.build(without_weights(model)))
    forget_weights_files(built)
    return built


def without_weights(model: dict) -> dict:
    """Returns a copy of a model's config without weights that a constructor would load, and without layers that need
    several processes.
    """
    model = copy.deepcopy(model)
    _strip(model)
    return model


def _strip(node: dict | list) -> None:
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        if key == 'pretrained' and value:
            node[key] = False if value is True else None  # a bool in timm
        elif key == 'teacher_ckpt':  # LAD has its own teacher
            node[key] = None
        elif key == 'type' and value == 'MMSyncBN':
            node[key] = 'SyncBN'  # revert_sync_batchnorm converts it to BN
        elif isinstance(value, (dict, list)):
            _strip(value)


def scope_of(cfg: Config, name: str = '') -> str:
    """Returns the library whose types the config ``name`` uses."""
    return cfg.get('default_scope') or name.rpartition('::')[0] or 'mmengine'


@contextmanager
def answering(begin: str, end: str = '') -> Iterator[None]:
    """Context that turns every exception into a ``ValueError`` with this begin and end of its message."""
    try:
        yield
    except Exception as error:  # models of other libraries raise many types
        raise ValueError(f'{begin}: {in_words(error)}{end}') from error
