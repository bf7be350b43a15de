"""Precision and memory format of a teacher, independent of the student's."""
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

from ...utils import in_words
from ..recording import PartialForward, change_records

PRECISIONS = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
TOLERANCE = 0.05  # largest relative error of a recorded tensor at which a precision is used


def check_precision(precision: str) -> str:
    """Returns ``precision``, or raises ``ValueError`` if it is unknown."""
    names = ['auto', *PRECISIONS]
    if precision not in names:
        raise ValueError(f'teacher_precision: unknown precision, got {precision!r}, expected one of '
                         f'{", ".join(names)}. "auto" chooses by device')
    return precision


@lru_cache(None)
def cpu_computes_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions (AVX512-BF16 or AMX). Without them, bfloat16 is many times slower."""
    try:
        flags = Path('/proc/cpuinfo').read_text().split()
    except OSError:
        return False
    return 'avx512_bf16' in flags or 'amx_bf16' in flags


def suitable_dtype(device: torch.device, autocast: torch.dtype | None) -> torch.dtype:
    """Returns the precision in which a teacher runs fastest on ``device`` without loss in distillation.

    Args:
        device: device of the teacher.
        autocast: the student's precision with ``--amp``. The teacher uses it on a GPU.
    """
    if device.type == 'cuda':
        return autocast or torch.float16
    if device.type == 'cpu' and cpu_computes_bfloat16():
        return torch.bfloat16
    return torch.float32


class TeacherPrecision:
    """Runs the teacher in half precision and ``channels_last`` on devices that support it.

    The teacher itself stays in float32. Only during a step, its modules hold converted parameters and buffers. So its
    state dict, inherited weights and predictions are in float32. Batch norm keeps its parameters in float32.

    When the teacher first runs on a device, it also runs on that batch in float32, and the records are compared. A
    model that mixes precisions itself (Swin, DETR) cannot run in pure half precision. In this case, autocast is used.
    If a recorded tensor is not finite, or its relative error :math:`|x - x_{32}| / |x_{32}|` is above ``TOLERANCE``,
    0.05, float32 is used. The log has each decision in one line.

    The losses get contiguous records in the dtype of the student's images. Under autocast, where losses accept any
    dtype, records keep their dtype.

    A teacher that is recorded in its loss runs in the student's precision, because its loss would also run in half
    precision.

    Args:
        forward: forward of the teacher.
        precision: ``'float32'``, ``'bfloat16'``, ``'float16'``, or ``'auto'``: float16 on a GPU, or the dtype of
            autocast with ``--amp``; bfloat16 on a CPU with instructions for it; otherwise float32.
        title: name of the teacher in the log.

    With a RetinaNet R18 trained on BCCD and an untrained student, float16 changes recorded maps by 1e-3, losses by at
    most 5e-4 and their gradients by 1e-3; bfloat16 by 1e-2, 8e-3 and 1e-2. Near the end of training, where student
    and teacher agree to 5 %, the gradients change by 1e-2 and 1e-1. The values of AMD's paper form and of attention
    transfer change the most, because they are small differences of large sums: 2e-3 and 7e-2. MSE and PKD change by
    8e-4 and 8e-3.
    """

    def __init__(self, forward: PartialForward, precision: str, title: str = 'the teacher') -> None:
        self.forward = forward
        self.precision = precision
        self.title = title
        self.forms: dict[tuple[torch.device, torch.dtype], _Form] = {}  # by device and requested dtype
        forward.model.register_load_state_dict_post_hook(self.forget)

    def forget(self, *_) -> None:
        """Drops converted weights after the teacher has moved or changed. Also used as a hook."""
        self.forms.clear()

    def __call__(self, inputs: Tensor, data_samples: list | None) -> None:
        """Fills the recorders of the teacher. For the arguments, see :class:`PartialForward`."""
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
            except Exception as error:  # models raise different errors for a dtype that they do not accept
                reasons.append(f'{form.title} fails: {in_words(error)}')
                continue
            error = _relative_error(self._records(), expected)
            if error <= TOLERANCE:
                because = f' ({reasons[0]})' if reasons else ''
                print_log(f'teacher_precision: {self.title} runs in {form.title} on {inputs.device}{because}. The '
                          f'largest relative error of the records is {error:.1e}.', logger='current')
                return form
            reasons.append(f'{form.title} has a relative error of {error:.1e}, above {TOLERANCE}')
        print_log(f'teacher_precision: {self.title} runs in float32 on {inputs.device} instead of {name}: '
                  f'{"; ".join(reasons)}.', logger='current', level=logging.WARNING)
        return plain

    def _records(self) -> list[Tensor]:
        values = tree_flatten([recorder.data_buffer for recorder in self.forward.recorders.recorders.values()
                               if not isinstance(recorder, ParameterRecorder)])[0]
        return [x.detach() for x in values if torch.is_tensor(x) and x.is_floating_point()]


class _Form:
    """One way to run the teacher: unchanged, in ``dtype`` by autocast, or entirely in ``dtype``.

    Args:
        dtype: None for unchanged.
        pure: whether all weights and the memory format are converted; otherwise autocast does the rest.
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
    """Returns (dict that holds the tensor, name, converted value) for each parameter and buffer to convert.

    These are the tensors of all layers except batch norm, which accepts half-precision inputs and is exact in float32.
    If not ``pure``, only the tensors that autocast would convert in every step.
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
    """Returns the largest relative error of a tensor; infinity if a tensor is not finite or is missing."""
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
    """Returns the dtype of autocast on a device type, or None if autocast is off."""
    if device not in ('cuda', 'cpu'):
        return None
    if hasattr(torch, 'get_autocast_dtype'):  # torch >= 2.4
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if device == 'cuda':
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
