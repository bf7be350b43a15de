"""One training step of a composed config on synthetic data."""
import copy
from dataclasses import dataclass

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from ..models.algorithms import TeacherStudentDistill
from ..models.tokens import to_map
from ..utils import type_name
from .building import answering, build_random, scope_of
from .images import synthetic_batch
from .network import Network, is_flat

_NOTHING = 1e-9  # a distillation loss below this is rounding


@dataclass
class Reading:
    """The outputs that one distillation loss compares."""
    student: str  # name of the module
    teacher: str
    s_output: Tensor  # (N, C, H, W), tokens (N, L, C) or logits (N, classes)
    t_output: Tensor


@dataclass
class Trial:
    """One step of a distillation."""
    model: TeacherStudentDistill
    losses: dict[str, float]  # weighted distillation losses by name
    readings: dict[str, Reading]  # for losses that compare two layers


def try_one_step(cfg: Config, student: Network, teacher: Network, random_teacher: bool) -> Trial:
    """Trains the model of ``cfg`` for one step on synthetic data, without downloads.

    Args:
        cfg: the composed config.
        student, teacher: the networks of the config. The step uses a copy of the model of ``teacher``, and the first
            of the student's image sides at which it succeeds.
        random_teacher: whether the teacher has random weights.

    Raises:
        ValueError: the model cannot be built or trained, a loss is not finite, or a
            distillation loss is zero or does not depend on the student's weights.
    """
    cfg = copy.deepcopy(cfg)
    cfg.model.pop('loss_schedules', None)  # a warm-up starts at zero
    if random_teacher:
        cfg.model.pop('teacher_ckpt')
        cfg.model.allow_random_teacher = True
    if 'data_preprocessor' in cfg:
        cfg.model.architecture.setdefault('data_preprocessor', cfg.data_preprocessor)
    (cfg.model.architecture.get('data_preprocessor') or {}).pop('batch_augments', None)  # would change sizes
    hub = MessageHub.get_instance('compose_config')
    hub.update_info_dict(dict(iter=0, epoch=0, max_iters=100, max_epochs=100))  # some heads read them
    model = {key: value for key, value in cfg.model.items() if key not in ('architecture', 'teacher')}
    with DefaultScope.overwrite_default_scope(scope_of(cfg)):
        for image in student.images:
            architecture = build_random(cfg.model.architecture, scope_of(cfg))
            try:
                built = MODELS.build(dict(dict(input_size=image), **model, architecture=architecture,
                                          teacher=copy.deepcopy(teacher.model)))
                return _step(built, cfg, image)
            except ValueError as error:
                cause = error.__cause__  # of a model's own code: some heads need more than the smallest image
                if image == student.images[-1] or cause is None or isinstance(cause, ValueError):
                    raise


def _step(model: TeacherStudentDistill, cfg: Config, image: int) -> Trial:
    outputs: dict[tuple[bool, str], list] = {}  # of each call, by (is the student's, name of the recorder)

    def note(key: tuple[bool, str]):
        def hook(module: nn.Module, args: tuple, output) -> None:
            outputs.setdefault(key, []).append(output)
        return hook

    distiller = model.distiller
    recorders = {True: distiller.student_recorders, False: distiller.teacher_recorders}
    for side, network in ((True, model.student), (False, model.teacher)):
        for name, recorder in recorders[side].recorders.items():
            # the teacher's forward pass ends in the hook of its last recorder
            network.get_submodule(recorder.source).register_forward_hook(note((side, name)), prepend=True)
    optim = cfg.optim_wrapper.copy()
    if type_name(optim.get('type')) == 'AmpOptimWrapper':  # half precision needs a GPU
        optim = {key: value for key, value in optim.items() if key not in ('type', 'loss_scale', 'dtype')}
    with answering('one step on synthetic data fails'):
        model.init_weights()
        model.train()
        wrapper = build_optim_wrapper(model, optim)
        batch = model.data_preprocessor(synthetic_batch(model.student, cfg, image), True)
        outputs.clear()
        losses = model(**batch, mode='loss')
        total, log = model.parse_losses(losses)
    for name, value in log.items():
        if not value.isfinite():
            raise ValueError(f'{name} is {float(value)} in a step on synthetic data')

    readings = {}
    for name, inputs in distiller.loss_forward_mappings.items():
        entries = [next(entry for entry in inputs.values() if entry['from_student'] is side) for side in (True, False)]
        readings[name] = Reading(
            *(recorders[entry['from_student']].get_recorder(entry['recorder']).source for entry in entries),
            *(_read(outputs[entry['from_student'], entry['recorder']], entry) for entry in entries))
    distilled = {name.removeprefix('distill.'): value for name, value in losses.items() if name.startswith('distill.')}
    features = [x for (from_student, _), calls in outputs.items() if from_student for output in calls
                for x in (output if isinstance(output, (list, tuple)) else [output])
                if isinstance(x, Tensor) and x.requires_grad]
    for name, value in distilled.items():
        _check(name, value, features, readings.get(name))
    with answering('the optimiser fails in a step on synthetic data'):
        wrapper.update_params(total)
    return Trial(model, {name: float(value) for name, value in distilled.items()}, readings)


def _read(calls: list, entry: dict) -> Tensor:
    output = calls[entry.get('record_idx') or 0]
    return output[entry.get('data_idx') or 0] if isinstance(output, (list, tuple)) else output


def _check(name: str, loss: Tensor, features: list[Tensor], reading: Reading | None) -> None:
    if name.startswith(('loss_aug', 'loss_align')):  # losses of the policy and the adapter
        return
    outputs = [reading.s_output, reading.t_output] if reading else []
    if any(x.dim() == 4 and x[0, 0].numel() == 1 for x in outputs):
        return  # on a level with one cell, some losses are zero
    where = f'{reading.student!r} and {reading.teacher!r}' if reading else 'its layers'
    what = f'{reading.student!r} depends' if reading else 'its layers depend'
    dead = f'{name} does not reach the student: {what} on no trained weight. Name other layers with --layers'
    if outputs and not outputs[0].requires_grad:
        raise ValueError(dead)
    if any(is_flat(to_map(x) if x.dim() == 3 else x) for x in outputs if x.dim() > 2):
        return  # zero with random weights; a remark reports it
    if outputs and all(x.dim() == 2 and not x.any() for x in outputs):
        return  # the last layer of both begins with zeros
    if loss.abs() < _NOTHING:
        raise ValueError(f'{name} is {float(loss):.1g} in a step on synthetic data: it finds nothing to compare in '
                         f'{where}. Name other layers with --layers')
    gradients = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True) if (
        features and loss.requires_grad) else []
    if not any(gradient is not None and gradient.any() for gradient in gradients):
        raise ValueError(dead)
