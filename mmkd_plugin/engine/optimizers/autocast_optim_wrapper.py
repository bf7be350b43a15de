"""Optimizer wrapper for mixed precision on a CPU, which MMEngine's ``AmpOptimWrapper`` does not support."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from torch import nn

from ...registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Runs the forward pass under bfloat16 autocast, on any device.

    bfloat16 has the range of float32, so losses need no scaling. ``tools/train.py --amp`` uses this wrapper on a
    machine without a GPU. The arguments are those of ``OptimWrapper``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield
