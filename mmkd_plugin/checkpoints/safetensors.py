"""Reads files of the safetensors format, which hold tensors by name and nothing else.

Format, from the documentation of Hugging Face's safetensors: eight bytes, the length N of a header as an unsigned
little-endian number; N bytes of JSON, by name ``dtype``, ``shape`` and ``data_offsets`` of a tensor, and texts under
``__metadata__``; then the tensors, row by row, in little-endian order. The offsets count from the end of the header.
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
    """Whether the file begins as the format does; afterwards it is at its start."""
    start = file.read(9)
    file.seek(0)
    return len(start) == 9 and start[8:] == b'{' and 2 <= struct.unpack('<Q', start[:8])[0] <= size - 8


def read_safetensors(file: BinaryIO, size: int) -> dict[str, Tensor]:
    """Returns the tensors by name.

    Args:
        file: at its start.
        size: of the file, in bytes.

    Raises:
        ValueError: the file is damaged, or holds a dtype that torch does not have.
    """
    length, = struct.unpack('<Q', file.read(8))
    header = json.loads(file.read(length))
    header.pop('__metadata__', None)
    found = {}
    for name, entry in header.items():
        shape, (begin, end) = entry['shape'], entry['data_offsets']
        if entry['dtype'] not in _DTYPES:
            raise ValueError(f'{name}: dtype {entry["dtype"]} is none of {", ".join(_DTYPES)}')
        dtype = _DTYPES[entry['dtype']]
        if not all(type(value) is int and value >= 0 for value in (*shape, begin, end)):
            raise ValueError(f'{name}: shape {shape} and offsets {begin}, {end} must be whole numbers from 0')
        if end - begin != prod(shape) * dtype.itemsize or 8 + length + end > size:
            raise ValueError(f'{name}: {end - begin} bytes at {begin} are not what {entry["dtype"]} of shape {shape} '
                             'takes, or lie beyond the file')
        data = torch.empty(end - begin, dtype=torch.uint8)
        file.seek(8 + length + begin)
        if data.numel() and file.readinto(memoryview(data.numpy())) != data.numel():
            raise EOFError('the file ends within a tensor')
        found[name] = data.view(dtype).view(shape)
    return found
