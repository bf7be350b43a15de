"""The distillation algorithm, with a student and one or several frozen teachers."""
import copy
import logging
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseModel, ModuleDict
from mmengine.registry import DefaultScope
from mmrazor.models.algorithms import SingleTeacherDistill
from mmrazor.models.algorithms.base import BaseAlgorithm
from mmrazor.models.utils import add_prefix
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ...checkpoints.guard import data_only
from ...checkpoints.initialize import initialize
from ...checkpoints.reading import STUDENT_PREFIX, load_completely
from ...config.cfg_path import build_model
from ...config.teachers import TeacherFields, split_by_teacher
from ...registry import MODELS
from ..distillers.feature_distiller import exact_zero
from ..dummy_input import check_size
from ..recording import PartialForward, keep_statistics, layers_in_place, merged, random_stream_kept, write_in_place
from .follow_conversion import FollowConversion
from .frozen_teacher import FrozenTeacher, check_fields, naming
from .inherit import inherit_modules
from .loss_log import ZeroWatch
from .loss_schedule import build_schedules
from .second_batch import set_second_batch_aside, take_second_batch
from .student_parts import StudentParts
from .unlabelled import UnlabelledPart, freeze_unreached, record_student

Losses = dict[str, dict[str, Tensor]]  # distillation losses by teacher


