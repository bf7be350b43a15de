"""Hook that stops training on a NaN or infinite loss, before the optimizer step."""
import math

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn

from ...registry import HOOKS
from ...utils import unwrapped

PATIENCE = 50  # iterations in a row that a gradient scaler may skip; each one halves its scale, initially 2^16


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Raises an error before the optimizer step if a loss is NaN or infinite, so that the weights stay finite.

    The message has the losses, the iteration, the shape, range and mean of the batch, and its image files. If a
    gradient scaler (``AmpOptimWrapper``) skips the step because its scale is too large, training continues, but not
    after 50 such iterations in a row. On a GPU, the flag is copied to the CPU during the backward pass, so that the
    step does not wait for it. In distributed training, all processes stop, so that none of them saves weights that
    the gradients of another one made NaN.

    Raises:
        FloatingPointError: in the training step, if a loss is NaN or infinite.
    """

    def before_train(self, runner: Runner) -> None:
        self.step: _Step | None = None
        model = unwrapped(runner.model)
        self.handle = model.register_forward_hook(self._after_forward, with_kwargs=True)
        self.scaled = any(hasattr(wrapper, 'loss_scaler') for wrapper in _wrappers(runner.optim_wrapper))
        self.skipped = 0
        take_step = runner.optim_wrapper.step

        def checked_step(*args, **kwargs) -> None:
            if not self.scaled:
                self._check(runner.iter)
            take_step(*args, **kwargs)

        runner.optim_wrapper.step = checked_step  # torch's step hooks do not run once anything is compiled

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        if self.scaled and self.step is not None:
            self.skipped = 0 if self.step.finite() else self.skipped + 1
        if not self.scaled or self.skipped == PATIENCE:
            self._check(runner.iter)  # with gradient accumulation, not every iteration has a step
        self.step = None

    def after_train(self, runner: Runner) -> None:
        self.handle.remove()
        del runner.optim_wrapper.step

    def _after_forward(self, model: nn.Module, args: tuple, kwargs: dict, output: dict) -> None:
        if kwargs.get('mode') == 'loss' and isinstance(output, dict):
            self.step = _Step(output, kwargs)

    def _check(self, iteration: int) -> None:
        step, self.step = self.step, None
        if step is not None and not step.finite():
            raise FloatingPointError(f'iteration {iteration + 1}: {step.report()}')


class _Step:
    """The losses of one step, and whether they are finite.

    Args:
        losses: tensors, or lists of them, by name. Entries without ``loss`` in the name are only logged.
        batch: the preprocessed images, ``inputs``, and their ``data_samples``.
    """

    def __init__(self, losses: dict, batch: dict) -> None:
        self.batch = batch
        self.losses = {
            name: [part.detach() for part in (value if isinstance(value, (list, tuple)) else [value])]
            for name, value in losses.items() if 'loss' in name}
        parts = [part.sum().float() for value in self.losses.values() for part in value]
        finite = (torch.stack(parts).sum() if parts else torch.zeros(())).isfinite().float()
        all_reduce(finite, 'min')
        # without pinned memory, even a non-blocking copy would wait for the GPU
        self.finite_flag = torch.empty((), pin_memory=finite.is_cuda).copy_(finite, non_blocking=True)
        self.fetched = torch.cuda.Event() if finite.is_cuda else None
        if self.fetched:
            self.fetched.record()

    def finite(self) -> bool:
        if self.fetched:
            self.fetched.synchronize()
        return bool(self.finite_flag)

    def report(self) -> str:
        values = {name: float(sum(part.float().sum() for part in parts)) for name, parts in self.losses.items()}
        broken = ', '.join(f'{name} is {value}' for name, value in values.items() if not math.isfinite(value))
        others = ', '.join(f'{name} {value:.4g}' for name, value in values.items() if math.isfinite(value))
        broken = broken or 'their sum, or a loss of another process, is not finite'
        return f'{broken} (finite: {others or "none"}). {self._inputs()}'

    def _inputs(self) -> str:
        inputs = self.batch.get('inputs')
        if not torch.is_tensor(inputs):
            return f'The inputs are {type(inputs).__name__}'
        x = inputs.detach().float()
        paths = [sample.get('img_path') for sample in self.batch.get('data_samples') or []]
        return (f'The inputs have shape {tuple(x.shape)}, range {x.min():.4g} to {x.max():.4g}, mean {x.mean():.4g}, '
                f'{int((~x.isfinite()).sum())} values that are not finite'
                + (f', and come from {", ".join(map(str, paths))}' if any(paths) else ''))


def _wrappers(wrapper: OptimWrapper | OptimWrapperDict) -> list[OptimWrapper]:
    return list(wrapper.optim_wrappers.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
