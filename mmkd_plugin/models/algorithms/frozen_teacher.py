"""A frozen teacher with its inputs, its precision and its distiller."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.registry import DefaultScope
from mmrazor.models.algorithms import SingleTeacherDistill
from mmrazor.models.distillers import ConfigurableDistiller
from mmrazor.registry import MODELS as RAZOR_MODELS
from torch import Tensor, nn

from ...checkpoints.reading import load_completely
from ...config.cfg_path import build_model
from ...config.teachers import TeacherFields
from ..dummy_input import Size, check_size, input_channels, set_dummy_sizes
from ..recording import (
    PartialForward,
    UnknownLayerError,
    check_sources,
    check_wiring,
    layers_in_place,
    write_in_place,
)
from ..refiners import DAFA
from .dry_run import dry_run, try_odd_size
from .inherit import check_inherit
from .teacher_inputs import TeacherInputs
from .teacher_precision import TeacherPrecision, check_precision
from .unlabelled import UnlabelledPart


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Adds the name of the teacher to a ``ValueError`` if there are several teachers."""
    try:
        yield
    except ValueError as error:
        if not name:
            raise
        raise ValueError(f'teacher {name!r}: {error}') from error


def check_fields(name: str, fields: TeacherFields, allow_random: bool) -> TeacherFields:
    """Checks the fields of a teacher before anything is built, and returns them with the input size as (h, w).

    Raises:
        ValueError: a field is wrong.
    """
    with naming(name):
        teacher, size = fields.teacher, fields.teacher_input_size
        if isinstance(teacher, dict) and not (fields.teacher_ckpt or allow_random or teacher.get('pretrained')):
            raise ValueError('teacher_ckpt is missing: the teacher would have random weights. Give its checkpoint, or '
                             'set allow_random_teacher=True')
        check_wiring(fields.distiller)
        check_precision(fields.teacher_precision)
        return fields if size is None else fields._replace(teacher_input_size=check_size('teacher_input_size', size))


