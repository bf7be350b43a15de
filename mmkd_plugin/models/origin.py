"""Recorded maps that are derived from a network's output: maps of tokens, and cropped maps.

The network goes on with its output, so the gradient of the task's loss is at the output and not at the derived map.
"""
from collections.abc import Callable

from torch import Tensor

Derive = Callable[[Tensor], Tensor]


def derive(x: Tensor, function: Derive) -> Tensor:
    """Returns ``function(x)``, whose origin is that of ``x`` if it has a gradient."""
    output, earlier = origin(x)
    derived = function(x)
    if x.requires_grad:
        derived.origin = output, lambda gradient: function(earlier(gradient))
    return derived


def origin(x: Tensor) -> tuple[Tensor, Derive]:
    """Returns the output of the network that ``x`` is derived from, and the linear function that derives it."""
    return getattr(x, 'origin', (x, lambda gradient: gradient))