@MODELS.register_module()
class TeacherStudentDistill(StudentParts, SingleTeacherDistill):
    """MMRazor's ``SingleTeacherDistill`` with checks at build time, a cheaper teacher and several teachers.

    Attributes:
        teachers: :class:`.FrozenTeacher` by name; a single teacher has the name ''.
        teacher, distiller: the teacher's network and its distiller; modules by name if there are several teachers.

    - The teacher is in eval mode, without gradient, and runs only as far as its recorders read. It is not a
      submodule, so checkpoints, EMA copies, optimizers and parallel wrappers do not contain it. A resumed run loads
      it from its own file.
    - The student's preprocessor makes the batch. If the teacher has another normalisation, channel order, padding or
      input size, it gets the batch in that form. Maps of equal stride are cropped to their common size.
    - The teacher runs in half precision on devices that support it.
    - Layers of backbone and neck work in place, as without distillation, unless this changes a record. MMRazor turns
      in-place operations off for all layers.
    - Hooks of the student's config find the student's parts, see :class:`.StudentParts`. Constructors of optimizers
      find the student's parameters under their own names.
    - Configuration errors are reported when the model is built.

    Several teachers have names, and each has its own distiller. Each network runs once per step::

        teacher=dict(big=dict(cfg_path='big.py'), other=dict(cfg_path='other.py')),
        teacher_ckpt=dict(big='big.pth', other='other.pth'),
        distiller=dict(big=dict(type='mmkd_plugin.FeatureDistiller', layers=['neck'], base='pkd', loss_weight=5.0),
                       other=dict(type='mmkd_plugin.FeatureDistiller', layers=['neck'], base='fitnet'))

    Types in ``distiller`` without a scope are MMRazor's.

    Args:
        architecture: the student, a config or a built model.
        teacher: the teacher, a config or a built model, or a dict of teachers by name. Student and teacher can be
            ``dict(cfg_path=...)``, with a library's config (``'mmdet::...'``) or your own file.
        distiller: config of MMRazor's ``ConfigurableDistiller``, :class:`AMDDistiller` or another distiller. With
            several teachers, a dict of these by the same names. Then ``teacher_ckpt`` and ``inherit`` are dicts too,
            and ``teacher_precision`` and ``teacher_input_size`` may be.
        teacher_ckpt: file or URL of the teacher's weights. All weights must fit.
        student_ckpt: file or URL of the student's initial weights. All weights must fit.
        inherit: names of student modules, such as ``['neck', 'bbox_head']``, that are initialised with the teacher's
            weights of the same name and shape (the inheriting strategy of FGD, arXiv 2111.11837, and MGD,
            arXiv 2205.01529). This is repeated after ``load_from`` a checkpoint of the plain student, but not after
            one of the distillation.
        allow_random_teacher: whether the teacher may have no weights. Its own config then initialises it.
        trust_checkpoint: whether weights files may run code when they are loaded. This applies to both checkpoints and
            to all files that the models read when they are built and initialised. By default, files are read as data,
            and a file that contains more is refused.
        calculate_student_loss: whether the student also learns its task. If False, it learns only from the teacher. It
            then runs without labels and only as far as its recorders read, and parameters that no record depends on
            are frozen.
        teacher_precision: ``'auto'``, ``'float32'``, ``'bfloat16'`` or ``'float16'``. ``'auto'`` is float16 on a GPU
            (the dtype of ``--amp`` with it), bfloat16 on a CPU with instructions for it, and otherwise float32. See
            :class:`.TeacherPrecision`.
        teacher_input_size: height and width to which the batch is resized for the teacher. Its maps are interpolated
            to the size of the student's. By default, the teacher gets the student's image size.
        input_size: height and width of the student's images if the data pipeline fixes them. The losses are tried at
            this size. By default, they are tried at 256 x 256 for detectors, 224 x 224 for others, and at an odd size.
        loss_schedules: arguments of :class:`LossSchedule`, or a list of them, which are multiplied, by name of a
            distillation loss or a pattern such as ``'loss_amd*'``, with several teachers ``'NAME.loss_amd*'``.
        data_preprocessor: the student's preprocessor. ``Runner`` passes the config's top-level one.
        init_cfg: as in MMEngine.

    Raises:
        ValueError: a field is wrong. The message has the field, the given value and the expected value.
    """

    def __init__(self,
                 architecture: dict | BaseModel,
                 teacher: dict | BaseModel,
                 distiller: dict,
                 teacher_ckpt: str | dict[str, str] | None = None,
                 student_ckpt: str | None = None,
                 inherit: Sequence[str] | dict[str, Sequence[str]] = (),
                 allow_random_teacher: bool = False,
                 trust_checkpoint: bool = False,
                 calculate_student_loss: bool = True,
                 teacher_precision: str | dict[str, str] = 'auto',
                 teacher_input_size: int | Sequence[int] | dict[str, int | Sequence[int]] | None = None,
                 input_size: int | Sequence[int] | None = None,
                 loss_schedules: dict | None = None,
                 data_preprocessor: dict | nn.Module | None = None,
                 init_cfg: dict | None = None) -> None:
        input_size = None if input_size is None else check_size('input_size', input_size)
        fields = split_by_teacher(TeacherFields(teacher, distiller, teacher_ckpt, inherit, teacher_precision,
                                                teacher_input_size))
        fields = {name: check_fields(name, each, allow_random_teacher) for name, each in fields.items()}

        # The student's constructor adds to its preprocessor (mixup and CutMix in MMPretrain), so it must build it.
        if isinstance(architecture, dict):
            if not architecture.get('cfg_path') and data_preprocessor is not None:
                architecture = dict(architecture)
                architecture.setdefault('data_preprocessor', data_preprocessor)
            data_preprocessor = None
        architecture = build_model('architecture', architecture, trust_checkpoint)
        from mmdet.models.detectors import SemiBaseDetector
        if isinstance(architecture, SemiBaseDetector):
            raise ValueError(f'architecture: {type(architecture).__name__} gets several batches in a step, which is '
                             'not supported. Use its detector alone')
        in_place = layers_in_place(architecture)  # MMRazor turns in-place operations off

        # The student gets the same random weights as when trained alone with the same seed.
        with random_stream_kept(), data_only(trust_checkpoint):
            with DefaultScope.overwrite_default_scope('mmrazor'):  # the base's own takes a single teacher
                BaseAlgorithm.__init__(self, architecture, data_preprocessor, init_cfg)
            self.calculate_student_loss = calculate_student_loss
            self.distillation_stopped = False  # MMRazor's StopDistillHook sets it
            teachers = {}
            for name, each in fields.items():
                if name:
                    print_log(f'Teacher {name!r}:', logger='current')
                with naming(name):
                    teachers[name] = FrozenTeacher(name, each, self, input_size, trust_checkpoint)
            self._set_teachers(teachers)
            if not any(teacher.distiller.deliveries.deliveries for teacher in teachers.values()):
                write_in_place(in_place, self.student, self._student_recorders)
            if not calculate_student_loss:
                self._leave_out_the_task()

        if student_ckpt:
            inherited = [module for each in teachers.values() for module in each.inherit]
            if inherited:
                raise ValueError(f'student_ckpt: inherit would replace its {", ".join(inherited)} by the teacher\'s. '
                                 'Leave out student_ckpt, or add --cfg-options model.inherit=[]')
            try:
                load_completely(self.student, student_ckpt, 'student_ckpt', trust_checkpoint)
            except ValueError as error:
                if 'does not fit' not in str(error):
                    raise
                raise ValueError(f'{error}\nIf only a part should fit, as with other classes, set load_from to the '
                                 'file. It loads the weights of equal name and shape') from error
            self.student._is_init = True
        self.trust_checkpoint = trust_checkpoint
        self._schedules = build_schedules(
            loss_schedules or {}, [name for teacher in teachers.values() for name in teacher.loss_names])
        self._zero_watch = ZeroWatch()
        self._reported = False  # whether the gradients of the first iteration are logged
        self.data_preprocessor.register_forward_pre_hook(set_second_batch_aside)
        self.register_load_state_dict_post_hook(_after_load)
        self.__dict__['_follow_conversion'] = FollowConversion(self.student, self._student_recorders)
        self.__dict__['_passes_for_student'] = True

    def _set_teachers(self, teachers: dict[str, FrozenTeacher]) -> None:
        """Sets ``teacher`` and ``distiller`` to those of a single teacher, or to dicts of modules by name."""
        if '' in teachers:
            network, self.distiller = teachers[''].network, teachers[''].distiller
            self.__dict__['_student_recorders'] = self.distiller.student_recorders
        else:
            _check_several(teachers)
            network = nn.ModuleDict({name: teacher.network for name, teacher in teachers.items()})
            self.distiller = ModuleDict({name: teacher.distiller for name, teacher in teachers.items()})
            self.__dict__['_student_recorders'] = merged(
                {name: teacher.distiller.student_recorders for name, teacher in teachers.items()})
        self.__dict__['teachers'] = teachers
        self.__dict__['teacher'] = network  # not registered
        self.__dict__['_preprocessor_of_teacher'] = id(getattr(network, 'data_preprocessor', None))

    @property
    def optimised_parts(self) -> tuple[nn.Module, nn.Module]:
        """The student, with the parameter groups of its plain training, and the distiller's trained parts.

        Raises:
            ValueError: the parts contain a policy. :class:`.PolicyOptimWrapperConstructor` hides it from the student's
                optimizer.
        """
        if any(parameter.requires_grad for teacher in self.teachers.values() if teacher.policy is not None
               for parameter in teacher.policy.parameters()):
            raise ValueError('optim_wrapper.constructor: the policy of dafa would be trained by the optimizer of the '
                             "student. Set it to 'mmkd_plugin.PolicyOptimWrapperConstructor'")
        return self.student, self.distiller

    @property
    def _outside(self) -> list[nn.Module]:
        """Modules that move to the model's device but are not in its state; an EMA copy does not own them."""
        return [] if self.__dict__.get('_is_copy') else [
            module for teacher in self.__dict__.get('teachers', {}).values()
            for module in (teacher.network, teacher.inputs) if module]

    def _apply(self, fn, *args, **kwargs):
        for module in self._outside:
            module._apply(fn, *args, **kwargs)
        if self._outside:
            for teacher in self.teachers.values():
                teacher.forward.forget()
        return super()._apply(fn, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> 'TeacherStudentDistill':
        """Shares the frozen teachers, so that an EMA copy costs only the student."""
        memo.update({id(part): part for teacher in self.teachers.values()
                     for part in (self.teacher, *teacher.shared, *teacher.network.modules())})
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        new.__dict__['_is_copy'] = True
        return new

    def train(self, mode: bool = True) -> 'TeacherStudentDistill':
        """Sets the mode of all but the teacher, which stays in eval mode. MMEngine's loops call this first."""
        nn.Module.train(self, mode)
        self._follow_conversion(self.student)
        if id(getattr(self.teacher, 'data_preprocessor', None)) != self._preprocessor_of_teacher:
            raise ValueError('teacher.data_preprocessor: was replaced after the model was built, so the teacher would '
                             'get wrong images. mmrazor.SingleTeacherDistillValLoop does this. Set '
                             "val_cfg.type='mmkd_plugin.TeacherStudentValLoop'")
        return self

    def init_weights(self) -> None:
        """Initialises the student as without distillation, then the distiller, then the inherited modules."""
        if not self.student.is_init:
            initialize(self.student, 'architecture', self.trust_checkpoint)
        with random_stream_kept(), data_only(self.trust_checkpoint):
            super().init_weights()
        for teacher in self.teachers.values():
            if teacher.random and not teacher.network.is_init:
                with random_stream_kept():
                    initialize(teacher.network, teacher.field, self.trust_checkpoint)
                teacher.forward.forget()
        self._inherit()

    def _inherit(self) -> None:
        for teacher in self.teachers.values():
            inherit_modules(teacher.inherit, self.student, teacher.network)

    def loss(self, batch_inputs: Tensor, data_samples: list | None = None) -> dict[str, Tensor]:
        """Returns ``student.*``, the task losses, and ``distill.*``, the weighted distillation losses.

        With several teachers, the distillation losses are ``distill.NAME.*``.

        A train loop with unlabelled images gives a second batch. The distillation losses of this batch are
        ``unlabelled.*``, without the losses that need labels. Batch norm normalises each of the two batches by its own
        statistics, and its running statistics are updated with both, the unlabelled batch last.
        """
        search_batch, unlabelled = take_second_batch(self.data_preprocessor)
        distilling, expected_zero = not self.distillation_stopped, set()
        if distilling:
            self._record_teachers(batch_inputs, data_samples)
        losses = {}
        if self.calculate_student_loss:
            with self._student_recorders, ExitStack() as deliveries:
                for teacher in self.teachers.values() if distilling else ():
                    deliveries.enter_context(teacher.distiller.deliveries)
                losses = add_prefix(self.student(batch_inputs, data_samples, mode='loss'), 'student')
        elif distilling:
            record_student(self.student, self._unlabelled_parts, batch_inputs, data_samples)
        else:
            raise ValueError('calculate_student_loss: False leaves no loss after the distillation is stopped. Set it '
                             'to True, or remove the hook that stops the distillation')
        if distilling:
            distilled = self._distill_losses(batch_inputs, data_samples, search_batch is not None)
            if self.training and self.calculate_student_loss:
                self._compare_gradients(losses, distilled)
            if search_batch is not None:
                self._add_held_out_policy_losses(distilled, search_batch)
            distilled, expected_zero = self._weighed(distilled, 'distill')
            losses.update(distilled)
            if unlabelled is not None:
                self._forget_records()
                distilled, more = self._weighed(self._unlabelled_losses(unlabelled), 'unlabelled')
                losses.update(distilled)
                expected_zero |= more
        elif any(parameter.requires_grad for parameter in self.distiller.parameters()):
            losses['loss_unused'] = exact_zero(self.distiller)  # so that DistributedDataParallel gets all gradients
            expected_zero = {'loss_unused'}
        self._forget_records()
        if self.training:
            self._zero_watch(losses, expected_zero)
        return losses

    def parse_losses(self, losses: dict[str, Tensor | list[Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """As in MMEngine, with fewer operations: no mean of a scalar, and one sum for the total."""
        parts = {name: loss if isinstance(loss, list) else [loss] for name, loss in losses.items()}
        for name, values in parts.items():
            if not values or not all(isinstance(value, Tensor) for value in values):
                raise TypeError(f'{name} is not a tensor or list of tensors')
        means = {name: _total([value.mean() if value.dim() else value for value in values])
                 for name, values in parts.items()}
        loss = _total([mean for name, mean in means.items() if 'loss' in name])
        return loss, OrderedDict(loss=loss, **means)

    def _leave_out_the_task(self) -> None:
        """Prepares training without the task loss, or raises ``ValueError``."""
        for teacher in self.teachers.values():
            with naming(teacher.name):
                teacher.check_without_task()
        frozen = freeze_unreached(self.student, self._unlabelled_parts)
        self._forget_records()
        if frozen:
            print_log(f'calculate_student_loss=False: {len(frozen)} parameters that no distillation loss reaches are '
                      f'frozen: {", ".join(frozen[:5])}{", ..." if len(frozen) > 5 else ""}', logger='current')

    @property
    def _unlabelled_parts(self) -> dict[str, UnlabelledPart]:
        return {name: teacher.unlabelled for name, teacher in self.teachers.items()}

    def _record_teachers(self, batch_inputs: Tensor, data_samples: list | None) -> None:
        for teacher in self.teachers.values():
            teacher.record(batch_inputs, data_samples)

    def _forget_records(self) -> None:
        for teacher in self.teachers.values():
            teacher.forget_records()

    def _distill_losses(self, batch_inputs: Tensor, data_samples: list | None, searching: bool) -> Losses:
        """Returns the weighted losses of each teacher; ``searching``: whether there is a batch for the search."""
        if searching and all(teacher.policy is None for teacher in self.teachers.values()):
            raise ValueError('The train loop gives a second batch for the search of a policy, but the distiller, '
                             f'{type(self.distiller).__name__}, has no policy. Use a plain train loop')
        if searching and any(getattr(teacher.policy, 'objective', None) == 'agreement'
                             for teacher in self.teachers.values()):
            raise ValueError("dafa.objective: 'agreement' searches on the batch of the step, but the train loop "
                             "gives a second batch for the search. Use a plain train loop, or 'similarity'")
        losses = {}
        for name, teacher in self.teachers.items():
            teacher.align()
            if hasattr(teacher.distiller, 'prepare_batch'):
                teacher.distiller.prepare_batch(batch_inputs, data_samples)
            losses[name] = teacher.losses(with_policy=not searching)
        return losses

    def _compare_gradients(self, task_losses: dict[str, Tensor], losses: Losses) -> None:
        """Lets distillers compare their gradients with the task's, once for the log, and to measure weights."""
        reports = []
        for name, teacher in self.teachers.items():
            if not self._reported and hasattr(teacher.distiller, 'gradient_report'):
                report = teacher.distiller.gradient_report(self.parse_losses(task_losses)[0], losses[name])
                reports += [f'{name}: {report}' if name else report] if report else []
            if getattr(teacher.distiller, 'measuring', False):
                teacher.distiller.measure(self.parse_losses(task_losses)[0], losses[name])
                if not teacher.distiller.measuring:
                    for base, auto in teacher.distiller.autos.items():  # logged in every later iteration
                        MessageHub.get_current_instance().update_scalar(
                            f'train/weight/{teacher.prefix}{base}', float(auto.weight))
        self._reported = True
        if reports:
            print_log("Gradients at the distilled layers in the first iteration, relative to the task's: "
                      f'{"; ".join(reports)}. If a part is a hundred times the task, little of a clipped gradient is '
                      'left for the task.', logger='current')

    def _weighed(self, losses: Losses, prefix: str) -> tuple[dict[str, Tensor], set[str]]:
        """Returns the losses times their schedules, under full names, and the names of losses whose weight is zero."""
        found, expected_zero = {}, set()
        for teacher in self.teachers.values():
            for name, loss in losses[teacher.name].items():
                full = f'{prefix}.{teacher.prefix}{name}'
                factors = [schedule() for schedule in self._schedules.get(teacher.prefix + name, ())]
                for factor in factors:
                    loss = loss * factor
                if not (teacher.weight_of(name) and all(factors)):
                    expected_zero.add(full)
                found[full] = loss
        return found, expected_zero

    def check_unlabelled(self) -> None:
        """Raises ``ValueError`` if all losses need labels, and warns about the losses that need them."""
        for teacher in self.teachers.values():
            with naming(teacher.name):
                teacher.unlabelled.check(teacher.distiller, teacher.forward.forward)

    def _unlabelled_losses(self, batch: dict) -> Losses:
        data = self.data_preprocessor(batch, False)  # not for training, so no mixup, masks or labels
        inputs, data_samples = data['inputs'], data.get('data_samples')
        self._record_teachers(inputs, data_samples)
        record_student(self.student, self._unlabelled_parts, inputs, data_samples)
        losses = {}
        for name, teacher in self.teachers.items():
            teacher.align()
            losses[name] = teacher.unlabelled.compute(teacher.distiller)
        return losses

    def _add_held_out_policy_losses(self, losses: Losses, search_batch: dict) -> None:
        """Adds the policies' losses on the search batch. The student's state does not change."""
        searching = {name: teacher for name, teacher in self.teachers.items() if teacher.searches}
        if not searching:
            return
        data = self.data_preprocessor(search_batch, True)
        inputs, data_samples = data['inputs'], data.get('data_samples')
        for teacher in searching.values():
            teacher.record(inputs, data_samples)
        recorders = merged({name: teacher.distiller.student_recorders for name, teacher in searching.items()})
        with keep_statistics(self):
            forward = PartialForward(self.student, recorders, {})
            try:
                with torch.no_grad():
                    forward(inputs, data_samples)
            finally:
                forward.remove()
            for name, teacher in searching.items():
                teacher.align()
                losses[name]['loss_aug'] = teacher.distiller.compute_policy_loss()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                              error_msgs) -> None:
        """Loads a checkpoint of this algorithm, which must fit completely, or of the plain student.

        States of norms alone are loaded as they are: MMDetection's ``SyncNormHook`` averages them over processes.
        """
        norms = {f'{prefix}{name}.{key}' for name, module in self.named_modules() if isinstance(module, _NormBase)
                 for key in module.state_dict()}
        if state_dict and state_dict.keys() <= norms:
            self.__dict__['_whole_load'] = None
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                                          error_msgs)
            return
        student = prefix + STUDENT_PREFIX
        whole = any(key.startswith(student) for key in state_dict)
        # Loaders of torch and of MMEngine both call this and then the hook below, but the hook sees no error messages.
        self.__dict__['_whole_load'] = (error_msgs if whole else None, unexpected_keys)
        if not whole:
            names = self.student.state_dict()
            if not any(prefix + name in state_dict for name in names):
                given = ', '.join(list(state_dict)[:5])
                raise ValueError(f'load_from: the checkpoint has no weight of the student, '
                                 f'{type(self.student).__name__}, got {given}, ..., '
                                 f'expected {", ".join(list(names)[:5])}, ...')
            for key in [key for key in state_dict if key.startswith(prefix)]:
                state_dict[student + key[len(prefix):]] = state_dict.pop(key)
        for key in [key for key in state_dict if key.startswith(prefix + 'teacher.')]:
            del state_dict[key]  # MMRazor's SingleTeacherDistill saves its teacher
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                                      error_msgs)


def _after_load(model: TeacherStudentDistill, incompatible) -> None:
    """Raises ``ValueError`` for a checkpoint of the algorithm that fits only in part, because a resume would differ.

    A checkpoint of the plain student by ``load_from`` has overwritten the inherited weights, so they are copied again.
    """
    found = model.__dict__.pop('_whole_load')
    if found is None:
        return
    error_msgs, unexpected = found
    missing = [key for key in incompatible.missing_keys if 'num_batches_tracked' not in key]
    if error_msgs is not None and (missing or unexpected or error_msgs):
        raise ValueError('The checkpoint does not fit the model of this config. To start from its student alone, set '
                         'model.student_ckpt to it and model.inherit to []:\n' + '\n'.join(
            [f'missing: {key}' for key in missing[:20]] + [f'unexpected: {key}' for key in unexpected[:20]]
            + error_msgs[:20]))
    if error_msgs is None and model.is_init and model.training and any(
            teacher.inherit for teacher in model.teachers.values()):
        modules = ', '.join(module for teacher in model.teachers.values() for module in teacher.inherit)
        print_log(f'inherit: {modules} of the loaded student are replaced by the teacher\'s. To keep the loaded '
                  'weights, set model.inherit=[].', logger='current', level=logging.WARNING)
        model._inherit()


def _check_several(teachers: dict[str, FrozenTeacher]) -> None:
    """Raises ``ValueError`` for fields that need a single teacher."""
    for name, teacher in teachers.items():
        if teacher.distiller.deliveries.deliveries:
            raise ValueError(f'distiller.{name}.distill_deliveries: need a single teacher, got several teachers. '
                             'Remove them')
        if getattr(teacher.policy, 'objective', None) == 'agreement':
            raise ValueError(f"distiller.{name}.dafa.objective: 'agreement' counts the gradient of all other losses as "
                             "the task's, got several teachers, expected one. Use 'similarity'")


def _total(scalars: Sequence[Tensor]) -> Tensor:
    return scalars[0] if len(scalars) == 1 else torch.stack(list(scalars)).sum()
