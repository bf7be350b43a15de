"""Distillation losses that need no labels, and the student's forward for them."""
import logging
from collections.abc import Mapping

import torch
from mmengine.logging import print_log
from mmrazor.models.distillers import ConfigurableDistiller
from mmrazor.models.task_modules import ModuleInputsRecorder, ModuleOutputsRecorder, RecorderManager
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..distillers.feature_distiller import FeatureDistiller
from ..dummy_input import dummy_inputs
from ..recording import PartialForward, evaluating, merged
from .dry_run import losses_without_labels, read_calls


class UnlabelledPart:
    """The losses that need no labels, and the part of the student that they read.

    A loss needs no labels if a forward of both networks without the task loss gives all its inputs.

    The recorders of ``distiller`` must hold a dummy input.

    Args:
        distiller: the distiller.
        student: the student.
    """

    def __init__(self, distiller: ConfigurableDistiller, student: nn.Module) -> None:
        self.losses = losses_without_labels(distiller)
        self.skipped = [name for name in distiller.loss_forward_mappings if name not in self.losses]
        self.calls = read_calls(distiller, True)
        self.recorders = RecorderManager()
        self.recorders.recorders.update({
            name: recorder for name, recorder in distiller.student_recorders.recorders.items()
            if isinstance(recorder, (ModuleInputsRecorder, ModuleOutputsRecorder))
            and recorder.source and recorder.data_buffer})

    def check(self, distiller: ConfigurableDistiller, teacher: PartialForward) -> None:
        """Raises ``ValueError`` if all losses need labels, and warns about the losses that need them."""
        reason = None
        if distiller.deliveries.deliveries:
            reason = 'distill_deliveries need the task loss. Remove them'
        elif teacher.mode == 'loss':
            reason = (f'{", ".join(self.skipped)} read(s) records of the teacher\'s loss. Record layers that run in '
                      'its forward')
        elif not (self.losses or getattr(distiller, 'dams', None)):
            reason = (f'no distillation loss works without labels, got {", ".join(self.skipped) or "no loss"}. Add one '
                      'that compares layers, such as base="pkd"')
        if reason:
            raise ValueError('train_cfg.unlabelled_dataloader: nothing can be learned from unlabelled images: '
                             f'{reason}')
        if self.skipped:
            print_log(f'unlabelled_dataloader: {", ".join(self.skipped)} read(s) labels or records of the task loss, '
                      'and skip(s) the unlabelled images.', logger='current', level=logging.WARNING)

    def compute(self, distiller: ConfigurableDistiller) -> dict[str, Tensor]:
        """Returns the weighted losses of the records."""
        if isinstance(distiller, FeatureDistiller):
            return distiller.compute_unlabelled_losses(self.losses)
        return {name: distiller.distill_losses[name](**{
            argument: distiller.get_record(**entry) for argument, entry in distiller.loss_forward_mappings[name].items()
        }) for name in self.losses}


def record_student(student: nn.Module, parts: Mapping[str, UnlabelledPart], inputs: Tensor,
                   data_samples: list | None) -> None:
    """Fills the recorders of all parts, by teacher, in one forward with gradient, as far as the recorded layers."""
    recorders = merged({name: part.recorders for name, part in parts.items()})
    forward = PartialForward(student, recorders, {f'{name}.{recorder}': count for name, part in parts.items()
                                                  for recorder, count in part.calls.items()})
    try:
        forward(inputs, data_samples)
    finally:
        forward.remove()


def freeze_unreached(student: nn.Module, parts: Mapping[str, UnlabelledPart]) -> list[str]:
    """Freezes the parameters that no recorded layer depends on, and returns their names."""
    with torch.enable_grad(), evaluating(student):
        record_student(student, parts, *dummy_inputs(student))
    recorded = tree_flatten([recorder.data_buffer for part in parts.values()
                             for recorder in part.recorders.recorders.values()])[0]
    outputs = [x.sum() for x in recorded if isinstance(x, Tensor) and x.requires_grad]
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(outputs, list(trained.values()), allow_unused=True) if outputs else (
        [None] * len(trained))
    unreached = [name for name, gradient in zip(trained, gradients) if gradient is None]
    for name in unreached:
        trained[name].requires_grad_(False)
    return unreached
