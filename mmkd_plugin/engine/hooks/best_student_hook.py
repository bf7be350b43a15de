"""Hook that keeps the best student of a run as a plain checkpoint."""
from math import isfinite
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import MMFullyShardedDataParallel
from mmengine.runner import Runner
from mmengine.runner.checkpoint import save_checkpoint, weights_to_cpu
from mmrazor.models.algorithms.base import BaseAlgorithm

from ...checkpoints.reading import read_checkpoint
from ...deploy.student import plain_config
from ...registry import HOOKS
from ...utils import unwrapped
from . import safe_checkpoint_hook  # noqa: F401  registers the storage


@HOOKS.register_module()
class BestStudentHook(Hook):
    """Keeps the best student in ``student_best.pth`` in the work dir, for plain MMDetection or MMPretrain.

    The hook writes the file after each validation that is better than all before, as :func:`export_student` would. The
    comparison is that of MMEngine's ``CheckpointHook(save_best=...)``. The weights are exactly those that were
    validated: with ``EMAHook``, the averaged ones. The file is replaced in one step. Its ``meta['best']`` has the
    metric and the score. A resumed run in the same work dir starts with the score in this file, a new run with none.
    In distributed training, the first process writes.

    If the hook cannot infer whether a larger metric is better, it logs a warning and keeps no file.

    Args:
        save_best: name of the metric; 'auto' is the first that ends in mAP, top1 or accuracy, else the first number.
        rule: 'greater' or 'less'; None infers it from the name, as ``CheckpointHook`` does.

    Raises:
        ValueError: there is no validation, the model is sharded by FSDP, or the first validation lacks the metric.
    """

    priority = 'HIGHEST'  # in after_val_epoch, EMAHook removes the averaged weights from the model

    def __init__(self, save_best: str = 'auto', rule: str | None = None) -> None:
        if rule not in ('greater', 'less', None):
            raise ValueError(f"BestStudentHook.rule must be 'greater', 'less' or None, got {rule!r}")
        if not isinstance(save_best, str):
            raise ValueError(f'BestStudentHook.save_best must be the name of one metric, got {save_best!r}')
        self.save_best, self.rule = save_best, rule
        self.best: dict | None = None  # metric, score, epoch, iter
        self._training = False

    def before_train(self, runner: Runner) -> None:
        if runner.val_loop is None:
            raise ValueError('BestStudentHook: val_dataloader is None, but the hook needs a validation. Set '
                             'val_dataloader, or remove the hook')
        if isinstance(runner.model, MMFullyShardedDataParallel):
            raise ValueError('BestStudentHook: with FSDP, no process has all weights of the student. Remove the hook')
        self._training = True
        self.path = Path(runner.work_dir, 'student_best.pth')
        self._text = None
        if is_main_process() and 'model' in runner.cfg:
            plain = plain_config(runner.cfg).to_dict()
            self._text = Config(plain, format_python_code=False).pretty_text  # formatting takes seconds
        if runner._resume and self.path.exists():
            self.best = read_checkpoint(str(self.path), 'student_best.pth').get('meta', {}).get('best')

    def after_train(self, runner: Runner) -> None:
        self._training = False

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if not (self._training and metrics):
            return
        metric = _main_metric(metrics) if self.save_best == 'auto' else self.save_best
        if metric is None:
            return
        if metric not in metrics:
            raise ValueError(f'BestStudentHook.save_best: the evaluator does not return {metric!r}, expected one of '
                             f'{", ".join(metrics)}')
        if not isinstance(metrics[metric], (int, float)):
            raise ValueError(f'BestStudentHook.save_best: {metric!r} must be a number, got a '
                             f'{type(metrics[metric]).__name__}')
        score = float(metrics[metric])
        if self.best is not None and self.best['metric'] != metric:
            runner.logger.warning(f'BestStudentHook: {self.path} has the student with the best {self.best["metric"]}. '
                                  f'The student with the best {metric} replaces it')
            self.best = None
        rule = self._rule_of(metric, runner)
        best = self.best['score'] if self.best else CheckpointHook.init_value_map.get(rule)
        if rule is None or not CheckpointHook.rule_map[rule](score, best):
            return
        self.best = dict(metric=metric, score=score, epoch=runner.epoch, iter=runner.iter)
        if is_main_process():  # all processes compare, so that all stop if the metric is wrong
            self._write(runner)
        runner.logger.info(f'{self.path}: the best student so far, {metric} {score:.4f}')

    def _rule_of(self, metric: str, runner: Runner) -> str | None:
        try:
            return CheckpointHook(save_best=metric, rule=self.rule).rules[0]
        except ValueError:
            runner.logger.warning(f'BestStudentHook: cannot infer from the name {metric!r} whether larger is better. '
                                  f"{self.path.name} is not written. Set rule='greater' or rule='less'")
            return None

    def _write(self, runner: Runner) -> None:
        model = unwrapped(runner.model)
        student = model.architecture if isinstance(model, BaseAlgorithm) else model
        meta = dict(best=self.best, epoch=runner.epoch, iter=runner.iter, experiment_name=runner.experiment_name)
        if self._text is not None:
            meta['cfg'] = self._text
        if hasattr(runner.train_dataloader.dataset, 'metainfo'):
            meta['dataset_meta'] = runner.train_dataloader.dataset.metainfo
        save_checkpoint(dict(meta=meta, state_dict=weights_to_cpu(student.state_dict())), str(self.path),
                        backend_args=dict(backend='mmkd_plugin.atomic'))


def _main_metric(metrics: dict) -> str | None:
    """Returns the main metric. The others may be of single classes, or not numbers."""
    numbers = [name for name, value in metrics.items() if isinstance(value, (int, float)) and isfinite(value)]
    return next((name for name in numbers if name.endswith(('mAP', 'top1', 'accuracy'))), next(iter(numbers), None))
