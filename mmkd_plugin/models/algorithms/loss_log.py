"""Warns of losses that are always zero."""
import logging
import sys
from collections.abc import Collection, Mapping

import torch
from mmengine.logging import print_log
from torch import Tensor


class ZeroWatch:
    """Warns once per loss that is exactly zero for ``window`` iterations.

    The largest values stay on the device and are read once per window. In a compiled training step, nothing is checked.
    """

    def __init__(self, window: int = 100) -> None:
        self.window = window
        self.warned: set[str] = set()
        self.names: tuple[str, ...] = ()

    def __call__(self, losses: Mapping[str, Tensor | list[Tensor]], expected_zero: Collection[str] = ()) -> None:
        """Checks the losses of an iteration, except those in ``expected_zero``, whose weight is zero."""
        if _compiling():
            return
        names = tuple(name for name in losses if 'loss' in name and name not in expected_zero)
        if not names:
            return
        values = torch.stack([_value(losses[name]) for name in names]).abs_()  # (number of losses, )
        if names != self.names:
            self.names, self.largest, self.seen = names, values, 1
        else:
            self.largest, self.seen = torch.maximum(self.largest, values), self.seen + 1
        if self.seen < self.window:
            return
        dead = [name for name, value in zip(names, self.largest.tolist()) if value == 0 and name not in self.warned]
        self.warned.update(dead)
        self.names = ()
        for name in dead:
            print_log(f'{name} has been exactly 0 for {self.window} iterations: the student learns nothing from '
                      'it. Check that it reads the right layers, that their maps have more than one cell, and that the '
                      'images have the annotations it needs.',
                      logger='current', level=logging.WARNING)


def _value(loss: Tensor | list[Tensor]) -> Tensor:
    """Returns a float32 scalar that is 0 only if the loss is."""
    if isinstance(loss, Tensor):
        loss = loss.detach().float()
        return loss if loss.dim() == 0 else loss.abs().mean()
    return sum(_value(part).abs() for part in loss) if len(loss) > 1 else _value(loss[0])


def _compiling() -> bool:
    if 'torch._dynamo' not in sys.modules:
        return False
    return (getattr(torch.compiler, 'is_compiling', None) or torch._utils.is_compiling)()
