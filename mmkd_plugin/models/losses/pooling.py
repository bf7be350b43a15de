"""Average pooling with a deterministic backward pass; that of torch's ``adaptive_avg_pool2d`` is not on a GPU."""
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def adaptive_average_pool(x: Tensor, size: Sequence[int]) -> Tensor:
    """Pools (..., H, W) to (..., *size) as ``torch.nn.functional.adaptive_avg_pool2d`` does, by two matrices."""
    rows, columns = (_pooling(length, pooled, x.dtype, x.device) for length, pooled in zip(x.shape[-2:], size))
    return rows @ (x @ columns.t())


@lru_cache(maxsize=128)
@torch.inference_mode(False)
def _pooling(length: int, pooled: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the matrix (pooled, length) of the pooling."""
    bin_ = np.arange(pooled)[:, None]
    first, end = bin_ * length // max(pooled, 1), -(-(bin_ + 1) * length // max(pooled, 1))
    inside = (np.arange(length) >= first) & (np.arange(length) < end)
    return torch.as_tensor(inside / (end - first)).to(dtype).to(device, non_blocking=True)
