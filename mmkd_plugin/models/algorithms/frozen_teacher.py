"""A teacher beside its student: what it is shown, how it runs, and the distiller that compares the two."""
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
    """Adds to a ``ValueError`` which of several teachers it is about."""
    try:
        yield
    except ValueError as error:
        if not name:
            raise
        raise ValueError(f'teacher {name!r}: {error}') from error


def check_fields(name: str, fields: TeacherFields, allow_random: bool) -> TeacherFields:
    """Returns the fields of a teacher, its input size as (h, w), after what can be checked before anything is built.

    Raises:
        ValueError: one of them is wrong.
    """
    with naming(name):
        teacher, size = fields.teacher, fields.teacher_input_size
        if isinstance(teacher, dict) and not (fields.teacher_ckpt or allow_random or teacher.get('pretrained')):
            raise ValueError('teacher_ckpt is missing: a teacher without weights teaches noise. Give its checkpoint, '
                             'or set allow_random_teacher=True')
        check_wiring(fields.distiller)
        check_precision(fields.teacher_precision)
        return fields if size is None else fields._replace(teacher_input_size=check_size('teacher_input_size', size))


class FrozenTeacher:
    """A network in eval mode without gradient, its inputs and precision, and the distiller that reads it.

    It is no module: the network belongs to no checkpoint, and the algorithm registers the distiller.

    Args:
        name: of the teacher; '' if it is the only one.
        fields: as :func:`check_fields` returns them.
        algorithm: whose student it teaches.
        input_size: height and width at which the losses are tried; None: at a default, and at an odd size.

    Raises:
        ValueError: a field is wrong, or does not fit the student.
    """

    def __init__(self, name: str, fields: TeacherFields, algorithm: SingleTeacherDistill, input_size: Size | None,
                 trust_checkpoint: bool) -> None:
        self.name, teacher, student = name, fields.teacher, algorithm.student
        is_config = isinstance(teacher, dict)
        # One that the teacher's library makes up by default says nothing about the images it was trained on.
        states_preprocessor = not is_config or bool(teacher.get('cfg_path') or teacher.get('data_preprocessor'))
        self.random = is_config and not (fields.teacher_ckpt or teacher.get('pretrained'))
        self.network = network = build_model('teacher', teacher, trust_checkpoint)
        if fields.teacher_ckpt:
            load_completely(network, fields.teacher_ckpt, 'teacher_ckpt', trust_checkpoint)
        channels = input_channels(student), input_channels(network)
        if channels[0] != channels[1]:
            raise ValueError(f'teacher: takes images of other channels than the student gets, got {channels[1]}, '
                             f'expected {channels[0]}. Take a teacher of such images, or load them for both with '
                             f'{channels[1]} (grey is 1, colour 3)')
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
        """Freezes the network, builds the distiller and lets it record both networks."""
        network = self.network
        network.requires_grad_(False)
        in_place = layers_in_place(network)
        for module in network.modules():
            if hasattr(module, 'inplace'):
                module.inplace = False
        try:
            check_sources(distiller.get('student_recorders'), student, 'distiller.student_recorders')
            check_sources(distiller.get('teacher_recorders'), network, 'distiller.teacher_recorders')
            with DefaultScope.overwrite_default_scope('mmrazor'):
                built = RAZOR_MODELS.build(distiller)
                built.prepare_from_student(student)
                built.prepare_from_teacher(network)
        except UnknownLayerError as error:
            raise ValueError(error.of_pair(student, network)) from error
        except AssertionError as error:  # how MMRazor answers a wrong distiller
            raise ValueError(f'distiller: {error}') from error
        if not built.deliveries.deliveries:  # what is handed on might be written over
            write_in_place(in_place, network, built.teacher_recorders)
        return built

    def _partial_forward(self, calls: dict[str, int], resized: bool) -> PartialForward:
        """Returns the part of the network that the losses read; the recorders are full of a dummy input."""
        forward = PartialForward(self.network, self.distiller.teacher_recorders, calls)
        if forward.silent() or self.distiller.deliveries.deliveries:  # both may only come about in the loss
            forward.mode = 'loss'
        from mmdet.models.detectors import BaseDetector
        if resized and forward.mode == 'loss' and isinstance(self.network, BaseDetector):
            raise ValueError('teacher_input_size: what is recorded runs in the teacher\'s loss only, got '
                             f'{type(self.network).__name__}, whose loss reads the boxes of the student\'s images. '
                             'Record layers outside the loss, or leave teacher_input_size out')
        self.forget_records()
        return forward

    @property
    def prefix(self) -> str:
        """What the names of its losses and metrics begin with: '' or 'NAME.'."""
        return f'{self.name}.' if self.name else ''

    @property
    def title(self) -> str:
        """What log and errors call it."""
        return f'teacher {self.name!r}' if self.name else 'the teacher'

    @property
    def field(self) -> str:
        """Of the config: 'teacher' or 'teacher.NAME'."""
        return f'teacher.{self.name}' if self.name else 'teacher'

    @property
    def shared(self) -> tuple:
        """What copies of the algorithm have in common: all that is frozen."""
        return self.network, self.inputs, self.forward

    @property
    def policy(self) -> DAFA | None:
        """Of the distiller, if it has one."""
        return getattr(self.distiller, 'dafa', None)

    @property
    def searches(self) -> bool:
        """Whether it has a policy whose search is not over."""
        return self.policy is not None and not self.policy.frozen

    @property
    def loss_names(self) -> list[str]:
        """The names of all its losses, with the prefix."""
        names = getattr(self.distiller, 'loss_names', list(self.distiller.distill_losses))
        return [self.prefix + name for name in names]

    def batch(self, inputs: Tensor, data_samples: list | None) -> tuple[Tensor, list | None]:
        """Returns a batch of the student's preprocessor as the teacher expects it, and its samples, which hold the
        teacher's sizes of the images."""
        if not self.inputs:
            return inputs, data_samples
        own = self.inputs(inputs, data_samples)
        return own, self.inputs.samples(data_samples, inputs.shape[2:], own.shape[2:])

    def record(self, inputs: Tensor, data_samples: list | None) -> None:
        """Runs as far as the distiller's recorders read. Args: as :meth:`batch`'s."""
        self.distiller.set_deliveries_override(False)
        with torch.no_grad(), self.distiller.deliveries:
            self.forward(*self.batch(inputs, data_samples))
        self.distiller.set_deliveries_override(True)

    def losses(self, with_policy: bool = True) -> dict[str, Tensor]:
        """Returns the weighted losses of what is recorded; without that of a policy that has a batch of its own."""
        if with_policy or not self.searches:
            return self.distiller.compute_distill_losses()
        if self.distiller.deliveries.deliveries:
            raise ValueError('distill_deliveries hand on what belongs to the first of the two batches that the train '
                             'loop gives: search the policy with a plain train loop, or take them out')
        return self.distiller.compute_distill_losses(search=False)

    def weight_of(self, loss: str) -> float:
        """Returns the weight of a loss: 0 if it cannot be other than zero."""
        if hasattr(self.distiller, 'weight_of'):
            return self.distiller.weight_of(loss)
        return getattr(self.distiller.distill_losses[loss], 'loss_weight', 1.0)

    def check_without_task(self) -> None:
        """Raises ``ValueError`` unless all of its losses do without the student's task and labels."""
        if self.distiller.deliveries.deliveries or self.unlabelled.skipped:
            raise ValueError('calculate_student_loss: without its task the student runs no loss and sees no labels, '
                             f'but {", ".join(self.unlabelled.skipped) or "distill_deliveries"} read(s) them. Set it '
                             'to True, or record layers that run in the forward')
        for field, reads in (
                ("dafa.objective 'agreement'", getattr(self.policy, 'objective', None) == 'agreement'),
                ("loss_weight 'auto'", bool(getattr(self.distiller, 'autos', None))),
                ("base 'crosskd'", getattr(self.distiller, 'crosskd', None) is not None)):
            if reads:
                raise ValueError(f"calculate_student_loss: {field} reads the task's loss, got False. Set it to True, "
                                 'or choose another')

    def forget_records(self) -> None:
        """Lets go of the step's features and graph."""
        for recorders in (self.distiller.student_recorders, self.distiller.teacher_recorders):
            for recorder in recorders.recorders.values():
                recorder.reset_data_buffer()
        if hasattr(self.distiller, 'forget'):
            self.distiller.forget()
