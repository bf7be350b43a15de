"""Checks the installed packages and makes MMRazor importable with torch 2 and newer mmcv.

MMRazor 1.0.0 builds quantisation tables at import from torch internals that
torch 2 renamed or removed. There, ``import mmrazor.models`` fails with
"`torch>=1.13` is not installed properly", and no distillation class can be
imported. Distillation does not need these tables. If the real
``mmrazor.structures.quantization`` fails to import, this module registers a
placeholder for it. Using a quantiser then raises an error.

MMRazor also asserts mmcv <= 2.1.0 when it is imported, and nowhere else. It
works with the newer mmcv of the ``onedl-*`` packages, so this module reports
2.1.0 to it during its import. MMDetection and MMPretrain check mmcv themselves.

MMPretrain up to 1.3.6 fails to import with transformers 5: "TypeError:
NoneType takes no arguments". Only its multimodal models need transformers.
:func:`leave_multimodal_out` makes MMPretrain leave them out, as it does if
transformers is not installed.

The optimizer constructors of MMEngine, MMDetection and MMPretrain identify
parameters by their names in the plain model, such as ``backbone.stages.0``,
and read ``backbone`` or ``get_layer_depth`` of the model. With
:func:`let_constructors_see_the_student` they build the student's parameter
groups from the student alone, so that a config's constructor works unchanged
when its model becomes a student.

Packages are identified by their import name: ``mmcv`` may come from ``mmcv`` or
from ``onedl-mmcv``. Apart from this module, only :mod:`.checkpoints.guard`
changes another library, and only within a context.
"""
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

_QUANTISATION = 'mmrazor.structures.quantization'
_NEWEST_MMCV_FOR_MMRAZOR = '2.1.0'
_NEWEST_MMPRETRAIN_TO_FAIL = '1.3.6'  # with transformers 5
_FIRST_MMDET_WITH_IMGAUG = '3.5.0'  # onedl-mmdetection needs imgaug, but does not declare it
_STACK = {
    'torch': '`pip install torch`',
    'mmengine': '`pip install mmengine`, or `onedl-mmengine` on the newer stack',
    'mmcv': '`pip install "mmcv>=2.0.0rc4,<2.2.0"`, or `onedl-mmcv` on the newer stack',
    'mmcv.ops': '`pip install "mmcv>=2.0.0rc4,<2.2.0"`, or `onedl-mmcv` on the newer stack '
                '(after `pip uninstall mmcv-lite`, which has no compiled ops)',
    'six': '`pip install six`',  # onedl-mmdetection needs it, but does not declare it
    'mmdet': '`pip install "mmdet>=3.0.0,<3.4.0"`, or `onedl-mmdetection` on the newer stack',
    'mmpretrain': '`pip install "mmpretrain>=1.0.0,<1.3.0"`, or `onedl-mmpretrain` on the newer stack',
    'joblib': '`pip install joblib`',
    'ordered_set': '`pip install ordered_set`',
    'mmrazor': '`pip install "mmrazor==1.0.0"`',
}


class StackError(RuntimeError):
    """A package is missing or incompatible.

    This is not an ``ImportError``, because MMEngine's registry swallows those
    and would only report that a class is not registered.
    """


class _Unavailable:
    """Placeholder for a quantisation class; any use of it raises an error."""

    def __init__(self, name: str, reason: Exception):
        self.__dict__.update(_name=name, _reason=reason)

    def _refuse(self, *_, **__):
        import torch
        raise StackError(
            f'{self._name}: quantisation of mmrazor cannot be used with torch {torch.__version__}, '
            f'because {_QUANTISATION} fails to import there ({self._reason}). '
            'Use torch 1.13 for quantisation. Distillation, pruning and NAS work.') from self._reason

    __call__ = __getitem__ = __getattr__ = _refuse


@contextmanager
def _mmcv_as_mmrazor_wants() -> Iterator[None]:
    """Context in which a newer mmcv reports the newest version that MMRazor accepts."""
    import mmcv
    from mmengine.utils import digit_version
    actual = mmcv.__version__
    if digit_version(actual) > digit_version(_NEWEST_MMCV_FOR_MMRAZOR):
        mmcv.__version__ = _NEWEST_MMCV_FOR_MMRAZOR
    try:
        yield
    finally:
        mmcv.__version__ = actual


