"""Hook that checks that the teacher reaches its known metrics and is better than the student."""
from math import isfinite

from mmengine.hooks import Hook
from mmengine.runner import Runner, autocast
from mmengine.runner.loops import ValLoop

from ...config.metafile import metafile_metrics
from ...config.teachers import teachers_in
from ...models.algorithms import TeacherStudentDistill
from ...models.algorithms.inherit import num_classes
from ...models.recording import undisturbed
from ...registry import HOOKS
from ...utils import check_number, unwrapped

_SLACK = 0.05  # relative shortfall against the known metric that causes a warning


@HOOKS.register_module()
class CheckTeacherHook(Hook):
    """Evaluates the teacher on the validation set before the first step, and warns when the student has caught up.

    The teacher gets its images as in the distillation: from the student's preprocessor, in the form that the teacher
    expects. Therefore the check detects a wrong checkpoint, normalisation or channel order. The log has the metrics
    next to the known ones. ``tools/train.py --check-teacher`` adds this hook. The hook does not change the training.

    Args:
        expected: known metrics by the evaluator's name, such as ``{'coco/bbox_mAP': 0.365}``, or with several teachers
            ``{'NAME.coco/bbox_mAP': 0.365}``. If the teacher is a config of MMDetection or MMPretrain by ``cfg_path``,
            the default is the metrics in its metafile.

    Raises:
        ValueError: ``expected`` is not a dict of numbers; at the start of training: there is no teacher or no
            validation set, or the teacher has another number of classes.
    """

    def __init__(self, expected: dict[str, float] | None = None) -> None:
        if not isinstance(expected or {}, dict):
            raise ValueError(f'CheckTeacherHook.expected must be a dict of metrics by name, got {expected!r}')
        self.expected = {name: check_number(f'CheckTeacherHook.expected[{name!r}]', value)
                         for name, value in (expected or {}).items()}
        self.teachers: dict[str, dict[str, float]] = {}  # metrics by name
        self.best: float | None = None
        self.told: set[str] = set()

    def before_train(self, runner: Runner) -> None:
        model = unwrapped(runner.model)
        if not isinstance(model, TeacherStudentDistill):
            raise ValueError(f'CheckTeacherHook: a {type(model).__name__} has no teacher')
        if runner._val_loop is None:
            raise ValueError('CheckTeacherHook: needs a validation set to evaluate the teacher, but the config has no '
                             'val_dataloader, val_evaluator and val_cfg')
        check_classes('CheckTeacherHook', model)
        configs = {name.removeprefix('.'): config for name, config, _ in teachers_in(runner.cfg.get('model', {}))}
        for name, teacher in model.teachers.items():
            with undisturbed(model):
                metrics = evaluate_teacher(model, runner.val_loop, name)
            self.teachers[name] = {metric: float(value) for metric, value in metrics.items()
                                   if isinstance(value, (int, float))}
            known, source = {metric.removeprefix(teacher.prefix): value for metric, value in self.expected.items()
                             if metric.startswith(teacher.prefix)}, 'expected'
            if not known and isinstance(configs.get(name), dict):
                known, source = metafile_metrics(str(configs[name].get('cfg_path'))), 'in its metafile'
            self._compare_with_known(runner, _title(name), self.teachers[name], known, source)

    def _compare_with_known(self, runner: Runner, title: str, found: dict[str, float], known: dict[str, float],
                            source: str) -> None:
        if not found:
            runner.logger.warning(f'{title} finds nothing in the validation set.')
        for name, value in found.items():
            beside = f', {source}: {known[name]:.4g}' if name in known else ''
            runner.logger.info(f'{title} on the validation set: {name}: {value:.4g}{beside}')
            if name in known and not value >= known[name] * (1 - _SLACK):
                runner.logger.warning(
                    f'{title} reaches {name} {value:.4g}, not the {known[name]:.4g} {source}. Check that the '
                    'checkpoint is right, that its classes are in the order of the data, that normalisation, channel '
                    'order and image size are those of the teacher, and that the known metric is of this data.')

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Compares the first metric that student and teachers share; MMEngine's ``save_best='auto'`` takes it too."""
        name = next((name for name in metrics or {} if 'loss' not in name
                     and any(name in found for found in self.teachers.values())), None)
        if name is None or not isfinite(metrics[name]):
            return
        self.best = metrics[name] if self.best is None else max(self.best, metrics[name])
        for teacher, found in self.teachers.items():
            if teacher not in self.told and name in found and self.best >= found[name]:
                self.told.add(teacher)
                runner.logger.warning(
                    f'{_title(teacher)}, {name} {found[name]:.4g}, is no better than the student\'s best, '
                    f'{self.best:.4g}. Use a better teacher, or end the distillation with mmrazor.StopDistillHook.')


def _title(name: str) -> str:
    return f'Teacher {name!r}' if name else 'The teacher'


def check_classes(field: str, model: TeacherStudentDistill) -> None:
    """Raises ``ValueError`` if a teacher cannot be evaluated on the student's data, because its classes differ."""
    for teacher in model.teachers.values():
        classes = num_classes(model.student), num_classes(teacher.network)
        if classes[0] != classes[1]:
            raise ValueError(f'{field}: the validation set has the student\'s {classes[0]} classes, and '
                             f'{teacher.title} has {classes[1]}')


def evaluate_teacher(model: TeacherStudentDistill, loop: ValLoop, name: str = '') -> dict[str, float]:
    """Returns the metrics of a teacher on the data of ``loop``, with images prepared as in the distillation.

    The caller must set eval mode and restore random states.
    """
    teacher = model.teachers[name]
    for batch in loop.dataloader:
        with autocast(enabled=getattr(loop, 'fp16', False)):
            data = model.data_preprocessor(batch, False)
            outputs = teacher.network(*teacher.batch(data['inputs'], data['data_samples']), mode='predict')
        loop.evaluator.process(data_samples=outputs, data_batch=batch)
    return loop.evaluator.evaluate(len(loop.dataloader.dataset))
