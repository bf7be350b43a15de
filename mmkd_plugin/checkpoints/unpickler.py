"""Reader for files of ``torch.save`` that never calls anything in them.

A checkpoint is a pickle, a program that can call any function of any module.
Before torch 2.6, ``torch.load(weights_only=True)`` is not safe (CVE-2025-32434),
accepts no further types, and passes TorchScript archives to ``torch.jit.load``.
From 2.6 on, it refuses types in MMEngine's checkpoints. This reader works with
all versions of torch. It does not use ``torch.load``, nor does it support its
tar files or source code patches.

A name in the pickle becomes a :class:`Name`, which cannot be called. Only
``_MAKERS`` create objects from names and arguments, and only ``_STATES`` set the
state of an object. Both check their input. The file cannot access a function,
class, module or attribute.
"""
import io
import os
import pickle
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from math import prod
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from .safetensors import is_safetensors, read_safetensors

_MAGIC = 0x1950a86a20f9469cfc6c  # first number in a file of torch.save before 1.6
_PROTOCOL = 1001
_HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
_ONE_CYCLE = 'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler'  # its state has its annealing function
_FUNCTIONS = {_HISTORY: ('min', 'max', 'current', 'mean'), _ONE_CYCLE: ('_annealing_cos', '_annealing_linear')}


class RefusedError(ValueError):
    """A file contains more than data; ``wanted`` describes it."""

    def __init__(self, wanted: str) -> None:
        super().__init__(wanted)
        self.wanted = wanted


class Name(NamedTuple):
    """A name in a pickle, such as ``'collections.OrderedDict'``."""
    path: str


class _Storage(NamedTuple):
    data: torch.UntypedStorage
    dtype: torch.dtype


def read_file(source: str | os.PathLike | BinaryIO) -> Any:
    """Returns the content of a file of ``torch.save`` or safetensors, with tensors on the CPU.

    Args:
        source: a path, or a file that is open in binary mode.

    Raises:
        RefusedError: the file contains more than tensors, numbers, text, NumPy arrays, containers and the objects that
            MMEngine stores, or is a TorchScript archive or a tar file.
        Exception: the file is damaged or has another format.
    """
    if not hasattr(source, 'read'):
        with open(source, 'rb') as file:
            return _read(file)
    whole = source.seekable() and source.tell() == 0
    return _read(source if whole else io.BytesIO(source.read()))


def _read(file: BinaryIO) -> Any:
    start = file.read(262)
    size = file.seek(0, 2)
    file.seek(0)
    if start[257:] == b'ustar' or start[:8] == b'storages':
        raise RefusedError('its format, a tar file of torch before 0.1.10')
    if is_safetensors(file, size):
        return read_safetensors(file, size)
    return _read_zip(file, size) if start[:4] == b'PK\x03\x04' else _read_legacy(file, size)


