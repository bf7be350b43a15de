"""The precision and memory format in which a teacher runs, whatever those of the student."""
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path

import torch
from mmengine.logging import print_log
from mmrazor.models.task_modules import ParameterRecorder
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten

from ..recording import PartialForward, change_records

PRECISIONS = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
TOLERANCE = 0.05  # relative error of a recorded tensor, beyond which a precision is not taken


def check_precision(precision: str) -> str:
    """Returns ``precision``, else raises ``ValueError``."""
    names = ['auto', *PRECISIONS]
    if precision not in names:
        raise ValueError(f'teacher_precision: unknown precision, got {precision!r}, expected one of '
                         f'{", ".join(names)}. "auto" suits the device')
    return precision


@lru_cache(None)
def cpu_computes_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 (AVX512-BF16 or AMX); without them it is many times slower."""
    try:
        flags = Path('/proc/cpuinfo').read_text().split()
    except OSError:
        return False
    return 'avx512_bf16' in flags or 'amx_bf16' in flags


def suitable_dtype(device: torch.device, autocast: torch.dtype | None) -> torch.dtype:
    """Returns the precision in which a teacher runs fastest on ``device``, without loss for what it teaches.

    Args:
        device: where the teacher is.
        autocast: the student's precision under ``--amp``, which the teacher follows where the device computes in it.
    """
    if device.type == 'cuda':
        return autocast or torch.float16
    if device.type == 'cpu' and cpu_computes_bfloat16():
        return torch.bfloat16
    return torch.float32


class TeacherPrecision:
    """Runs the teacher as inference does: in half precision and ``channels_last``, where the device is made for it.

    The teacher itself stays in float32: in a step, and only there, its modules hold converted parameters and
    buffers. So its state dict, what is inherited from it, and its predictions are those of float32. Batch norm keeps
    its parameters in float32.

    When the teacher first runs on a device, it runs on that batch in float32 as well, and what is recorded is
    compared. A model that mixes precisions by itself (Swin, DETR) cannot run in pure half: then autocast is taken.
    Where a recorded tensor is not finite, or its relative error :math:`|x - x_{32}| / |x_{32}|` is above
    ``TOLERANCE``, 0.05, float32 is taken. Each decision is one line in the log.

    Records reach the losses in the dtype of the student's images and contiguous. Under autocast, where losses take
    any dtype, they keep theirs.

    A teacher that is recorded in its loss, which would compute in half too, runs as the student does.

    Args:
        forward: the teacher's.
        precision: ``'float32'``, ``'bfloat16'``, ``'float16'``, or ``'auto'``: float16 on a GPU, the dtype of
            autocast under ``--amp``; bfloat16 on a CPU with instructions for it; else float32.
        title: what the log calls the teacher.

    A RetinaNet R18 trained on BCCD, against a student at its start: float16 changes recorded maps by 1e-3, losses by at
    most 5e-4 and their gradients by 1e-3, bfloat16 by 1e-2, 8e-3 and 1e-2. Near the end of training, where student
    and teacher agree to 5 %, the gradients change by 1e-2 and 1e-1. AMD's paper form and attention transfer, which see
    small differences of large sums, change in value the most: 2e-3 and 7e-2, where MSE and PKD change by 8e-4 and 8e-3.
    """

    def __init__(self, forward: PartialForward, precision: str, title: str = 'the teacher') -> None:
        self.forward = forward
        self.precision = precision
        self.title = title
        self.forms: dict[tuple[torch.device, torch.dtype], _Form] = {}  # decided, by device and wanted dtype
        forward.model.register_load_state_dict_post_hook(self.forget)

    def forget(self, *_) -> None:
        """Drops converted weights: the teacher has moved or changed. Serves as a hook, too."""
        self.forms.clear()

    def __call__(self, inputs: Tensor, data_samples: list | None) -> None:
        """Fills the recorders of the teacher. Args: as :class:`PartialForward`'s."""
        autocast = _autocast_dtype(inputs.device.type)
        if self.forward.mode == 'loss' or not inputs.is_floating_point():
            self.forward(inputs, data_samples)
            return
        dtype = suitable_dtype(inputs.device, autocast) if self.precision == 'auto' else PRECISIONS[self.precision]
        key = inputs.device, dtype
        if key not in self.forms:
            self.forms[key] = self._decide(dtype, inputs, data_samples)
        self.forms[key](inputs, data_samples)
        if self.forms[key].changes_records(inputs):
            change_records(self.forward.recorders, lambda x: x.to(
                x.dtype if autocast or not x.is_floating_point() else inputs.dtype,
                memory_format=torch.contiguous_format))

    def _decide(self, dtype: torch.dtype, inputs: Tensor, data_samples: list | None) -> '_Form':
        plain = _Form(self.forward)
        if dtype == torch.float32:
            return plain
        plain(inputs, data_samples)
        expected = self._records()
        name = str(dtype).removeprefix('torch.')
        reasons = []
        for form in (_Form(self.forward, dtype, pure=True), _Form(self.forward, dtype)):
            try:
                form(inputs, data_samples)
            except Exception as error:  # whatever a model answers to a dtype that it does not expect
                reasons.append(f'{form.title} fails: {str(error).splitlines()[0][:120]}')
                continue
            error = _relative_error(self._records(), expected)
            if error <= TOLERANCE:
                because = f' ({reasons[0]})' if reasons else ''
                print_log(f'teacher_precision: {self.title} runs in {form.title} on {inputs.device}{because}; the '
                          f'largest relative error of what is recorded is {error:.1e}.', logger='current')
                return form
            reasons.append(f'{form.title} has a relative error of {error:.1e}, above {TOLERANCE}')
        print_log(f'teacher_precision: {self.title} runs in float32 on {inputs.device}, for {name} does not suit it: '
                  f'{"; ".join(reasons)}.', logger='current', level=logging.WARNING)
        return plain

    def _records(self) -> list[Tensor]:
        values = tree_flatten([recorder.data_buffer for recorder in self.forward.recorders.recorders.values()
                               if not isinstance(recorder, ParameterRecorder)])[0]
        return [x.detach() for x in values if torch.is_tensor(x) and x.is_floating_point()]


