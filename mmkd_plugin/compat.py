"""Makes MMRazor importable on torch 2 and with new mmcv, and checks the stack it stands on.

MMRazor 1.0.0 builds quantisation tables at import from torch internals that
torch 2 renamed or removed, so ``import mmrazor.models`` fails there with
"`torch>=1.13` is not installed properly" and takes every distillation class
down with it. Distillation needs none of it: where, and only where, the real
``mmrazor.structures.quantization`` fails to import, a placeholder takes its
place, and whoever uses a quantiser is told so.

MMRazor also asserts mmcv <= 2.1.0 when it is imported, and nowhere else. It
works with the newer ones of the ``onedl-*`` packages, which MMDetection and
MMPretrain judge for themselves, so for that moment it is shown 2.1.0.

MMPretrain, to 1.3.6, fails to import beside transformers 5 with "TypeError:
NoneType takes no arguments", which only its models of images and text need.
:func:`leave_multimodal_out` makes it do without them, as without transformers.

Constructors of optimizers, MMEngine's and those that MMDetection and MMPretrain
derive from it, tell parameters by their names in the plain model, such as
``backbone.stages.0``, and ask the model for ``backbone`` or
``get_layer_depth``. So that a config's constructor works unchanged when its
model becomes a student, :func:`let_constructors_see_the_student` makes them
build the groups of the student from the student alone.

Packages are known by the name they are imported by, so that ``mmcv`` may come
from ``mmcv`` or from ``onedl-mmcv``. Besides this module only
:mod:`.checkpoints.guard` changes another library, for the time of a context.
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
_NEWEST_MMPRETRAIN_TO_FAIL = '1.3.6'  # beside transformers 5
_FIRST_MMDET_WITH_IMGAUG = '3.5.0'  # onedl-mmdetection, which does not declare it
_STACK = {
    'torch': '`pip install torch`',
    'mmengine': '`pip install mmengine`, or `onedl-mmengine` on the newer stack',
    'mmcv': '`pip install "mmcv>=2.0.0rc4,<2.2.0"`, or `onedl-mmcv` on the newer stack',
    'mmcv.ops': '`pip install "mmcv>=2.0.0rc4,<2.2.0"`, or `onedl-mmcv` on the newer stack '
                '(after `pip uninstall mmcv-lite`, which has no compiled ops)',
    'six': '`pip install six`',  # onedl-mmdetection needs it, and does not declare it
    'mmdet': '`pip install "mmdet>=3.0.0,<3.4.0"`, or `onedl-mmdetection` on the newer stack',
    'mmpretrain': '`pip install "mmpretrain>=1.0.0,<1.3.0"`, or `onedl-mmpretrain` on the newer stack',
    'joblib': '`pip install joblib`',
    'ordered_set': '`pip install ordered_set`',
    'mmrazor': '`pip install "mmrazor==1.0.0"`',
}


class StackError(RuntimeError):
    """A package is missing or does not fit.

    Not an ``ImportError``, because MMEngine's registry swallows those and
    would report only that a class is not registered.
    """


class _Unavailable:
    """Stands for a quantisation class; any use of it raises."""

    def __init__(self, name: str, reason: Exception):
        self.__dict__.update(_name=name, _reason=reason)

    def _refuse(self, *_, **__):
        import torch
        raise StackError(
            f'{self._name}: quantisation of mmrazor cannot be used with torch {torch.__version__}, '
            f'because {_QUANTISATION} fails to import there ({self._reason}). '
            'Use torch 1.13 for quantisation; distillation, pruning and NAS work.') from self._reason

    __call__ = __getitem__ = __getattr__ = _refuse


@contextmanager
def _mmcv_as_mmrazor_wants() -> Iterator[None]:
    """Shows the newest mmcv that MMRazor admits instead of a newer one, and takes it back in any case."""
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
    """Imports what this package stands on.

    Raises:
        StackError: One sentence, if a package is missing or clashes.
    """
    for module, remedy in _STACK.items():
        _check(module, remedy)
    from mmdet import __version__ as mmdet_version
    from mmengine.utils import digit_version
    if digit_version(mmdet_version) >= digit_version(_FIRST_MMDET_WITH_IMGAUG):
        _check('imgaug', '`pip install --no-deps imaug`, its maintained fork of the same import name')


def _check(module: str, remedy: str) -> None:
    try:
        with _mmcv_as_mmrazor_wants() if module == 'mmrazor' else nullcontext():
            import_module(module)
    except (ImportError, AssertionError) as error:  # OpenMMLab asserts versions at import
        raise StackError(f'mmkd_plugin cannot use {module} ({error}): run {remedy}.') from error


def leave_multimodal_out() -> None:
    """Makes MMPretrain use placeholders for its models of images and text where transformers is too new for them."""
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
    """Puts a placeholder for MMRazor's quantisation tables where the real ones fail to import."""
    if 'mmrazor.models' in sys.modules or _QUANTISATION in sys.modules:
        return
    try:
        import_module(_QUANTISATION)
    except Exception as error:  # torch 2.x breaks it with ImportError, AttributeError and others
        for name in [name for name in sys.modules if name.startswith('mmrazor.structures')]:
            del sys.modules[name]
        placeholder = ModuleType(_QUANTISATION, f'Placeholder of mmkd_plugin: {error}')
        placeholder.__all__ = []
        for name in ('BackendConfigs', 'QConfigHandler', 'QSchemeHandler'):
            setattr(placeholder, name, _Unavailable(name, error))
        sys.modules[_QUANTISATION] = placeholder


def let_constructors_see_the_student() -> None:
    """Makes MMEngine's ``DefaultOptimWrapperConstructor``, and all that derive from it, take models in parts.

    A model whose class has ``optimised_parts``, a property that gives a student and what is trained beside it, gets
    exactly the parameter groups that its student has when it is trained alone. The parameters beside it get groups of
    their own after these: at the learning rate and weight decay of the optimizer, under the rules of ``paramwise_cfg``
    for kinds of layers, such as ``norm_decay_mult``, but not under ``custom_keys``, which name the student's.
    For other models nothing changes.
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
