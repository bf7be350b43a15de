"""The registries of the package, children of MMEngine's root registries.

The config of any OpenMMLab library finds them, because they are children of
the root and have the name of the package. ``type='mmkd_plugin.AMDLoss'``
imports this module, then ``locations``, and needs no ``custom_imports``.
"""
from mmengine import registry as root
from mmengine.registry import Registry


def _child(parent: Registry, location: str) -> Registry:
    return Registry(
        parent.name, parent=parent, scope='mmkd_plugin', locations=[f'mmkd_plugin.{location}'])


MODELS = _child(root.MODELS, 'models')
TASK_UTILS = _child(root.TASK_UTILS, 'models')
DATASETS = _child(root.DATASETS, 'datasets')
HOOKS = _child(root.HOOKS, 'engine')
LOOPS = _child(root.LOOPS, 'engine')
OPTIM_WRAPPER_CONSTRUCTORS = _child(root.OPTIM_WRAPPER_CONSTRUCTORS, 'engine')
OPTIM_WRAPPERS = _child(root.OPTIM_WRAPPERS, 'engine')