def check_stack() -> None:
    """Imports the packages that this package needs.

    Raises:
        StackError: a package is missing or incompatible.
    """
    for module, remedy in _STACK.items():
        _check(module, remedy)
    from mmdet import __version__ as mmdet_version
    from mmengine.utils import digit_version
    if digit_version(mmdet_version) >= digit_version(_FIRST_MMDET_WITH_IMGAUG):
        _check('imgaug', '`pip install --no-deps imaug`, its maintained fork with the same import name')


def _check(module: str, remedy: str) -> None:
    try:
        with _mmcv_as_mmrazor_wants() if module == 'mmrazor' else nullcontext():
            import_module(module)
    except (ImportError, AssertionError) as error:  # OpenMMLab asserts versions at import
        raise StackError(f'mmkd_plugin cannot use {module} ({error}): run {remedy}.') from error


def leave_multimodal_out() -> None:
    """Makes MMPretrain use placeholders for its multimodal models if transformers is too new for them."""
    import mmpretrain
    from mmengine.utils import digit_version
    from mmpretrain.utils import dependency
    try:
        transformers = version('transformers')
    except PackageNotFoundError:
        return
    if (digit_version(transformers) >= digit_version('5.0.0')
            and digit_version(mmpretrain.__version__) <= digit_version(_NEWEST_MMPRETRAIN_TO_FAIL)):
        dependency.WITH_MULTIMODAL = False


def make_mmrazor_importable() -> None:
    """Registers a placeholder for MMRazor's quantisation tables if the real ones fail to import."""
    if 'mmrazor.models' in sys.modules or _QUANTISATION in sys.modules:
        return
    try:
        import_module(_QUANTISATION)
    except Exception as error:  # torch 2 raises ImportError, AttributeError and others
        for name in [name for name in sys.modules if name.startswith('mmrazor.structures')]:
            del sys.modules[name]
        placeholder = ModuleType(_QUANTISATION, f'Placeholder of mmkd_plugin: {error}')
        placeholder.__all__ = []
        for name in ('BackendConfigs', 'QConfigHandler', 'QSchemeHandler'):
            setattr(placeholder, name, _Unavailable(name, error))
        sys.modules[_QUANTISATION] = placeholder


def let_constructors_see_the_student() -> None:
    """Makes MMEngine's ``DefaultOptimWrapperConstructor`` and its subclasses build the student's groups separately.

    This concerns models whose class has the property ``optimised_parts``, which returns the student and the modules
    that are trained besides it. The student gets exactly the parameter groups that it has in plain training. The other
    parameters follow in groups of their own, with the learning rate and weight decay of the optimizer. The rules of
    ``paramwise_cfg`` for kinds of layers, such as ``norm_decay_mult``, apply to them. ``custom_keys`` do not, because
    they name parameters of the student. For other models nothing changes.
    """
    from mmengine.model import is_model_wrapper
    from mmengine.optim import DefaultOptimWrapperConstructor
    original = DefaultOptimWrapperConstructor.__call__
    if hasattr(original, '__wrapped__'):
        return

    @wraps(original)
    def build(self, model):
        inner = model.module if is_model_wrapper(model) else model
        if not hasattr(type(inner), 'optimised_parts'):
            return original(self, model)
        student, beside = inner.optimised_parts
        for key in self.paramwise_cfg.get('custom_keys') or {}:
            if key.startswith('architecture.'):
                raise ValueError(f"optim_wrapper.paramwise_cfg.custom_keys: {key!r} names no parameter of the student. "
                                 "Leave out 'architecture.'")
        wrapper = original(self, student)
        rules = {key: value for key, value in self.paramwise_cfg.items() if key != 'custom_keys'}
        groups = [dict(params=[parameter for parameter in beside.parameters() if parameter.requires_grad])]
        if rules:
            groups = []
            DefaultOptimWrapperConstructor(dict(optimizer=self.optimizer_cfg), rules).add_params(groups, beside)
        for group in groups:
            if group['params']:
                wrapper.optimizer.add_param_group(group)
        return wrapper

    DefaultOptimWrapperConstructor.__call__ = build
