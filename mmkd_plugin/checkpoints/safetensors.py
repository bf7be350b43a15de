"""Reader for safetensors files, which contain named tensors and nothing else.

The format, from the documentation of Hugging Face's safetensors: eight bytes with the length N of the header as an
unsigned little-endian integer; N bytes of JSON with ``dtype``, ``shape`` and ``data_offsets`` of each tensor by name,
and strings under ``__metadata__``; then the tensors in row-major, little-endian order. Offsets count from the end of
the header.
"""
import json
import struct
from math import prod
from typing import BinaryIO

import torch
from torch import Tensor

_DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
               I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)


def is_safetensors(file: BinaryIO, size: int) -> bool:
    """Whether the file begins like a safetensors file. Seeks to its start afterwards."""
    start = file.read(9)
    file.seek(0)
    return len(start) == 9 and start[8:] == b'{' and 2 <= struct.unpack('<Q', start[:8])[0] <= size - 8


def read_safetensors(file: BinaryIO, size: int) -> dict[str, Tensor]:
    """Returns the tensors by name.

    Args:
        file: an open file, at its start.
        size: size of the file in bytes.

    Raises:
        ValueError: the file is damaged, or has a dtype that torch does not have.
    """
    length, = struct.unpack('<Q', file.read(8))
    header = json.loads(file.read(length))
    header.pop('__metadata__', None)
    found = {}
    for name, entry in header.items():
        shape, (begin, end) = entry['shape'], entry['data_offsets']
        if entry['dtype'] not in _DTYPES:
            raise ValueError(f'{name}: unknown dtype {entry["dtype"]}, expected one of {", ".join(_DTYPES)}')
        dtype = _DTYPES[entry['dtype']]
        if not all(type(value) is int and value >= 0 for value in (*shape, begin, end)):
            raise ValueError(f'{name}: shape {shape} and offsets {begin}, {end} must be whole numbers >= 0')
        if end - begin != prod(shape) * dtype.itemsize or 8 + length + end > size:
            raise ValueError(f'{name}: {end - begin} bytes at {begin} do not fit {entry["dtype"]} of shape {shape}, or '
                             'lie beyond the end of the file')
        data = torch.empty(end - begin, dtype=torch.uint8)
        file.seek(8 + length + begin)
        if data.numel() and file.readinto(memoryview(data.numpy())) != data.numel():
            raise EOFError('the file ends within a tensor')
        found[name] = data.view(dtype).view(shape)
    return found
