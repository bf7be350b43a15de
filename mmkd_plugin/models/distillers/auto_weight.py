"""A loss weight that makes the distillation push the features as hard as a stated share of the task's push."""
import logging
from collections.abc import Sequence

import torch
from mmengine.dist import all_reduce
from mmengine.logging import print_log
from torch import Tensor, nn

SCALE = 1024.  # keeps small gradients of half precision from becoming zero


def gradient_norms(losses: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    """Returns the norm of each loss's gradient at all features together, float32, (losses, ). The graph is kept."""
    norms = []
    for loss in losses:
        gradients = torch.autograd.grad(loss.float() * SCALE, features, retain_graph=True, allow_unused=True)
        squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
        norms.append(torch.stack(squares).sum().sqrt() / SCALE if squares else loss.new_zeros((), dtype=torch.float32))
    return torch.stack(norms)


class AutoWeight(nn.Module):
    """The weight of a base with ``loss_weight='auto'``, measured in the first iterations and held from then on.

    With ``g_task`` and ``g_base`` the gradients of the task's losses and of the base's unweighted loss at the
    student's recorded maps, the weight is ``ratio * exp(-mean log(|g_base| / |g_task|))``, the mean over ``iterations``
    iterations and all processes. It is used from the second of them on. A base whose connector has parameters first
    trains it for ``warmup`` iterations, on maps that are detached from the student, since the gradient through a
    connector that has learned nothing says nothing of the base.

    The weight and the progress are buffers: checkpoints have them, and a resumed run goes on as it was.

    Args:
        name: of the base, for the log.
        initial: weight until something is measured.
        warmup: iterations before the measurement.
        ratio: of the base's gradient to the task's.
        iterations: to measure in.
    """

    def __init__(self, name: str, initial: float, warmup: int, ratio: float = 1.0, iterations: int = 20) -> None:
        super().__init__()
        self.name, self.warmup, self.ratio, self.iterations = name, warmup, ratio, iterations
        self.register_buffer('weight', torch.tensor(float(initial)))
        self.register_buffer('log_ratio', torch.tensor(0.))  # sum over the iterations that were measured
        self.register_buffer('seen', torch.tensor(0))
        self._seen: int | None = None  # mirrored on the host

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen = None

    @property
    def step(self) -> int:
        """How many iterations there were, up to the end of the measurement."""
        if self._seen is None:
            self._seen = int(self.seen)
        return self._seen

    @property
    def warming_up(self) -> bool:
        """Whether only the connector learns."""
        return self.step < self.warmup

    @property
    def measuring(self) -> bool:
        """Whether :meth:`update` is to be called in this iteration."""
        return self.step < self.warmup + self.iterations

    @torch.no_grad()
    def update(self, task: Tensor, base: Tensor) -> None:
        """Counts an iteration, and takes the norms of both gradients, of the loss that :attr:`weight` multiplied."""
        if not self.warming_up:
            ratio = (base / self.weight).clamp(min=1e-12).log() - task.clamp(min=1e-12).log()
            all_reduce(ratio, 'mean')
            self.log_ratio += ratio
            self.weight.copy_(self.ratio * torch.exp(-self.log_ratio / (self.step - self.warmup + 1)))
        self.seen += 1
        self._seen += 1
        if not self.measuring:
            print_log(f"loss_weight='auto': the weight of {self.name} is {float(self.weight):.4g} from now on. Its "
                      f"gradient at the layers is {self.ratio:g} of the task's.", logger='current', level=logging.INFO)
