"""Running a model with MMRazor's recorders, only as far as they read."""
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.logging import print_log
from mmrazor.models.task_modules import ModuleInputsRecorder, ModuleOutputsRecorder, ParameterRecorder, RecorderManager
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_flatten, tree_map

from ..utils import check_dict, closest, in_words, type_name
from .dummy_input import dummy_inputs, dummy_size


def check_wiring(distiller: dict) -> None:
    """Raises ``ValueError`` for a field in the config of a distiller that must be a dict or a name, but is not."""
    _check_name('distiller.type', check_dict('distiller', distiller).get('type') or None)
    for field in ('student_recorders', 'teacher_recorders', 'connectors', 'distill_losses'):
        for name, part in check_dict(f'distiller.{field}', distiller.get(field) or {}).items():
            place = f'distiller.{field}.{name}'
            for each in part if field == 'connectors' and isinstance(part, list) else [part]:  # a sequence
                _check_name(f'{place}.type', check_dict(place, each).get('type') or None)
            if 'recorder' in field and 'source' in part:
                _check_name(f'{place}.source', part['source'])
    mappings = check_dict('distiller.loss_forward_mappings', distiller.get('loss_forward_mappings') or {})
    for loss, inputs in mappings.items():
        for name, entry in check_dict(f'distiller.loss_forward_mappings.{loss}', inputs).items():
            place = f'distiller.loss_forward_mappings.{loss}.{name}'
            _check_name(f'{place}.recorder', check_dict(place, entry).get('recorder'))


def _check_name(field: str, name: str | type | None) -> None:
    if not isinstance(name, (str, type)):
        raise ValueError(f'{field} must be a name, got {name!r}')


class UnknownLayerError(ValueError):
    """The ``source`` of a recorder is not a layer or parameter of ``model``."""

    def __init__(self, message: str, model: nn.Module, source: str) -> None:
        super().__init__(message)
        self.model, self.source = model, source

    def of_pair(self, student: nn.Module, teacher: nn.Module) -> str:
        """Returns the message with the network it refers to, and whether the other network has the layer."""
        (whose, _), (others, other) = sorted((('student', student), ('teacher', teacher)),
                                             key=lambda side: side[1] is not self.model)
        known = {name for names in (other.named_modules(), other.named_parameters()) for name, _ in names}
        return f'{self}. This is the {whose}' + (
            f'. The {others}, {type(other).__name__}, has it. In a pair (student, teacher), the layer of the student '
            'comes first' if self.source in known else '')


def check_sources(recorders: dict[str, dict] | None, model: nn.Module, field: str) -> None:
    """Raises :class:`UnknownLayerError`, with the closest names, if a recorder's source does not exist.

    Args:
        recorders: configs of recorders, by name.
        model: the model whose layers they record.
        field: the config field of the recorders.
    """
    for name, recorder in (recorders or {}).items():
        kind, source = type_name(recorder.get('type')), recorder.get('source')
        if kind in ('ModuleOutputs', 'MapOutputs', 'ModuleInputs'):
            known = [name for name, _ in model.named_modules()]  # '' is the model itself
        elif kind == 'Parameter':
            known = [name for name, _ in model.named_parameters()]
        else:
            continue
        if source not in known:
            raise UnknownLayerError(f'{field}.{name}: {type(model).__name__} has no {source!r}; '
                                    f'{closest(source, filter(None, known))}', model, source)


def merged(managers: Mapping[str, RecorderManager]) -> RecorderManager:
    """Returns a manager of the recorders of all ``managers`` of one model, under ``NAME.RECORDER``."""
    whole = RecorderManager()
    whole.recorders.update({f'{name}.{key}': recorder for name, manager in managers.items()
                            for key, recorder in manager.recorders.items()})
    return whole


class _Recorded(Exception):
    """Stops a forward pass in which all outputs to read are recorded."""


