"""Check of fields of a distillation's config that depend on each other."""
from mmengine.config import Config

from ..utils import type_name


def check_distillation(cfg: Config) -> None:
    """Checks the student's preprocessor, and that a hook ends the search of a policy.

    Raises:
        ValueError: ``model.data_preprocessor`` would be ignored, or there is no such hook.
    """
    model, architecture = cfg.model, cfg.model.get('architecture')
    given = model.get('data_preprocessor')
    if given and given != cfg.get('data_preprocessor') and isinstance(architecture, dict) and (
            architecture.get('cfg_path') or architecture.get('data_preprocessor', given) != given):
        raise ValueError('model.data_preprocessor: would be ignored, because the student has its own. Set '
                         'model.architecture.data_preprocessor instead')
    distiller = model.get('distiller')
    if not isinstance(distiller, dict):
        return
    each = [distiller] if 'type' in distiller else [one for one in distiller.values() if isinstance(one, dict)]
    hooks = {type_name(hook.get('type')) for hook in cfg.get('custom_hooks') or []}
    if 'FreezePolicyHook' not in hooks and any(
            type_name(one.get('type')) == 'SoKDDistiller' and one.get('dafa', {}) is not None for one in each):
        raise ValueError("custom_hooks: has no hook that ends the search of DAFA's policy. Add "
                         "dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=N), about a sixth of the epochs, or "
                         'set dafa=None in the distiller')
