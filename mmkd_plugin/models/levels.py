"""A pyramid as one row of cells, level by level, each in reading order.

An operation on all cells then runs once for all levels.

Letters: N images, C channels, (h, w) a level's map, L cells of all levels.
"""
from collections.abc import Sequence

import torch
from torch import Tensor


class Levels(tuple):
    """The (N, C, h, w) maps of a pyramid. They are views of ``row``, (N, C, L)."""
    row: Tensor

    def __new__(cls, row: Tensor, shapes: Sequence[Sequence[int]]) -> 'Levels':
        parts = row.split([h * w for h, w in shapes], 2)
        levels = super().__new__(cls, (part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)))
        levels.row = row
        return levels


def to_row(levels: Sequence[Tensor]) -> Tensor:
    """Returns (N, C, h, w) maps as one row, (N, C, L)."""
    return levels.row if isinstance(levels, Levels) else join([level.flatten(2) for level in levels], 2)


def join(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """As ``torch.cat``, but does not copy a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
