"""Conversion of tokens of transformers and mixers to feature maps."""
import math
from functools import partial
from typing import Any

from mmrazor.models.task_modules import ModuleOutputsRecorder
from torch import Tensor, nn

from ..registry import TASK_UTILS
from .origin import derive

EXTRA_TOKENS = (0, 1, 2, 5)  # none; class; class and distillation; class and four registers


def to_map(x: Tensor, image_size: tuple[int, int] | None = None, num_extra_tokens: int | None = None) -> Tensor:
    """Returns tokens as a feature map, without the tokens that belong to no position of the image.

    ViT, DeiT, DINOv2, EVA-02, T2T-ViT, TNT, MLP-Mixer, XCiT and the blocks of Swin and TinyViT output tokens. In all of
    them, extra tokens (class, distillation, registers) come first. The others follow in rows from the top left.

    Args:
        x: (N, L, C).
        image_size: height and width of the network's input; None for a square one.
        num_extra_tokens: number of tokens before those of the image. With None, it is the first of ``EXTRA_TOKENS``
            that leaves a grid. Set it if ``L`` can vary, as with images of many sizes.

    Returns:
        (N, C, h, w), a view of ``x``.

    Raises:
        ValueError: ``x`` is not (N, L, C), or its tokens do not form a grid with the image's aspect ratio.
    """
    if x.dim() != 3:
        raise ValueError(f'tokens: expected a tensor (N, L, C), got shape {tuple(x.shape)}')
    length = x.shape[1]
    extra, grid = find_grid(length, image_size, num_extra_tokens)
    return x[:, extra:].transpose(1, 2).unflatten(2, grid)


def find_grid(length: int, image_size: tuple[int, int] | None = None,
              num_extra_tokens: int | None = None) -> tuple[int, tuple[int, int]]:
    """Returns the number of extra tokens among ``length`` tokens, and height and width of the grid of the others.

    Args, Raises: as in :func:`to_map`.
    """
    height, width = image_size or (1, 1)
    for extra in EXTRA_TOKENS if num_extra_tokens is None else (num_extra_tokens, ):
        for rows in _rows(length - extra, height / width):
            grid = rows, (length - extra) // rows
            if image_size is None or _one_stride(grid, image_size):
                return extra, grid
    image = 'a square image' if image_size is None else f'an image of {height} x {width}'
    minus = ' or '.join(map(str, EXTRA_TOKENS)) if num_extra_tokens is None else num_extra_tokens
    raise ValueError(f'tokens: {length} tokens minus {minus} extra ones form no grid for {image}. Record a layer whose '
                     'output is a feature map (N, C, H, W), or one with tokens for every position')


def _rows(count: int, aspect: float) -> list[int]:
    """Returns possible heights of a grid of ``count`` cells, with about this ratio of height to width."""
    if count < 1:
        return []
    near = round(math.sqrt(count * aspect))
    return [rows for rows in (near, near - 1, near + 1) if rows > 0 and count % rows == 0
            and (aspect != 1 or rows * rows == count)]


def _one_stride(grid: tuple[int, int], image_size: tuple[int, int]) -> bool:
    """Whether one stride gives this grid, with the rest at the borders dropped or padded."""
    floor = [(length / (cells + 1), length / cells) for length, cells in zip(image_size, grid)]
    ceil = [(length / cells, length / (cells - 1) if cells > 1 else math.inf)
            for length, cells in zip(image_size, grid)]
    return any(max(low for low, _ in side) < min(high for _, high in side) for side in (floor, ceil))


@TASK_UTILS.register_module()
class MapOutputsRecorder(ModuleOutputsRecorder):
    """MMRazor's ``ModuleOutputs``, but tokens (N, L, C) are recorded as maps. Other outputs are unchanged.

    The first record determines the number of extra tokens.

    Raises:
        ValueError: in the model's forward pass, if tokens do not form a grid.
    """

    def prepare_from_model(self, model: nn.Module | None = None) -> None:
        super().prepare_from_model(model)
        self._image_size: tuple[int, int] | None = None
        self._extra: dict[int, int] = {}  # by the index in the output
        first = getattr(model, 'backbone', model)
        first.register_forward_pre_hook(self._note_image_size)

    def _note_image_size(self, module: nn.Module, inputs: tuple) -> None:
        if self.recording and inputs and isinstance(inputs[0], Tensor):
            self._image_size = tuple(inputs[0].shape[-2:])

    def forward_hook(self, module: nn.Module, inputs: tuple, outputs: Any) -> None:
        if not self.recording:
            return
        if isinstance(outputs, (list, tuple)):
            outputs = type(outputs)([self._as_map(x, i) for i, x in enumerate(outputs)]) if type(outputs) in (
                list, tuple) else outputs
        else:
            outputs = self._as_map(outputs, 0)
        self.data_buffer.append(outputs)

    def _as_map(self, x: Any, index: int) -> Any:
        if not isinstance(x, Tensor) or x.dim() != 3:
            return x
        try:
            if index not in self._extra:
                self._extra[index] = find_grid(x.shape[1], self._image_size)[0]
            return derive(x, partial(to_map, image_size=self._image_size, num_extra_tokens=self._extra[index]))
        except ValueError as error:
            raise ValueError(f'layers: {self.source!r}: {error}') from error
