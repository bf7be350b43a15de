"""Check of a distillation's config before anything is built."""
from mmengine.config import Config

from ..registry import HOOKS, MODELS
from ..utils import type_name


def check_distillation(cfg: Config) -> None:
    """Checks names of types, the student's preprocessor, and that a hook ends the search of a policy.

    Raises:
        ValueError: a type of this package has no scope, ``model.data_preprocessor`` would be ignored, or there is no
            such hook.
    """
    model, architecture = cfg.model, cfg.model.get('architecture')
    given = model.get('data_preprocessor')
    if given and given != cfg.get('data_preprocessor') and isinstance(architecture, dict) and (
            architecture.get('cfg_path') or architecture.get('data_preprocessor', given) != given):
        where = 'model.architecture.data_preprocessor'
        if architecture.get('cfg_path'):
            where = 'a config file that inherits the student\'s, and set cfg_path to it'
        raise ValueError(f'model.data_preprocessor: would be ignored, because the student has its own. Use {where}')
    distiller = model.get('distiller') if isinstance(model.get('distiller'), dict) else {}
    each = [distiller] if 'type' in distiller else [one for one in distiller.values() if isinstance(one, dict)]
    hooks = [*(cfg.get('custom_hooks') or []), *filter(None, (cfg.get('default_hooks') or {}).values())]
    for field, registry, parts in (('model', MODELS, [model]), ('model.distiller', MODELS, each),
                                   ('custom_hooks', HOOKS, hooks)):
        registry.import_from_location()
        for part in parts:
            if part.get('type') in registry.module_dict:
                raise ValueError(f"{field}.type: {part['type']!r} is a type of this package. Write "
                                 f"'mmkd_plugin.{part['type']}'")
    if not any(type_name(hook.get('type')).endswith('FreezePolicyHook') for hook in hooks) and any(
            type_name(one.get('type')) == 'SoKDDistiller' and one.get('dafa', {}) is not None for one in each):
        raise ValueError("custom_hooks: has no hook that ends the search of DAFA's policy. Add "
                         "dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=N), about a sixth of the epochs, or "
                         'set dafa=None in the distiller')
