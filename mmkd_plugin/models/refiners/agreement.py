"""Whether distillation pushes a feature where the task pushes it."""
from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def agreement_score(task_gradients: Sequence[Tensor], distill_gradients: Sequence[Tensor]) -> Tensor:
    """``<grad_F L_task, grad_F L_dist> / |grad_F L_dist|``, over all features F together.

    This is how much the task's loss falls, to first order in the features, for a step of length one that
    distillation makes. Undivided, it would reward long steps. It stands for the bi-level objective of SoKD
    (arXiv 2409.18785), the student's loss after its next step, and leaves out how the layers below turn a
    gradient at the feature into a change of the feature.

    Args:
        task_gradients: Of the task's loss alone, one for each feature, of any shapes.
        distill_gradients: Of the distillation loss, of the same shapes.

    Returns:
        A float32 scalar, 0 where distillation pushes nowhere.
    """
    product, square = (sum((a.float() * b.float()).sum() for a, b in zip(left, distill_gradients, strict=True))
                       for left in (task_gradients, distill_gradients))
    return product / square.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
