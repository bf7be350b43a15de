"""Agreement of the gradients of distillation and task."""
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def agreement_score(task_gradients: Sequence[Tensor], distill_gradients: Sequence[Tensor]) -> Tensor:
    """Returns ``<grad_F L_task, grad_F L_dist> / |grad_F L_dist|``, over all features F together.

    This is the decrease of the task's loss, to first order in the features, for a step of length one along the
    distillation's gradient. Without the division, the score would reward long steps. It approximates the bi-level
    objective of SoKD (arXiv 2409.18785), the student's loss after its next step, but ignores how the layers below turn
    a gradient at the feature into a change of the feature.

    Args:
        task_gradients: Gradients of only the task's loss, one per feature, of any shapes.
        distill_gradients: Gradients of the distillation loss, of the same shapes.

    Returns:
        A float32 scalar, 0 if the distillation's gradient is zero.
    """
    product, square = (sum((a.float() * b.float()).sum() for a, b in zip(left, distill_gradients, strict=True))
                       for left in (task_gradients, distill_gradients))
    return product / square.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
