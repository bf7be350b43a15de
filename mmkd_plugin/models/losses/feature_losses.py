"""Losses of one map of the student and one of the teacher, in as few operations as possible.

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
        """Compares features of equal shape, any floating dtype; float32 scalar."""
        return F.mse_loss(s_feature.float(), t_feature.float())


@MODELS.register_module()
class PKDLoss(nn.Module):
    """One less the correlation of student and teacher [0], averaged over channels, as MMRazor's ``PKDLoss``.

    [0] Cao, Zhang, Gao, Cheng, Cheng, Gao, *PKD: General Distillation Framework for Object Detectors via Pearson
    Correlation Coefficient*, NeurIPS 2022, arXiv 2207.02039.

    Half the mean squared difference of maps whose channels have mean zero and unbiased standard deviation one over the
    batch. That normalisation is batch norm without parameters but for the factor ``(n - 1) / n``, with n the number
    of values of a channel. Channels without variance are zero. The loss is zero for n = 1, where MMRazor's is NaN.
    """

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        """Compares features (N, C, H, W), any floating dtype; float32 scalar."""
        student, teacher = (torch.batch_norm(x.float(), None, None, None, None, True, 0., 1e-12, False)
                            for x in (preds_S, preds_T))
        values = preds_S.numel() // max(preds_S.shape[1], 1)
        return F.mse_loss(student, teacher) * ((values - 1) / max(2 * values, 1))
