from .amd_loss import AMDLoss, amd_logits, amd_loss
from .review_kd_loss import ReviewKDLoss

__all__ = ['AMDLoss', 'ReviewKDLoss', 'amd_logits', 'amd_loss']
