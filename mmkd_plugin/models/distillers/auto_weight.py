"""A loss weight that scales the gradient of the distillation to a given ratio of the task's gradient."""
import logging
from collections.abc import Sequence

import torch
from mmengine.dist import all_reduce
from mmengine.logging import print_log
from torch import Tensor, nn

SCALE = 1024.  # prevents underflow of small gradients in half precision


def gradient_norms(losses: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    """Returns the norm of the gradient of each loss at all features, float32, (losses, ). The graph is kept."""
    norms = []
    for loss in losses:
        gradients = torch.autograd.grad(loss.float() * SCALE, features, retain_graph=True, allow_unused=True)
        squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
        norms.append(torch.stack(squares).sum().sqrt() / SCALE if squares else loss.new_zeros((), dtype=torch.float32))
    return torch.stack(norms)


def reaches(loss: Tensor, features: Sequence[Tensor]) -> bool:
    """Whether ``loss`` depends on one of the features. The graph is kept."""
    return any(gradient is not None for gradient in torch.autograd.grad(
        loss, features, retain_graph=True, allow_unused=True))


class AutoWeight(nn.Module):
    """The weight of a base with ``loss_weight='auto'``, measured in the first iterations and then constant.

    ``g_task`` and ``g_base`` are the gradients of the task's losses and of the base's unweighted loss at the outputs of
    the student's layers. The weight is ``ratio * exp(-mean log(|g_base| / |g_task|))``, with the mean over 20
    iterations and all processes. It is used from the second of these iterations on. If the base's connector has
    parameters, it is first trained for ``warmup`` iterations on maps detached from the student, because the gradient
    through an untrained connector is not typical of the base. An iteration in which a gradient is zero or not finite
    counts as the current weight.

    The weight and the progress are buffers, so checkpoints have them and a resumed run continues the measurement.

    Args:
        name: name of the base, for the log.
        initial: weight before the measurement.
        warmup: number of iterations before the measurement.
        ratio: ratio of the base's gradient to the task's.
    """
    iterations = 20  # of the measurement

    def __init__(self, name: str, initial: float, warmup: int, ratio: float = 1.0) -> None:
        super().__init__()
        self.name, self.warmup, self.ratio = name, warmup, ratio
        self.register_buffer('weight', torch.tensor(float(initial)))
        self.register_buffer('log_ratio', torch.tensor(0.))  # sum over the measured iterations
        self.register_buffer('seen', torch.tensor(0))
        self._seen: int | None = None  # copy on the host

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen = None

    @property
    def step(self) -> int:
        """Number of iterations so far; it stops at the end of the measurement."""
        if self._seen is None:
            self._seen = int(self.seen)
        return self._seen

    @property
    def warming_up(self) -> bool:
        """Whether only the connector is trained."""
        return self.step < self.warmup

    @property
    def measuring(self) -> bool:
        """Whether to call :meth:`update` in this iteration."""
        return self.step < self.warmup + self.iterations

    @torch.no_grad()
    def update(self, task: Tensor, base: Tensor) -> None:
        """Counts an iteration and updates the weight from the gradient norms of the task and of the weighted base."""
        if not self.warming_up:
            ratio = (base / self.weight).log() - task.log()  # not finite if a gradient is zero or not finite
            all_reduce(ratio, 'mean')
            self.log_ratio += torch.where(ratio.isfinite(), ratio, (self.ratio / self.weight).log())
            self.weight.copy_(self.ratio * torch.exp(-self.log_ratio / (self.step - self.warmup + 1)))
        self.seen += 1
        self._seen += 1
        if not self.measuring:
            print_log(f"loss_weight='auto': the weight of {self.name} is {float(self.weight):.4g} from now on. "
                      f"Its gradient at the layers is {self.ratio:g} times the task's.",
                      logger='current', level=logging.INFO)