def _read_zip(file: BinaryIO, size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if any(name.endswith('constants.pkl') for name in names):
            raise RefusedError('the code in a TorchScript archive')
        roots = [name.removesuffix('data.pkl') for name in names if name.endswith('/data.pkl')]
        if len(roots) != 1:
            raise ValueError('a zip archive, but not one of torch.save')
        if f'{roots[0]}byteorder' in names and archive.read(f'{roots[0]}byteorder').decode() != sys.byteorder:
            raise ValueError('written on a machine of another byte order')
        storages: dict[str, torch.UntypedStorage] = {}

        def storage(key: str, nbytes: int) -> torch.UntypedStorage:
            if key not in storages:
                storages[key], buffer = _allocate(nbytes, size)
                with archive.open(f'{roots[0]}data/{key}') as record:
                    _fill(buffer, record)
            return storages[key]

        with archive.open(f'{roots[0]}data.pkl') as record:
            return _Unpickler(record, storage).load()


def _read_legacy(file: BinaryIO, size: int) -> Any:
    buffers: dict[str, tuple[torch.UntypedStorage, memoryview]] = {}

    def storage(key: str, nbytes: int) -> torch.UntypedStorage:
        if key not in buffers:
            buffers[key] = _allocate(nbytes, size)
        return buffers[key][0]

    if (_Unpickler(file).load(), _Unpickler(file).load()) != (_MAGIC, _PROTOCOL):
        raise ValueError('not a file of torch.save')
    if _Unpickler(file).load().get('little_endian') != (sys.byteorder == 'little'):
        raise ValueError('written on a machine of another byte order')
    content = _Unpickler(file, storage).load()
    for key in _Unpickler(file).load():
        file.read(8)  # the number of elements, which is in the pickle too
        _fill(buffers[key][1], file)
    return content


def _allocate(nbytes: int, limit: int) -> tuple[torch.UntypedStorage, memoryview]:
    if not 0 <= nbytes <= limit:
        raise ValueError(f'a tensor of {nbytes} bytes in a file of {limit}')
    data = torch.empty(nbytes, dtype=torch.uint8)
    return data.untyped_storage(), memoryview(data.numpy())


def _fill(buffer: memoryview, file: BinaryIO) -> None:
    if file.readinto(buffer) != len(buffer):
        raise EOFError('the file ends within a tensor')


class _Unpickler(pickle._Unpickler):
    """Python's unpickler, without the operations that call something."""
    dispatch = dict(pickle._Unpickler.dispatch)
    for _code in (pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER,
                  pickle.READONLY_BUFFER, pickle.NEWOBJ_EX, pickle.PERSID):
        del dispatch[_code[0]]  # files of torch.save do not use them

    def __init__(self, file: BinaryIO, storage: Callable[[str, int], torch.UntypedStorage] | None = None) -> None:
        super().__init__(file, encoding='utf-8')
        self._storage = storage

    def find_class(self, module: str, name: str) -> Name | torch.dtype:
        path = f'{module}.{name}'.replace('__builtin__.', 'builtins.', 1).replace('numpy._core.', 'numpy.core.', 1)
        if path in _DTYPES:
            return _DTYPES[path]
        if path not in _MAKERS and path not in _NAMES:
            raise RefusedError(f'{module}.{name}')
        return Name(path)

    def persistent_load(self, pid: Any) -> _Storage:
        if not (self._storage and isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == 'storage'
                and isinstance(pid[1], torch.dtype) and isinstance(pid[2], str) and _whole(pid[4])):
            raise RefusedError(f'the persistent object {str(pid)[:100]}')
        if pid[5:] not in ((), (None, )):
            raise RefusedError('views of storages, which torch before 0.4 wrote')
        return _Storage(self._storage(pid[2], pid[4] * pid[1].itemsize), pid[1])

    def _make(self) -> None:
        arguments = self.stack.pop()
        name = self.stack.pop()
        if not isinstance(name, Name) or name.path not in _MAKERS or not isinstance(arguments, tuple):
            raise RefusedError(f'a call of {str(name)[:100]}')
        self.append(_MAKERS[name.path](*arguments))

    def _give_state(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if type(made) not in _STATES:
            raise RefusedError(f'a state for {type(made).__name__}')
        _STATES[type(made)](made, state)

    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = _make
    dispatch[pickle.BUILD[0]] = _give_state


def _whole(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise RefusedError(what)


def _tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, requires_grad: bool = False, hooks: Any = None,
            metadata: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """Like ``torch._utils._rebuild_tensor_v2``, but refuses hooks and tensors beyond their storage."""
    size, stride = tuple(size), tuple(stride)
    _require(isinstance(storage, _Storage) and len(size) == len(stride) and _whole(offset, *size, *stride)
             and not metadata and not hooks, 'a tensor of another kind')
    dtype = dtype or storage.dtype
    end = offset + sum((length - 1) * step for length, step in zip(size, stride)) + 1 if prod(size) else 0
    _require(end * dtype.itemsize <= storage.data.nbytes(), 'a tensor beyond its data')
    return torch.empty(0, dtype=dtype).set_(storage.data, offset, size, stride).requires_grad_(requires_grad is True)


def _tensor_v3(storage: _Storage, offset: int, size: tuple, stride: tuple, requires_grad: bool, hooks: Any,
               dtype: torch.dtype, metadata: Any = None) -> Tensor:
    return _tensor(storage, offset, size, stride, requires_grad, hooks, metadata, dtype)


def _parameter(data: Tensor, requires_grad: bool = True, hooks: Any = None) -> nn.Parameter:
    _require(type(data) is Tensor and not hooks, 'a parameter of another kind')
    return nn.Parameter(data, requires_grad=requires_grad is True)


def _parameter_state(parameter: nn.Parameter, state: Any) -> None:
    _require(isinstance(state, tuple) and len(state) == 3 and not state[2], 'a state of a parameter')  # torch < 0.4
    parameter.requires_grad_(state[0] is True)


def _defaultdict(factory: Name | None = None, *items: Any) -> defaultdict:
    _require(factory is None or factory in _FACTORIES, f'a defaultdict of {factory}')
    return defaultdict(_FACTORIES.get(factory), *items)


def _ndarray(kind: Name, shape: tuple, code: Any) -> np.ndarray:
    _require(kind == Name('numpy.ndarray'), f'an array of type {kind}')
    return np.empty(0, np.int8)  # its state follows


def _ndarray_state(array: np.ndarray, state: Any) -> None:
    _require(isinstance(state, tuple) and len(state) == 5, 'a state of an array')
    version, shape, dtype, fortran, data = state
    _require(version == 1 and isinstance(shape, tuple) and _whole(*shape) and _plain(dtype)
             and isinstance(data, bytes) and prod(shape) * dtype.itemsize == len(data), f'an array of {dtype}')
    array.__setstate__((1, shape, dtype, fortran is True, data))


def _scalar(dtype: np.dtype, data: bytes) -> np.generic:
    _require(_plain(dtype) and isinstance(data, bytes) and len(data) == dtype.itemsize > 0, f'a scalar of {dtype}')
    return np.frombuffer(data, dtype)[0]


def _plain(dtype: Any) -> bool:
    """Whether items of the dtype are numbers or text. Records are not, because they may contain Python objects."""
    return isinstance(dtype, np.dtype) and dtype.kind in 'biufcSU' and dtype.names is None


def _numpy_dtype(code: str, align: Any = False, copy: Any = False) -> np.dtype:
    _require(isinstance(code, str), 'a dtype that is not a name')
    dtype = np.dtype(code, copy=True)
    _require(_plain(dtype), f'arrays of {code}')
    return dtype


def _numpy_dtype_state(dtype: np.dtype, state: Any) -> None:
    given = dtype.__reduce__()[2]
    _require(isinstance(state, tuple) and state[0] == 3 and state[1] in ('<', '>', '|', '=')
             and state[2:] == given[2:], 'a state of a dtype')
    dtype.__setstate__(state)


def _method(owner: Name, name: str) -> Name:
    """Returns the name of a method that MMEngine stores besides data; its owner already has the method."""
    _require(isinstance(owner, Name) and name in _FUNCTIONS.get(owner.path, ()), f'getattr({owner}, {name!r})')
    return Name(f'{owner.path}.{name}')


def _history_state(buffer: HistoryBuffer, state: Any) -> None:
    _require(isinstance(state, dict) and set(state) <= {'max_length', '_log_history', '_count_history',
                                                        'statistics_methods'}, 'a state of a HistoryBuffer')
    buffer.max_length = int(state.get('max_length', buffer.max_length))
    for key in ('_log_history', '_count_history'):
        _require(isinstance(state.get(key), np.ndarray), f'a HistoryBuffer without {key}')
        setattr(buffer, key, state[key])


def _ordered_dict_state(made: OrderedDict, state: Any) -> None:
    _require(isinstance(state, dict) and set(state) <= {'_metadata'}, 'a state of an OrderedDict')
    if state:  # the module versions of Module.state_dict
        made._metadata = state['_metadata']


def _encoded(text: str, encoding: str) -> bytes:
    _require(isinstance(text, str) and encoding in ('latin1', 'latin-1'), 'an encoding')
    return text.encode('latin1')  # bytes in pickles before protocol 3


_FACTORIES = {Name(f'builtins.{kind.__name__}'): kind for kind in (list, dict, set, int, float, str, bool, tuple)}
_FACTORIES[None] = None
_FACTORIES[Name('collections.OrderedDict')] = OrderedDict

# Names that a file may contain, but not call.
_NAMES = {'numpy.ndarray', *(name.path for name in _FACTORIES if name), *_FUNCTIONS,
          *(f'{owner}.{name}' for owner, names in _FUNCTIONS.items() for name in names)}

_DTYPES = {f'torch.{name}Storage': getattr(torch, dtype) for name, dtype in (
    ('Double', 'float64'), ('Float', 'float32'), ('Half', 'float16'), ('BFloat16', 'bfloat16'), ('Long', 'int64'),
    ('Int', 'int32'), ('Short', 'int16'), ('Char', 'int8'), ('Byte', 'uint8'), ('Bool', 'bool'),
    ('ComplexDouble', 'complex128'), ('ComplexFloat', 'complex64'))}
_DTYPES['torch.storage.UntypedStorage'] = torch.uint8
_DTYPES.update({f'torch.{name}': value for name, value in vars(torch).items() if isinstance(value, torch.dtype)})

_MAKERS: dict[str, Callable] = {
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_v3,
    'torch._utils._rebuild_parameter': _parameter,
    'torch.nn.parameter.Parameter': _parameter,
    'torch.Size': lambda size=(): torch.Size(size),
    'torch.device': lambda *args: torch.device(*args),
    'collections.OrderedDict': lambda items=(): OrderedDict(items),
    'collections.Counter': lambda items=(): Counter(items),
    'collections.defaultdict': _defaultdict,
    'builtins.set': lambda items=(): set(items),
    'builtins.frozenset': lambda items=(): frozenset(items),
    'builtins.complex': lambda real, imag: complex(real, imag),
    'builtins.bytes': lambda: b'',
    'builtins.getattr': _method,
    '_codecs.encode': _encoded,
    'numpy.core.multiarray._reconstruct': _ndarray,
    'numpy.core.multiarray.scalar': _scalar,
    'numpy.dtype': _numpy_dtype,
    'mmengine.config.config.ConfigDict': lambda items=(): ConfigDict(items),
    _HISTORY: lambda: HistoryBuffer(),
}

_STATES: dict[type, Callable[[Any, Any], None]] = {
    OrderedDict: _ordered_dict_state,
    HistoryBuffer: _history_state,
    np.ndarray: _ndarray_state,
    nn.Parameter: _parameter_state,
}
_STATES.update(dict.fromkeys({type(np.dtype(code)) for code in '?bhilqBHILQefdgFDGSU'}, _numpy_dtype_state))