class _Form:
    """One way to run the teacher: as it is, in ``dtype`` by autocast, or purely in it.

    Args:
        dtype: None is as it is.
        pure: converts all weights, and the layout; else autocast does what is left to do.
    """

    def __init__(self, forward: PartialForward, dtype: torch.dtype | None = None, pure: bool = False) -> None:
        self.forward = forward
        self.dtype = dtype
        self.pure = pure
        self.lent = _converted(forward.model, dtype, pure) if dtype else []
        self.own_dtype = next(forward.model.parameters()).dtype

    @property
    def title(self) -> str:
        name = str(self.dtype).removeprefix('torch.')
        return f'{name} and channels_last' if self.pure else f'{name} by autocast'

    def __call__(self, inputs: Tensor, data_samples: list | None) -> None:
        if self.pure:
            inputs = inputs.to(self.dtype, memory_format=torch.channels_last)
        elif not self.dtype:
            inputs = inputs.to(self.own_dtype)
        kind = inputs.device.type
        autocast = nullcontext() if kind not in ('cuda', 'cpu') else (
            torch.autocast(kind, enabled=False) if self.pure or not self.dtype else torch.autocast(kind, self.dtype))
        with autocast, _lend(self.lent):
            self.forward(inputs, data_samples)

    def changes_records(self, inputs: Tensor) -> bool:
        return self.dtype is not None or inputs.dtype != self.own_dtype


def _converted(model: nn.Module, dtype: torch.dtype, pure: bool) -> list[tuple[dict, str, Tensor]]:
    """Returns where each parameter and buffer to convert is held, its name there and its converted value.

    They are those of all layers but batch norm, which is exact in float32 and takes half; if not ``pure``, only those
    that autocast would convert in every step.
    """
    found, done = [], {}
    for module in model.modules():
        if isinstance(module, _BatchNorm) or not (pure or isinstance(module, (nn.Conv2d, nn.Linear))):
            continue
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is None or not value.is_floating_point():
                    continue
                if id(value) not in done:
                    format_ = torch.channels_last if value.dim() == 4 else torch.contiguous_format
                    done[id(value)] = value.detach().to(dtype, memory_format=format_)
                found.append((held, name, done[id(value)]))
    return found


@contextmanager
def _lend(lent: list[tuple[dict, str, Tensor]]) -> Iterator[None]:
    own = [held[name] for held, name, _ in lent]
    for held, name, value in lent:
        held[name] = value
    try:
        yield
    finally:
        for (held, name, _), value in zip(lent, own):
            held[name] = value


def _relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Returns the largest relative error of a tensor, infinite where one is not finite or is missing."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float('inf')
    errors = [0.]
    for x, y in zip(found, expected):
        x, y = x.float(), y.float()
        scale = float(y.norm())
        error = float((x - y).norm()) / scale if scale else float(x.norm())
        errors.append(error if error == error else float('inf'))
    return max(errors)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """Returns the dtype of autocast on a type of device, if it is on."""
    if device not in ('cuda', 'cpu'):
        return None
    if hasattr(torch, 'get_autocast_dtype'):  # torch >= 2.4
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if device == 'cuda':
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
