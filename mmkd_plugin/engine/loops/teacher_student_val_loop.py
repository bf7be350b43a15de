"""Validation loop that also reports the teacher's metrics."""
from mmengine.runner import ValLoop

from ...models.algorithms import TeacherStudentDistill
from ...models.recording import undisturbed
from ...registry import LOOPS
from ...utils import unwrapped
from ..hooks.check_teacher_hook import check_classes, evaluate_teacher


@LOOPS.register_module()
class TeacherStudentValLoop(ValLoop):
    """Validates the student as MMEngine does, and adds the metrics of the teacher as ``teacher.*``.

    The metrics of several teachers are ``teacher.NAME.*``.

    The teacher gets its images as in the distillation: from the student's preprocessor, in the form that the teacher
    expects. The teacher is frozen, so it is evaluated once, in the first validation. MMRazor's
    ``SingleTeacherDistillValLoop`` gives the teacher the student's preprocessor for the rest of the training. This is
    wrong for a teacher with another normalisation.

    Usage::

        val_cfg = dict(type='mmkd_plugin.TeacherStudentValLoop')

    The arguments are those of ``ValLoop``.

    Raises:
        ValueError: the model has no teacher, or a teacher has other classes than the student.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        model = self.runner.model
        self.algorithm = unwrapped(model)
        if not isinstance(self.algorithm, TeacherStudentDistill):
            raise ValueError(f'val_cfg.type: {type(self).__name__} evaluates a teacher, got a '
                             f'{type(self.algorithm).__name__}, expected a TeacherStudentDistill. Remove type')
        check_classes(f'val_cfg.type: {type(self).__name__}', self.algorithm)
        self.teacher_metrics: dict[str, float] | None = None

    def run(self) -> dict:
        """Launches the validation."""
        if self.teacher_metrics is None:
            self.teacher_metrics = {}
            for name, teacher in self.algorithm.teachers.items():
                with undisturbed(self.algorithm):
                    metrics = evaluate_teacher(self.algorithm, self, name)
                self.teacher_metrics.update({f'{teacher.field}.{metric}': value for metric, value in metrics.items()})
        evaluate = self.evaluator.evaluate

        def evaluate_both(size: int) -> dict:
            metrics = evaluate(size)  # empty if there are no detections; the teacher's would pass for the student's
            return {**metrics, **self.teacher_metrics} if metrics else metrics
        self.evaluator.evaluate = evaluate_both
        try:
            return super().run()
        finally:
            del self.evaluator.evaluate