class FrozenTeacher:
    """A network in eval mode without gradient, with its inputs, its precision and its distiller.

    It is not a module: checkpoints do not contain the network, and the algorithm registers the distiller.

    Args:
        name: name of the teacher; '' for a single teacher.
        fields: result of :func:`check_fields`.
        algorithm: the algorithm with the student.
        input_size: height and width at which the losses are tried; None for the default size and an odd size.

    Raises:
        ValueError: a field is wrong, or does not fit the student.
    """

    def __init__(self, name: str, fields: TeacherFields, algorithm: SingleTeacherDistill, input_size: Size | None,
                 trust_checkpoint: bool) -> None:
        self.name, teacher, student = name, fields.teacher, algorithm.student
        is_config = isinstance(teacher, dict)
        # A preprocessor by the library's default does not tell how the teacher was trained.
        states_preprocessor = not is_config or bool(teacher.get('cfg_path') or teacher.get('data_preprocessor'))
        self.random = is_config and not (fields.teacher_ckpt or teacher.get('pretrained'))
        self.network = network = build_model('teacher', teacher, trust_checkpoint)
        if fields.teacher_ckpt:
            load_completely(network, fields.teacher_ckpt, 'teacher_ckpt', trust_checkpoint)
        channels = input_channels(student), input_channels(network)
        if channels[0] != channels[1]:
            raise ValueError(f'teacher: the number of image channels differs from the student\'s, got {channels[1]}, '
                             f'expected {channels[0]}. Use a teacher for the student\'s images, or load images with '
                             f'{channels[1]} for both (grey is 1, colour 3)')
        size = fields.teacher_input_size
        set_dummy_sizes(student, network, input_size, size)
        self.distiller = self._prepare(fields.distiller, student)
        network.eval()
        self.inputs = TeacherInputs.between(
            algorithm.data_preprocessor, (network if states_preprocessor else algorithm).data_preprocessor, size)
        calls, self.align = dry_run(self.distiller, student, network, bool(size))  # maps that a loss compares
        self.unlabelled = UnlabelledPart(self.distiller, student)
        self.forward = TeacherPrecision(self._partial_forward(calls, bool(size)), fields.teacher_precision,
                                        self.title)
        if input_size is None:
            try_odd_size(self.distiller, student, self.forward.forward, self.batch, self.align)
            self.forget_records()
        self.inherit = check_inherit(fields.inherit, student, network)

    def _prepare(self, distiller: dict, student: nn.Module) -> ConfigurableDistiller:
        """Freezes the network, builds the distiller and connects it to both networks."""
        network = self.network
        network.requires_grad_(False)
        in_place = layers_in_place(network)
        _stop_writing_in_place(network)
        try:
            check_sources(distiller.get('student_recorders'), student, 'distiller.student_recorders')
            check_sources(distiller.get('teacher_recorders'), network, 'distiller.teacher_recorders')
            with DefaultScope.overwrite_default_scope('mmrazor'):
                built = RAZOR_MODELS.build(distiller)
                built.prepare_from_student(student)
                built.prepare_from_teacher(network)
        except UnknownLayerError as error:
            raise ValueError(error.of_pair(student, network)) from error
        except (AssertionError, TypeError) as error:  # MMRazor's check of a distiller, and unknown arguments
            raise ValueError(f'distiller: {error}') from error
        if not built.deliveries.deliveries:  # deliveries might be overwritten
            write_in_place(in_place, network, built.teacher_recorders)
        return built

    def _partial_forward(self, calls: dict[str, int], resized: bool) -> PartialForward:
        """Returns the part of the network that the losses read. The recorders must hold a dummy input."""
        forward = PartialForward(self.network, self.distiller.teacher_recorders, calls)
        if forward.silent() or self.distiller.deliveries.deliveries:  # both may exist only in the loss
            forward.mode = 'loss'
        from mmdet.models.detectors import BaseDetector
        if resized and getattr(self.distiller, 'crosskd', None) is not None:
            raise ValueError("teacher_input_size: base 'crosskd' compares predictions position by position, so both "
                             'networks need images of one size. Leave out teacher_input_size, or use another base')
        if resized and forward.mode == 'loss' and isinstance(self.network, BaseDetector):
            raise ValueError('teacher_input_size: the recorded layers run only in the teacher\'s loss, got '
                             f'{type(self.network).__name__}, whose loss reads the boxes of the student\'s images. '
                             'Record layers outside the loss, or leave out teacher_input_size')
        self.forget_records()
        return forward

    @property
    def prefix(self) -> str:
        """Prefix of the names of losses and metrics: '' or 'NAME.'."""
        return f'{self.name}.' if self.name else ''

    @property
    def title(self) -> str:
        """Name of the teacher in the log and in errors."""
        return f'teacher {self.name!r}' if self.name else 'the teacher'

    @property
    def field(self) -> str:
        """Field of the config: 'teacher' or 'teacher.NAME'."""
        return f'teacher.{self.name}' if self.name else 'teacher'

    @property
    def shared(self) -> tuple:
        """The frozen parts, which copies of the algorithm share."""
        return self.network, self.inputs, self.forward

    @property
    def policy(self) -> DAFA | None:
        """Policy of the distiller, or None."""
        return getattr(self.distiller, 'dafa', None)

    @property
    def searches(self) -> bool:
        """Whether the distiller has a policy that is still searched."""
        return self.policy is not None and not self.policy.frozen

    @property
    def loss_names(self) -> list[str]:
        """Names of all losses, with the prefix."""
        names = getattr(self.distiller, 'loss_names', list(self.distiller.distill_losses))
        return [self.prefix + name for name in names]

    def batch(self, inputs: Tensor, data_samples: list | None) -> tuple[Tensor, list | None]:
        """Converts a batch of the student's preprocessor to the teacher's form. The samples get the teacher's image
        sizes."""
        if not self.inputs:
            return inputs, data_samples
        own = self.inputs(inputs, data_samples)
        return own, self.inputs.samples(data_samples, inputs.shape[2:], own.shape[2:])

    def record(self, inputs: Tensor, data_samples: list | None) -> None:
        """Runs the teacher as far as the distiller's recorders read. For the arguments, see :meth:`batch`."""
        self.distiller.set_deliveries_override(False)
        with torch.no_grad(), self.distiller.deliveries:
            self.forward(*self.batch(inputs, data_samples))
        self.distiller.set_deliveries_override(True)

    def losses(self, with_policy: bool = True) -> dict[str, Tensor]:
        """Returns the weighted losses of the records. ``with_policy=False`` leaves out that of a policy."""
        if with_policy or not self.searches:
            return self.distiller.compute_distill_losses()
        if self.distiller.deliveries.deliveries:
            raise ValueError('distill_deliveries belong to the first of the two batches of the train loop. Search the '
                             'policy with a plain train loop, or remove distill_deliveries')
        return self.distiller.compute_distill_losses(search=False)

    def weight_of(self, loss: str) -> float:
        """Returns the weight of a loss; 0 means that the loss is always zero."""
        if hasattr(self.distiller, 'weight_of'):
            return self.distiller.weight_of(loss)
        return getattr(self.distiller.distill_losses[loss], 'loss_weight', 1.0)

    def check_without_task(self) -> None:
        """Raises ``ValueError`` if a loss needs the student's task loss or labels."""
        if self.distiller.deliveries.deliveries or self.unlabelled.skipped:
            raise ValueError('calculate_student_loss: False leaves out the task loss and the labels, but '
                             f'{", ".join(self.unlabelled.skipped) or "distill_deliveries"} read(s) them. Set it to '
                             'True, or record layers that run in the forward')
        for field, reads in (
                ("dafa.objective 'agreement'", getattr(self.policy, 'objective', None) == 'agreement'),
                ("loss_weight 'auto'", bool(getattr(self.distiller, 'autos', None))),
                ("base 'crosskd'", getattr(self.distiller, 'crosskd', None) is not None),
                ("dam.anchor 'boxes'", any(dam.anchor == 'boxes' for dam in getattr(
                    self.distiller, 'dams', {}).values()))):
            if reads:
                raise ValueError(f"calculate_student_loss: {field} reads the task's loss or the labels, got False. Set "
                                 'it to True, or choose another')

    def forget_records(self) -> None:
        """Releases the features and the graph of the step."""
        for recorders in (self.distiller.student_recorders, self.distiller.teacher_recorders):
            for recorder in recorders.recorders.values():
                recorder.reset_data_buffer()
        if hasattr(self.distiller, 'forget'):
            self.distiller.forget()


def _stop_writing_in_place(module: nn.Module) -> None:
    """As MMRazor's ``set_module_inplace_false``: submodules of a layer with the attribute do not change."""
    if hasattr(module, 'inplace'):
        module.inplace = False
    else:
        for child in module.children():
            _stop_writing_in_place(child)
