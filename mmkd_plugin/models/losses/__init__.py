from .amd_loss import AMDLoss
from .review_kd_loss import ReviewKDLoss

__all__ = ['AMDLoss', 'ReviewKDLoss']
