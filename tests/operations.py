"""What a piece of code asks of a device, seen from a CPU: how many operations, and on which devices.

On a GPU, each operation is at least one kernel launch.
"""
from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class _Recorder(TorchDispatchMode):

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_flatten((args, kwargs, result))[0] if isinstance(x, torch.Tensor)]
        view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if tensors and not view:
            self.counts[func.overloadpacket.__name__] += 1
        self.devices |= {x.device.type for x in tensors}
        return result


def count_operations(function: Callable[[], object]) -> Counter[str]:
    """Returns how often ``function`` runs each tensor operation, in forward and backward passes.

    Views are left out. Operations that only allocate, such as ``empty_like``, are not.
    """
    with _Recorder() as recorder:
        function()
    return recorder.counts


def devices_of(function: Callable[[], object]) -> set[str]:
    """Returns the types of the devices on which ``function`` reads or makes tensors.

    The ``meta`` device is a second device for a machine without a GPU: it refuses ``.item()`` and most mixtures with
    CPU tensors. This finds the rest, such as an index on the CPU.
    """
    with _Recorder() as recorder:
        function()
    return recorder.devices
