from .amd_loss import AMDLoss, amd_logits, amd_loss
from .feature_losses import FitNetLoss, PKDLoss
from .review_kd_loss import ReviewKDLoss

__all__ = ['AMDLoss', 'FitNetLoss', 'PKDLoss', 'ReviewKDLoss', 'amd_logits', 'amd_loss']
