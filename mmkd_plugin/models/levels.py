"""A pyramid as one row of cells: level after level, each level in reading order.

What treats all cells alike is then one operation, however many levels there are.

Letters: N images, C channels, (h, w) a level's map, L cells of all levels.
"""
from collections.abc import Sequence

import torch
from torch import Tensor


class Levels(tuple):
    """The (N, C, h, w) maps of a pyramid, views of its row (N, C, L), which is kept as ``row``."""
    row: Tensor

    def __new__(cls, row: Tensor, shapes: Sequence[Sequence[int]]) -> 'Levels':
        parts = row.split([h * w for h, w in shapes], 2)
        levels = super().__new__(cls, (part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)))
        levels.row = row
        return levels


def to_row(levels: Sequence[Tensor]) -> Tensor:
    """(N, C, h, w) maps as one row, (N, C, L)."""
    return levels.row if isinstance(levels, Levels) else join([level.flatten(2) for level in levels], 2)


def join(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """``torch.cat``, which copies nothing where there is one tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
