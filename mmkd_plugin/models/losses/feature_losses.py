"""Losses of a student's and a teacher's map, with few operations.

Letters: N images, C channels, (H, W) a level's map.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...registry import MODELS


@MODELS.register_module()
class FitNetLoss(nn.Module):
    """Mean squared difference [0], as MMRazor's ``L2Loss(normalize=False, div_element=True)``.

    [0] Romero, Ballas, Kahou, Chassang, Gatta, Bengio, *FitNets: Hints for Thin Deep Nets*, ICLR 2015,
    arXiv 1412.6550.
    """

    def forward(self, s_feature: Tensor, t_feature: Tensor) -> Tensor:
        """Returns a float32 scalar for features of equal shape and any floating dtype."""
        return F.mse_loss(s_feature.float(), t_feature.float())


@MODELS.register_module()
class PKDLoss(nn.Module):
    """One minus the correlation of student and teacher [0], averaged over channels, as MMRazor's ``PKDLoss``.

    [0] Cao, Zhang, Gao, Cheng, Cheng, Gao, *PKD: General Distillation Framework for Object Detectors via Pearson
    Correlation Coefficient*, NeurIPS 2022, arXiv 2207.02039.

    It is half the mean squared difference of maps whose channels are normalised over the batch to mean zero and
    unbiased standard deviation one. This normalisation is batch norm without parameters, up to the factor
    ``(n - 1) / n``, with n the number of values of a channel. To avoid a division by zero, 1e-12 is added to the
    variance, where MMRazor adds 1e-6 to the standard deviation. For n = 1, the loss is zero, where MMRazor's is NaN.
    """

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        """Returns a float32 scalar for features (N, C, H, W) of any floating dtype."""
        student, teacher = (torch.batch_norm(x.float(), None, None, None, None, True, 0., 1e-12, False)
                            for x in (preds_S, preds_T))
        values = preds_S.numel() // max(preds_S.shape[1], 1)
        return F.mse_loss(student, teacher) * ((values - 1) / max(2 * values, 1))
