"""One training step of a composed config on synthetic data."""
import copy
from dataclasses import dataclass

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from ..checkpoints.initialize import forget_weights_files
from ..models.algorithms import TeacherStudentDistill
from ..models.algorithms.inherit import num_classes
from ..models.dummy_input import input_channels
from .network import IMAGE

DETECTOR_IMAGE = 256  # side in pixels: the deepest level of a pyramid, of stride 128, has more than one cell
_NOTHING = 1e-9  # a distillation loss below it is nothing but rounding


@dataclass
class Reading:
    """What one distillation loss compares."""
    student: str  # module
    teacher: str
    s_output: Tensor  # (N, C, H, W), or logits (N, classes)
    t_output: Tensor


@dataclass
class Trial:
    """One step of a distillation."""
    model: TeacherStudentDistill
    losses: dict[str, float]  # the distillation's, weighted, by name
    readings: dict[str, Reading]  # of those losses that compare two layers
    image: int  # side, in pixels


def try_one_step(cfg: Config, random_teacher: bool) -> Trial:
    """Trains the model of ``cfg`` for one step on synthetic data, and downloads nothing.

    Args:
        cfg: the composed config.
        random_teacher: whether to leave the teacher's weights out.

    Raises:
        ValueError: the model cannot be built or trained, a loss is not finite, or a
            distillation loss is zero or does not reach the student.
    """
    cfg = copy.deepcopy(cfg)
    cfg.model.pop('loss_schedules', None)  # a warm-up begins at zero
    if random_teacher:
        cfg.model.pop('teacher_ckpt')
        cfg.model.allow_random_teacher = True
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    (cfg.model.architecture.get('data_preprocessor') or {}).pop('batch_augments', None)  # a detector's: other sizes
    hub = MessageHub.get_instance('compose_config')
    hub.update_info_dict(dict(iter=0, epoch=0))  # some heads ask
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        model = MODELS.build(cfg.model)
        for network in (model.student, model.teacher):
            forget_weights_files(network)  # which may not be here, nor fit
        return _step(model, cfg)


def _step(model: TeacherStudentDistill, cfg: Config) -> Trial:
    outputs: dict[tuple[bool, str], list[Tensor]] = {}  # by whether from the student, and recorder

    def note(key: tuple[bool, str]):
        def hook(module: nn.Module, args: tuple, output) -> None:
            outputs[key] = list(output) if isinstance(output, (list, tuple)) else [output]
        return hook

    distiller = model.distiller
    recorders = {True: distiller.student_recorders, False: distiller.teacher_recorders}
    for side, network in ((True, model.student), (False, model.teacher)):
        for name, recorder in recorders[side].recorders.items():
            # the teacher's forward ends within the hook of its last recorder
            network.get_submodule(recorder.source).register_forward_hook(note((side, name)), prepend=True)
    optim = cfg.optim_wrapper.copy()
    if optim.get('type') == 'AmpOptimWrapper':  # half precision needs a GPU
        optim = {key: value for key, value in optim.items() if key not in ('type', 'loss_scale', 'dtype')}
    try:
        model.init_weights()
        model.train()
        wrapper = build_optim_wrapper(model, optim)
        batch, image = _synthetic_batch(model.student, cfg)
        losses = model(**model.data_preprocessor(batch, True), mode='loss')
        total, log = model.parse_losses(losses)
    except Exception as error:  # what a model can do with a batch is not for us to list
        raise ValueError(f'one step on synthetic data fails: {type(error).__name__}: {error}') from error
    for name, value in log.items():
        if not value.isfinite():
            raise ValueError(f'{name} is {float(value)} in a step on synthetic data')

    readings = {}
    for name, inputs in distiller.loss_forward_mappings.items():
        s_entry, t_entry = (next(entry for entry in inputs.values() if entry['from_student'] is side)
                            for side in (True, False))
        level = t_entry.get('data_idx') or 0
        readings[name] = Reading(
            *(recorders[entry['from_student']].get_recorder(entry['recorder']).source for entry in (s_entry, t_entry)),
            *(outputs[entry['from_student'], entry['recorder']][level] for entry in (s_entry, t_entry)))
    distilled = {name.removeprefix('distill.'): value for name, value in losses.items() if name.startswith('distill.')}
    features = [x for (from_student, _), maps in outputs.items() if from_student for x in maps if x.requires_grad]
    for name, value in distilled.items():
        _check(name, value, features, readings.get(name))
    wrapper.update_params(total)
    return Trial(model, {name: float(value) for name, value in distilled.items()}, readings, image)


def _check(name: str, loss: Tensor, features: list[Tensor], reading: Reading | None) -> None:
    if name.startswith(('loss_aug', 'loss_align')):  # these are for the policy and the adapter
        return
    if reading and reading.s_output[0, 0].numel() == 1 and reading.s_output.dim() == 4:
        return  # a level of one cell, where some losses have nothing to compare
    if loss.abs() < _NOTHING:
        where = f'{reading.student!r} and {reading.teacher!r}' if reading else 'its layers'
        raise ValueError(f'{name} is {float(loss):.1g} in a step on synthetic data: it finds nothing to compare in '
                         f'{where}. Name others with --layers')
    gradients = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True) if (
        features and loss.requires_grad) else []
    if not any(gradient is not None and gradient.any() for gradient in gradients):
        what = f'{reading.student!r} depends' if reading else 'its layers depend'
        raise ValueError(f'{name} does not reach the student: {what} on no weight that is trained')


def _synthetic_batch(student: BaseModel, cfg: Config) -> tuple[dict, int]:
    """Returns a batch of two images as a data loader gives it, and their side in pixels."""
    from mmdet.models.detectors import BaseDetector
    classes = min(num_classes(student), default=1)  # things and stuff are counted by heads of their own
    channels = input_channels(student)
    if isinstance(student, BaseDetector):
        from mmdet.testing import demo_mm_inputs
        batch = demo_mm_inputs(
            2, [(channels, DETECTOR_IMAGE, DETECTOR_IMAGE)] * 2, num_items=[2, 2], num_classes=max(classes, 2),
            with_mask=_loads(cfg.train_dataloader, 'with_mask'), with_semantic=_loads(cfg.train_dataloader, 'with_seg'))
        for sample in batch['data_samples']:
            sample.gt_instances.labels.clamp_(max=classes - 1)
        return batch, DETECTOR_IMAGE
    from mmpretrain.structures import DataSample
    return dict(inputs=torch.randint(0, 256, (2, channels, IMAGE, IMAGE), dtype=torch.uint8),
                data_samples=[DataSample().set_gt_label(i % classes) for i in range(2)]), IMAGE


def _loads(node: dict | list, flag: str) -> bool:
    """Whether a data pipeline within ``node`` loads such annotations."""
    if isinstance(node, dict) and str(node.get('type')).endswith('Annotations'):
        return node.get(flag, 'Panoptic' in str(node.type))
    return any(_loads(child, flag) for child in (node.values() if isinstance(node, dict) else node)
               if isinstance(child, (dict, list)))
