"""A frozen teacher, a student and what it is to learn."""
import copy
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmrazor.models.algorithms import SingleTeacherDistill
from mmrazor.models.utils import add_prefix
from torch import Tensor, nn

from ...checkpoints.guard import data_only
from ...checkpoints.initialize import initialize
from ...checkpoints.reading import STUDENT_PREFIX, load_completely
from ...config.cfg_path import build_model
from ...registry import MODELS
from ..distillers.feature_distiller import exact_zero
from ..dummy_input import check_size, input_channels, set_dummy_sizes
from ..recording import (
    PartialForward,
    UnknownLayerError,
    check_sources,
    check_wiring,
    keep_statistics,
    layers_in_place,
    random_stream_kept,
    write_in_place,
)
from .dry_run import dry_run, try_odd_size
from .follow_conversion import FollowConversion
from .inherit import check_inherit, inherit_modules
from .loss_log import ZeroWatch
from .loss_schedule import build_schedules
from .second_batch import set_second_batch_aside, take_second_batch
from .student_parts import StudentParts
from .teacher_inputs import TeacherInputs
from .teacher_precision import TeacherPrecision, check_precision
from .unlabelled import UnlabelledPart


@MODELS.register_module()
class TeacherStudentDistill(StudentParts, SingleTeacherDistill):
    """MMRazor's ``SingleTeacherDistill`` with checks at build time and a teacher that costs no more than it has to.

    - The teacher is in eval mode, without gradient, and runs only as far as its recorders read. It is not a
      submodule, so checkpoints, EMA copies, optimizers and parallel wrappers do not contain it. A resumed run reads
      it from its own file.
    - The student's preprocessor makes the batch. If the teacher has another normalisation, channel order, padding or
      input size, it gets the batch in that form. Maps of equal stride are cropped to their common size.
    - The teacher runs in half precision on devices made for it.
    - Layers of backbone and neck work in place, as without distillation, unless this changes what is recorded.
      MMRazor turns this off for all layers.
    - Hooks of the student's config find the student's parts, see :class:`.StudentParts`. Constructors of optimizers
      find the student's parameters under their own names.
    - Configuration errors are reported when the model is built.

    Unscoped types within ``distiller`` are MMRazor's.

    Args:
        architecture: the student, a config or a built model.
        teacher: the teacher, likewise. Both take ``dict(cfg_path=...)``, of a
            library's config (``'mmdet::...'``) or a file of one's own.
        distiller: config of MMRazor's ``ConfigurableDistiller``,
            :class:`AMDDistiller` or another.
        teacher_ckpt: the teacher's weights, a file or address; every weight
            must fit.
        student_ckpt: weights that the student starts from, likewise.
        inherit: names of student modules, such as ``['neck', 'bbox_head']``,
            that start from the teacher's weights where names and shapes agree
            (the inheriting strategy of FGD, arXiv 2111.11837, and MGD, arXiv 2205.01529). They do so also after
            ``load_from`` a checkpoint of the plain student, but not after one of the distillation.
        allow_random_teacher: whether the teacher may have no weights. Its own config then initialises it.
        trust_checkpoint: whether weights files may run code when they are loaded: these two, and whatever both
            models read when they are built and initialised. By default they are read as data, and one that asks
            for more is refused.
        calculate_student_loss: whether the student learns its task, too. Otherwise it learns from the teacher alone:
            it runs no further than its recorders read, without labels, and parameters that nothing recorded depends on
            are frozen.
        teacher_precision: ``'auto'`` is float16 on a GPU (under ``--amp`` its dtype), bfloat16 on a CPU with
            instructions for it, else float32; or ``'float32'``, ``'bfloat16'`` or ``'float16'``. See
            :class:`.TeacherPrecision`.
        teacher_input_size: height and width to which the batch is resized for the teacher; its maps are interpolated
            to the size of the student's. By default it sees the student's images.
        input_size: height and width of the student's images, where the data pipeline fixes them: the losses are tried
            at this size. By default 256 x 256 for detectors, 224 x 224 for others, and an odd size.
        loss_schedules: by name of a distillation loss or a pattern such as
            ``'loss_amd*'``, the arguments of :class:`LossSchedule`, or a list of them, which multiply.
        data_preprocessor: the student's; ``Runner`` puts a config's top-level one here.
        init_cfg: as in MMEngine.

    Raises:
        ValueError: a field is wrong; says which, what was given and what was expected.
    """

    def __init__(self,
                 architecture: dict | BaseModel,
                 teacher: dict | BaseModel,
                 distiller: dict,
                 teacher_ckpt: str | None = None,
                 student_ckpt: str | None = None,
                 inherit: Sequence[str] = (),
                 allow_random_teacher: bool = False,
                 trust_checkpoint: bool = False,
                 calculate_student_loss: bool = True,
                 teacher_precision: str = 'auto',
                 teacher_input_size: int | Sequence[int] | None = None,
                 input_size: int | Sequence[int] | None = None,
                 loss_schedules: dict | None = None,
                 data_preprocessor: dict | nn.Module | None = None,
                 init_cfg: dict | None = None) -> None:
        if isinstance(teacher, dict) and not (teacher_ckpt or allow_random_teacher or teacher.get('pretrained')):
            raise ValueError('teacher_ckpt is missing: a teacher without weights teaches noise. Give its checkpoint, '
                             'or set allow_random_teacher=True')

        check_wiring(distiller)
        check_precision(teacher_precision)
        input_size, teacher_input_size = (
            None if size is None else check_size(field, size)
            for field, size in (('input_size', input_size), ('teacher_input_size', teacher_input_size)))

        # The student's own constructor adds to its preprocessor (mixup and CutMix in MMPretrain), so it must build it.
        if isinstance(architecture, dict):
            if not architecture.get('cfg_path') and data_preprocessor is not None:
                architecture = dict(architecture)
                architecture.setdefault('data_preprocessor', data_preprocessor)
            data_preprocessor = None
        # One that the teacher's library makes up by default says nothing about the images it was trained on.
        states_preprocessor = not isinstance(teacher, dict) or bool(
            teacher.get('cfg_path') or teacher.get('data_preprocessor'))
        architecture = build_model('architecture', architecture, trust_checkpoint)
        random_teacher = isinstance(teacher, dict) and not (teacher_ckpt or teacher.get('pretrained'))

        # The student's random start is the one it has when trained alone with the same seed.
        with random_stream_kept(), data_only(trust_checkpoint):
            teacher = build_model('teacher', teacher, trust_checkpoint)
            if teacher_ckpt:
                load_completely(teacher, teacher_ckpt, 'teacher_ckpt', trust_checkpoint)
            channels = input_channels(architecture), input_channels(teacher)
            if channels[0] != channels[1]:
                raise ValueError(f'teacher: takes images of other channels than the student gets, got {channels[1]}, '
                                 f'expected {channels[0]}. Take a teacher of such images, or load them for both with '
                                 f'{channels[1]} (grey is 1, colour 3)')
            set_dummy_sizes(architecture, teacher, input_size, teacher_input_size)
            s_layers, t_layers = layers_in_place(architecture), layers_in_place(teacher)  # MMRazor stops them from it
            try:
                check_sources(distiller.get('student_recorders'), architecture, 'distiller.student_recorders')
                check_sources(distiller.get('teacher_recorders'), teacher, 'distiller.teacher_recorders')
                with DefaultScope.overwrite_default_scope('mmrazor'):
                    super().__init__(architecture=architecture, teacher=teacher, distiller=distiller,
                                     data_preprocessor=data_preprocessor, init_cfg=init_cfg,
                                     calculate_student_loss=calculate_student_loss)
            except UnknownLayerError as error:
                raise ValueError(error.of_pair(architecture, teacher)) from error
            except AssertionError as error:  # how MMRazor answers a wrong distiller
                raise ValueError(f'distiller: {error}') from error
            if not self.distiller.deliveries.deliveries:  # what is handed on might be written over
                write_in_place(s_layers, self.student, self.distiller.student_recorders)
                write_in_place(t_layers, teacher, self.distiller.teacher_recorders)
            del self.teacher  # registered as a submodule by the base class
            self.__dict__['teacher'] = teacher.eval()
            self.__dict__['_teacher_inputs'] = TeacherInputs.between(
                self.data_preprocessor, (teacher if states_preprocessor else self).data_preprocessor,
                teacher_input_size)
            self.__dict__['_teacher_forward'] = TeacherPrecision(
                self._wire_teacher(bool(teacher_input_size)), teacher_precision)
            if not calculate_student_loss:
                self._leave_out_the_task()
            if input_size is None:
                try_odd_size(self.distiller, self.student, self._teacher_forward.forward, self.teacher_batch,
                             self._alignment)
                self._forget_records()

        if student_ckpt:
            try:
                load_completely(self.student, student_ckpt, 'student_ckpt', trust_checkpoint)
            except ValueError as error:
                if 'does not fit' not in str(error):
                    raise
                raise ValueError(f'{error}\nIf only a part is meant to fit, as of a student for other classes, give '
                                 'the file as load_from, which takes the weights of equal name and shape') from error
            self.student._is_init = True
        self.trust_checkpoint = trust_checkpoint
        self.inherit = check_inherit(inherit, self.student, teacher)
        self._schedules = build_schedules(
            loss_schedules or {}, getattr(self.distiller, 'loss_names', list(self.distiller.distill_losses)))
        self._zero_watch = ZeroWatch()
        self._reported = False  # whether the log has the gradients of the first iteration
        self.data_preprocessor.register_forward_pre_hook(set_second_batch_aside)
        self.register_load_state_dict_post_hook(_after_load)
        self.__dict__['_random_teacher'] = random_teacher
        self.__dict__['_preprocessor_of_teacher'] = id(teacher.data_preprocessor)
        self.__dict__['_follow_conversion'] = FollowConversion(self.student, self.distiller.student_recorders)
        self.__dict__['_passes_for_student'] = True

    @property
    def optimised_parts(self) -> tuple[nn.Module, nn.Module]:
        """The student, whose parameter groups are those of its plain training, and what is trained beside it."""
        return self.student, self.distiller

    @property
    def _outside(self) -> list[nn.Module]:
        """Modules that belong to the device, but not to the state, of this one; an EMA copy only borrows them."""
        return [] if self.__dict__.get('_is_copy') else [
            module for module in (self.__dict__.get('teacher'), self.__dict__.get('_teacher_inputs')) if module]

    def _apply(self, fn, *args, **kwargs):
        for module in self._outside:
            module._apply(fn, *args, **kwargs)
        if self._outside:
            self._teacher_forward.forget()
        return super()._apply(fn, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> 'TeacherStudentDistill':
        """Shares the frozen teacher, so that an EMA copy costs only the student."""
        memo.update({id(self.__dict__[name]): self.__dict__[name]
                     for name in ('teacher', '_teacher_inputs', '_teacher_forward')})
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        new.__dict__['_is_copy'] = True
        return new

    def train(self, mode: bool = True) -> 'TeacherStudentDistill':
        """As ever, but the teacher, outside, stays in eval mode; every loop of MMEngine begins with it."""
        nn.Module.train(self, mode)
        self._follow_conversion(self.student)
        if id(self.teacher.data_preprocessor) != self._preprocessor_of_teacher:
            raise ValueError('teacher.data_preprocessor: another has taken its place since the model was built, so '
                             'that the teacher would be shown wrong images. mmrazor.SingleTeacherDistillValLoop does '
                             "that: set val_cfg.type='mmkd_plugin.TeacherStudentValLoop'")
        return self

    def init_weights(self) -> None:
        """Initialises the student as if alone, then the distiller, then what the student inherits."""
        if not self.student.is_init:
            initialize(self.student, 'architecture', self.trust_checkpoint)
        with random_stream_kept(), data_only(self.trust_checkpoint):
            super().init_weights()
        if self._random_teacher and not self.teacher.is_init:
            with random_stream_kept():
                initialize(self.teacher, 'teacher', self.trust_checkpoint)
            self._teacher_forward.forget()
        inherit_modules(self.inherit, self.student, self.teacher)

    def loss(self, batch_inputs: Tensor, data_samples: list | None = None) -> dict[str, Tensor]:
        """Returns ``student.*``, the task losses, and ``distill.*``, the weighted distillation losses.

        A train loop with unlabelled images gives a second batch, and then there is ``unlabelled.*``: the distillation
        losses of that batch, but for those that read labels. Batch norm normalises each of the two batches by its own
        statistics, and its running statistics follow both, the unlabelled one last.
        """
        search_batch, unlabelled = take_second_batch(self.data_preprocessor)
        distilling, expected_zero = not self.distillation_stopped, set()
        if distilling:
            self.distiller.set_deliveries_override(False)
            self._record_teacher(batch_inputs, data_samples)
        self.distiller.set_deliveries_override(True)
        losses = {}
        if self.calculate_student_loss:
            with self.distiller.student_recorders, self.distiller.deliveries if distilling else nullcontext():
                losses = add_prefix(self.student(batch_inputs, data_samples, mode='loss'), 'student')
        elif distilling:
            self._unlabelled.record(self.student, batch_inputs, data_samples)
        else:
            raise ValueError('calculate_student_loss: False leaves nothing to learn once the distillation is stopped. '
                             'Set it to True, or take the hook that stops the distillation out')
        if distilling:
            self.align_records()
            if hasattr(self.distiller, 'prepare_batch'):
                self.distiller.prepare_batch(batch_inputs, data_samples)
            distilled = self._distill_losses(search_batch)
            if self.training and self.calculate_student_loss:
                self._compare_gradients(losses, distilled)
            distilled, expected_zero = self._weighed(distilled, 'distill')
            losses.update(distilled)
            if unlabelled is not None:
                self._forget_records()
                distilled, more = self._weighed(self._unlabelled_losses(unlabelled), 'unlabelled')
                losses.update(distilled)
                expected_zero |= more
        elif any(parameter.requires_grad for parameter in self.distiller.parameters()):
            losses['loss_unused'] = exact_zero(self.distiller)  # DistributedDataParallel misses no gradient
            expected_zero = {'loss_unused'}
        self._forget_records()
        if self.training:
            self._zero_watch(losses, expected_zero)
        return losses

    def parse_losses(self, losses: dict[str, Tensor | list[Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """As in MMEngine, in fewer operations: a scalar is its own mean, and the total is one sum."""
        parts = {name: loss if isinstance(loss, list) else [loss] for name, loss in losses.items()}
        for name, values in parts.items():
            if not values or not all(isinstance(value, Tensor) for value in values):
                raise TypeError(f'{name} is not a tensor or list of tensors')
        means = {name: _total([value.mean() if value.dim() else value for value in values])
                 for name, values in parts.items()}
        loss = _total([mean for name, mean in means.items() if 'loss' in name])
        return loss, OrderedDict(loss=loss, **means)

    def _leave_out_the_task(self) -> None:
        """Prepares for training by the distillation alone, or raises ``ValueError``."""
        if self.distiller.deliveries.deliveries or self._unlabelled.skipped:
            raise ValueError('calculate_student_loss: without its task the student runs no loss and sees no labels, '
                             f'but {", ".join(self._unlabelled.skipped) or "distill_deliveries"} read(s) them. Set it '
                             'to True, or record layers that run in the forward')
        for field, reads in (
                ("dafa.objective 'agreement'", getattr(getattr(self.distiller, 'dafa', None), 'objective', None) ==
                 'agreement'),
                ("loss_weight 'auto'", bool(getattr(self.distiller, 'autos', None))),
                ("base 'crosskd'", getattr(self.distiller, 'crosskd', None) is not None)):
            if reads:
                raise ValueError(f"calculate_student_loss: {field} reads the task's loss, got False. Set it to True, "
                                 'or choose another')
        frozen = self._unlabelled.freeze_unreached(self.student)
        if frozen:
            print_log(f'calculate_student_loss=False: {len(frozen)} parameters that no distillation loss reaches are '
                      f'frozen: {", ".join(frozen[:5])}{", ..." if len(frozen) > 5 else ""}', logger='current')

    def _record_teacher(self, batch_inputs: Tensor, data_samples: list | None) -> None:
        with torch.no_grad(), self.distiller.deliveries:
            self._teacher_forward(*self.teacher_batch(batch_inputs, data_samples))

    def teacher_inputs(self, batch_inputs: Tensor, data_samples: list | None) -> Tensor:
        """Returns a batch of the student's preprocessor as the teacher expects it."""
        return self._teacher_inputs(batch_inputs, data_samples) if self._teacher_inputs else batch_inputs

    def teacher_batch(self, batch_inputs: Tensor, data_samples: list | None) -> tuple[Tensor, list | None]:
        """Returns a batch as the teacher expects it, and its samples, which hold the teacher's sizes of the images."""
        inputs = self.teacher_inputs(batch_inputs, data_samples)
        if self._teacher_inputs:
            data_samples = self._teacher_inputs.samples(data_samples, batch_inputs.shape[2:], inputs.shape[2:])
        return inputs, data_samples

    def align_records(self) -> None:
        """Brings the recorded maps that a loss compares to one size, after both networks have run."""
        self._alignment()

    def _forget_records(self) -> None:
        """Lets go of the step's features and graph."""
        for recorders in (self.distiller.student_recorders, self.distiller.teacher_recorders):
            for recorder in recorders.recorders.values():
                recorder.reset_data_buffer()
        if hasattr(self.distiller, 'forget'):
            self.distiller.forget()

    def _distill_losses(self, search_batch: dict | None) -> dict[str, Tensor]:
        policy = getattr(self.distiller, 'dafa', None)
        if search_batch is None or policy is not None and policy.frozen:
            return self.distiller.compute_distill_losses()
        if policy is None:
            raise ValueError('The train loop gives a second batch, to search a policy with, but the distiller, '
                             f'{type(self.distiller).__name__}, has none: use a plain train loop')
        if self.distiller.deliveries.deliveries:
            raise ValueError('distill_deliveries hand on what belongs to the first of the two batches that the train '
                             'loop gives: search the policy with a plain train loop, or take them out')
        losses = self.distiller.compute_distill_losses(search=False)
        losses['loss_aug'] = self._held_out_policy_loss(search_batch)
        return losses

    def _compare_gradients(self, task_losses: dict[str, Tensor], losses: dict[str, Tensor]) -> None:
        """Lets the distiller compare the gradients of its losses with the task's: for the log, once, or for itself."""
        if not self._reported and hasattr(self.distiller, 'gradient_report'):
            self._reported = True
            report = self.distiller.gradient_report(self.parse_losses(task_losses)[0], losses)
            if report:
                print_log("Gradients at the distilled layers in the first iteration, relative to the task's: "
                          f'{report}. A part that is a hundred times the task leaves it little of a clipped gradient.',
                          logger='current')
        if getattr(self.distiller, 'measuring', False):
            self.distiller.measure(self.parse_losses(task_losses)[0], losses)

    def _weighed(self, losses: dict[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], set[str]]:
        """Returns the losses with their schedules' factors under full names, and the names of those of weight zero."""
        weight_of = getattr(self.distiller, 'weight_of', lambda name: getattr(
            self.distiller.distill_losses[name], 'loss_weight', 1.0))
        expected_zero = {f'{prefix}.{name}' for name in losses if not weight_of(name)}
        for name in losses.keys() & self._schedules.keys():
            for factor in [schedule() for schedule in self._schedules[name]]:
                losses[name] = losses[name] * factor
                expected_zero.update([] if factor else [f'{prefix}.{name}'])
        return add_prefix(losses, prefix), expected_zero

    def check_unlabelled(self) -> None:
        """Raises ``ValueError`` if unlabelled images teach nothing; warns of losses that skip them."""
        self._unlabelled.check(self.distiller, self._teacher_forward.forward)

    def _unlabelled_losses(self, batch: dict) -> dict[str, Tensor]:
        data = self.data_preprocessor(batch, False)  # not for training: no mixup, no masks, nothing that reads labels
        inputs, data_samples = data['inputs'], data.get('data_samples')
        self._record_teacher(inputs, data_samples)
        self._unlabelled.record(self.student, inputs, data_samples)
        self.align_records()
        return self._unlabelled.compute(self.distiller)

    def _held_out_policy_loss(self, search_batch: dict) -> Tensor:
        """The policy's loss on a batch of its own, which leaves no trace in the student."""
        data = self.data_preprocessor(search_batch, True)
        inputs, data_samples = data['inputs'], data.get('data_samples')
        self._record_teacher(inputs, data_samples)
        with keep_statistics(self):
            forward = PartialForward(self.student, self.distiller.student_recorders, {})
            try:
                with torch.no_grad():
                    forward(inputs, data_samples)
            finally:
                forward.remove()
            self.align_records()
            return self.distiller.compute_policy_loss()

    def _wire_teacher(self, resized: bool) -> PartialForward:
        """Returns the part of the teacher that the losses read, after trying them."""
        calls, self.__dict__['_alignment'] = dry_run(self.distiller, self.student, self.teacher, resized)
        self.__dict__['_unlabelled'] = UnlabelledPart(self.distiller, self.student)
        forward = PartialForward(self.teacher, self.distiller.teacher_recorders, calls)
        if forward.silent() or self.distiller.deliveries.deliveries:  # both may only come about in the loss
            forward.mode = 'loss'
        from mmdet.models.detectors import BaseDetector
        if resized and forward.mode == 'loss' and isinstance(self.teacher, BaseDetector):
            raise ValueError('teacher_input_size: what is recorded runs in the teacher\'s loss only, got '
                             f'{type(self.teacher).__name__}, whose loss reads the boxes of the student\'s images. '
                             'Record layers outside the loss, or leave teacher_input_size out')
        self._forget_records()
        return forward

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                              error_msgs) -> None:
        """Takes a checkpoint of this algorithm, which must fit entirely, or of the plain student."""
        student = prefix + STUDENT_PREFIX
        whole = any(key.startswith(student) for key in state_dict)
        # Loaders of torch and of MMEngine both call this and then the hook below, but the hook sees no error messages.
        self.__dict__['_whole_load'] = (error_msgs if whole else None, unexpected_keys)
        if not whole:
            names = self.student.state_dict()
            if not any(prefix + name in state_dict for name in names):
                given = ', '.join(list(state_dict)[:5])
                raise ValueError(f'load_from: no weight of the student, {type(self.student).__name__}, is in the '
                                 f'checkpoint, which has {given}, ...; it has {", ".join(list(names)[:5])}, ...')
            for key in [key for key in state_dict if key.startswith(prefix)]:
                state_dict[student + key[len(prefix):]] = state_dict.pop(key)
        for key in [key for key in state_dict if key.startswith(prefix + 'teacher.')]:
            del state_dict[key]  # MMRazor's SingleTeacherDistill saves its teacher
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                                      error_msgs)


def _after_load(model: TeacherStudentDistill, incompatible) -> None:
    """Refuses a checkpoint of the algorithm that fits in part, as it would resume to another training.

    One of the plain student, by ``load_from``, comes after the initialisation, and has overwritten what was inherited.
    """
    error_msgs, unexpected = model.__dict__.pop('_whole_load')
    missing = [key for key in incompatible.missing_keys if 'num_batches_tracked' not in key]
    if error_msgs is not None and (missing or unexpected or error_msgs):
        raise ValueError('The checkpoint does not fit the model of this config (to start from its student alone, give '
                         'it as model.student_ckpt):\n' + '\n'.join(
            [f'missing: {key}' for key in missing[:20]] + [f'unexpected: {key}' for key in unexpected[:20]]
            + error_msgs[:20]))
    if error_msgs is None and model.inherit and model.is_init and model.training:
        print_log('inherit: once more, after the student has been loaded.', logger='current')
        inherit_modules(model.inherit, model.student, model.teacher)


def _total(scalars: Sequence[Tensor]) -> Tensor:
    return scalars[0] if len(scalars) == 1 else torch.stack(list(scalars)).sum()
