"""What the log says of losses beyond their values: what they are without their weights, and which are dead."""
import logging
import re
import sys
from collections.abc import Collection, Mapping

import torch
from mmengine.logging import print_log
from mmrazor.models.distillers import ConfigurableDistiller
from torch import Tensor

UNWEIGHTED = 'unweighted.'
_DAM_PART = re.compile(r'loss_(dam_(?:detect|area|anchor))(?:_.+)?')


def loss_weight(distiller: ConfigurableDistiller, name: str) -> float:
    """Returns the weight within a distillation loss: its module's ``loss_weight``, or DAM's of that part; 1 if none."""
    part = _DAM_PART.fullmatch(name)
    if name in distiller.distill_losses:
        weight = getattr(distiller.distill_losses[name], 'loss_weight', 1.0)
    elif part and getattr(distiller, 'dams', None):
        weight = getattr(next(iter(distiller.dams.values())), f'{part[1].removeprefix("dam_")}_loss_weight')
    else:
        weight = 1.0
    return float(weight) if isinstance(weight, (int, float)) else 1.0


def unweighted(distiller: ConfigurableDistiller, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns, for the log only, each distillation loss divided by its weight; ``loss_amd`` as ``unweighted.loss_amd``.

    MMEngine's log averages what has ``loss`` in its name, and its ``parse_losses`` adds it up: the algorithm's own
    leaves these out. Of a loss of weight 0 nothing is known.

    Args:
        losses: as the modules return them, before any schedule.
    """
    weights = {name: loss_weight(distiller, name) for name in losses}
    return {f'{UNWEIGHTED}{name}': losses[name].detach() / weight for name, weight in weights.items() if weight}


class ZeroWatch:
    """Warns, once of each, of losses that are exactly zero throughout ``window`` iterations.

    The largest values are kept on the device, which is asked once a window. Within a compiled training step it
    does nothing.
    """

    def __init__(self, window: int = 100) -> None:
        self.window = window
        self.told: set[str] = set()
        self.names: tuple[str, ...] = ()

    def __call__(self, losses: Mapping[str, Tensor | list[Tensor]], meant: Collection[str] = ()) -> None:
        """Looks at the losses of an iteration; those in ``meant`` are zero by intention."""
        if _compiling():
            return
        names = tuple(name for name in losses if 'loss' in name and name not in meant)
        if not names:
            return
        values = torch.stack([_value(losses[name]) for name in names])  # (number of losses, )
        if names != self.names:
            self.names, self.largest, self.seen = names, values, 1
        else:
            self.largest, self.seen = torch.maximum(self.largest, values), self.seen + 1
        if self.seen < self.window:
            return
        dead = [name for name, value in zip(names, self.largest.tolist()) if value == 0 and name not in self.told]
        self.told.update(dead)
        self.names = ()
        for name in dead:
            print_log(f'{name} has been exactly 0 for {self.window} iterations: nothing is learnt from it. Does it '
                      'read the layers that are meant, of more than one cell, and have the images what it needs?',
                      logger='current', level=logging.WARNING)


def _value(loss: Tensor | list[Tensor]) -> Tensor:
    if isinstance(loss, Tensor):
        return loss.detach().float().abs().mean()
    return sum(_value(part) for part in loss)


def _compiling() -> bool:
    if 'torch._dynamo' not in sys.modules:
        return False
    return (getattr(torch.compiler, 'is_compiling', None) or torch._utils.is_compiling)()