class PartialForward:
    """Runs ``model`` until all outputs to read are recorded, then stops it.

    With recorders of the neck, the head does not run. With recorders of the
    second stage of a backbone, the third does not run. No loss is computed. If
    a recorder is of a function or method, or of a part of the head that a dummy
    input does not reach (``head.loss_module``), the whole model runs in mode
    ``loss``, as in MMRazor.

    Args:
        model: the network; ``recorders`` have been initialised with it.
        recorders: MMRazor's manager of the network's recorders.
        calls: number of calls of a recorder's source to read, by the name of
            the recorder; by default 1.
    """

    def __init__(self, model: nn.Module, recorders: RecorderManager, calls: dict[str, int]) -> None:
        self.model = model
        self.recorders = recorders
        self._needed = []
        self._hooks = []
        self._running = False
        self.to_the_end = False
        self.mode = 'tensor'
        modules = dict(model.named_modules())
        for name, recorder in recorders.recorders.items():
            if isinstance(recorder, (ModuleOutputsRecorder, ModuleInputsRecorder)):
                self._needed.append((recorder, calls.get(name, 1)))
                self._hooks.append(modules[recorder.source].register_forward_hook(self._stop_if_recorded))
            elif not isinstance(recorder, ParameterRecorder):
                self.mode = 'loss'

    def _stop_if_recorded(self, *_) -> None:
        if self._running and not self.to_the_end and self.mode == 'tensor' and all(
                len(recorder.data_buffer) >= count for recorder, count in self._needed):
            raise _Recorded

    def __call__(self, inputs: torch.Tensor, data_samples: list | None) -> None:
        """Fills the recorders' buffers.

        Raises:
            ValueError: a recorded layer does not run in the model's forward pass.
        """
        if not self.recorders.recorders and self.mode == 'tensor':
            return
        self._running = True
        try:
            with self.recorders:
                self.model(inputs, data_samples, mode=self.mode)
        except _Recorded:
            return
        finally:
            self._running = False
        silent = self.silent()
        if silent:
            raise ValueError(f'{type(self.model).__name__} did not run {", ".join(silent)}, or not often enough, in '
                             f'its forward pass in mode {self.mode!r}. Record another layer')

    def silent(self) -> list[str]:
        """Returns the sources that ran less often than is read."""
        return [recorder.source for recorder, count in self._needed if len(recorder.data_buffer) < count]

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def record_dummy_input(model: nn.Module, recorders: RecorderManager, calls: dict[str, int] | None = None,
                       to_the_end: bool = False) -> None:
    """Fills the recorders from one dummy input, in eval mode, to get shapes at build time.

    Recorders of layers that run only in the loss stay empty, because a loss needs ground truth. With ``to_the_end`` the
    whole model runs, so that every call of a layer is recorded. If that fails, the model stops after the first call.
    The recorded tensors are on the CPU, where distillers are built, whatever the model's device.

    Raises:
        ValueError: the model does not run on the dummy input, or does not run a recorded layer.
    """
    forward = PartialForward(model, recorders, calls or {})
    if to_the_end and forward.mode == 'tensor':
        forward.to_the_end = True
        try:
            with evaluating(model):
                forward(*dummy_inputs(model))
            change_records(recorders, Tensor.cpu)
            forward.remove()
            return
        except Exception:  # some heads need ground truth; backbone and neck do not
            forward.to_the_end = False
            for recorder in recorders.recorders.values():
                recorder.reset_data_buffer()
    if forward.mode == 'tensor':
        try:
            with evaluating(model):
                forward(*dummy_inputs(model))
        except ValueError:
            if not all('head.' in source for source in forward.silent()):
                raise
        except Exception as error:  # models raise many types
            size = ' x '.join(map(str, dummy_size(model)))
            raise ValueError(f'{type(model).__name__} does not run on one image of {size}, {in_words(error)}. '
                             f'If its images have another size, set input_size, or teacher_input_size for a '
                             'teacher') from error
        change_records(recorders, Tensor.cpu)
    forward.remove()


def change_records(recorders: RecorderManager, change: Callable[[Tensor], Tensor]) -> None:
    """Replaces every recorded tensor, in containers too, by the result of ``change``."""
    for recorder in recorders.recorders.values():
        if not isinstance(recorder, ParameterRecorder):
            recorder.data_buffer[:] = tree_map(lambda x: change(x) if torch.is_tensor(x) else x, recorder.data_buffer)


def layers_in_place(model: nn.Module) -> list[nn.Module]:
    """Returns the layers of backbone and neck that write in place, without dropout, which does so in training only."""
    return [layer for name, part in model.named_children() if name in ('backbone', 'neck') for layer in part.modules()
            if getattr(layer, 'inplace', False) and not isinstance(layer, _DropoutNd)]


def write_in_place(layers: list[nn.Module], model: nn.Module, recorders: RecorderManager) -> None:
    """Makes ``layers`` write in place again, unless that changes a recorded tensor.

    MMRazor switches writing in place off. Switching it on again saves the time and memory of copies. If a dummy input
    cannot check this, the layers stay as they are. This is the case for recorded functions and methods, and for a model
    whose ``extract_feat`` does not take the image.
    """
    _set_in_place(layers, True)
    try:
        lost = _written_over(model, recorders)
    except Exception:  # models raise many types; MMRazor's setting works for all models
        _set_in_place(layers, False)
        return
    if lost:
        _set_in_place(layers, False)
        lost = _written_over(model, recorders)
    if lost:
        print_log(f'{type(model).__name__} seems to overwrite the recorded output of {", ".join(lost)} with an '
                  'in-place operation such as +=. The loss would read the changed values. Record the layer that ends '
                  'with this operation.', logger='current', level=logging.WARNING)


def _set_in_place(layers: list[nn.Module], value: bool) -> None:
    for layer in layers:
        layer.inplace = value


@torch.no_grad()
def _written_over(model: nn.Module, recorders: RecorderManager) -> list[str]:
    """Returns the sources whose recorded output or input ``extract_feat`` overwrites later."""
    seen: list[tuple[str, torch.Tensor, int]] = []
    modules, hooks = dict(model.named_modules()), []
    try:
        for recorder in recorders.recorders.values():
            def note(_, *passed, source=recorder.source) -> None:  # (inputs) or (inputs, outputs); records the last
                seen.extend((source, x, x._version) for x in tree_flatten(passed[-1])[0] if torch.is_tensor(x))
            if isinstance(recorder, ModuleInputsRecorder):
                hooks.append(modules[recorder.source].register_forward_pre_hook(note))
            elif isinstance(recorder, ModuleOutputsRecorder):
                hooks.append(modules[recorder.source].register_forward_hook(note))
            elif not isinstance(recorder, ParameterRecorder):
                raise ValueError(f'{recorder.source} does not show on a dummy input')
        if hooks:
            with evaluating(model):
                model.extract_feat(dummy_inputs(model)[0])
    finally:
        for hook in hooks:
            hook.remove()
    return sorted({source for source, x, version in seen if x._version != version})


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context for eval mode. It restores the mode of every module."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Context for eval mode without gradient. It restores all modes and random states."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices), torch.no_grad(), evaluating(model):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def keep_statistics(model: nn.Module) -> Iterator[None]:
    """Context in which batch norm in training mode does not update its running statistics."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def random_stream_kept() -> Iterator[None]:
    """Context that restores torch's random states of the CPU and the current GPU."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield
