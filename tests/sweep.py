"""Runs a config's real models through the real Runner for one training and one test iteration, and looks closely."""
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmkd_plugin.checkpoints.initialize import forget_weights_files

ROOT = Path(__file__).parent.parent


def find(*data: str) -> list[Path]:
    """Returns the distillation configs of data sets such as ``'coco'``."""
    return sorted(path for folder in data for path in (ROOT / 'configs').glob(f'*/{folder}/*.py'))


DETECTORS = find('coco')
CLASSIFIERS = find('imagenet', 'cifar')
ALONE = sorted((ROOT / 'configs/cifar').glob('*.py'))


def check(config: str | Path, options: dict, work_dir: Path) -> Runner:
    """Trains and tests for one iteration each; asserts what every distillation must do.

    - Each distillation loss is finite, not zero, and has a gradient in the layers of the student that are
      recorded; ``loss_aug`` has it in the policy only, ``loss_align_*`` in the adapters only.
    - Each trainable parameter, the distiller's too, gets a gradient and is in an optimiser once. What a forward does
      not use would stop DistributedDataParallel, unless the config says ``find_unused_parameters = True``.
    - Each test image gets finite predictions.

    Args:
        config: a file of ``configs/``.
        options: as ``--cfg-options``, where the miniature data is; overrides the sweep's own.
        work_dir: for logs.
    """
    runner = Runner.from_cfg(load(config, options, work_dir))
    forget_weights_files(runner.model.teacher)  # nothing is downloaded
    probe = _Probe()
    runner.register_hook(probe, priority='LOWEST')
    hook = runner.model.register_forward_hook(probe.look_at_losses, with_kwargs=True)
    runner.train()
    hook.remove()  # an EMA copy of the model would copy it
    assert probe.losses, 'no training iteration'
    _check_optimizer(runner)
    unused = sorted(set(_trainable(runner.model)) - probe.reached)
    assert not unused or runner.cfg.get('find_unused_parameters'), f'no gradient: {unused}'
    assert not [name for name in unused if name.startswith('distiller.')], unused
    runner.test()
    assert probe.predictions
    for sample in probe.predictions:
        _check_prediction(sample)
    return runner


def load(config: str | Path, options: dict, work_dir: Path) -> Config:
    """Returns the config with one small batch an epoch, nothing downloaded and nothing left behind but logs."""
    cfg = Config.fromfile(config)
    _forget_pretrained(cfg.model)
    cfg.model.update(teacher_ckpt=None, student_ckpt=None, allow_random_teacher=True)
    cfg.update(work_dir=str(work_dir), log_level='WARNING', randomness=dict(seed=0),
               val_cfg=None, val_dataloader=None, val_evaluator=None,
               default_hooks=dict(cfg.get('default_hooks', {}), checkpoint=None))
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False, pin_memory=False, num_batch_per_epoch=1)
        _shrink(loader.dataset.get('pipeline', []))  # that of a wrapped data set stays as it is
    cfg.train_dataloader.batch_size, cfg.test_dataloader.batch_size = 2, 1
    _keep_few_unsure_boxes(cfg.model.architecture.get('test_cfg') or {})
    cfg.merge_from_dict({key: value for key, value in options.items() if not key.startswith('val_')})
    return Config(cfg.to_dict(), filename=cfg.filename, format_python_code=False)  # formatting takes seconds


def _forget_pretrained(node: dict | Sequence) -> None:
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        if isinstance(value, dict) and str(value.get('type')).endswith('Pretrained'):
            node[key] = None
        elif isinstance(value, (dict, list)):
            _forget_pretrained(value)


def _shrink(steps: Sequence[dict]) -> None:
    """Makes large images, such as COCO's of 1333 x 800, a quarter as long and wide."""
    for step in steps:
        for key in ('scale', 'img_scale', 'crop_size', 'size'):
            if isinstance(step.get(key), tuple) and min(step[key]) >= 640:
                step[key] = tuple(side // 4 for side in step[key])


def _keep_few_unsure_boxes(test_cfg: dict) -> None:
    """Lets an untrained detector, which is sure of no box, put out a few all the same."""
    for key, value in test_cfg.items():
        if key == 'score_thr':
            test_cfg[key] = 0.0
        elif key in ('nms_pre', 'max_per_img'):
            test_cfg[key] = 20
        elif isinstance(value, dict):
            _keep_few_unsure_boxes(value)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class _Probe(Hook):
    """Looks at the one training iteration from within, so that it costs no second forward."""

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}
        self.reached: set[str] = set()  # parameters with a gradient in the one backward
        self.predictions: list = []

    def before_train(self, runner: Runner) -> None:
        runner.model._schedules = {}  # a loss that warms up would be zero at the beginning
        _normalise_by_batch(runner.model.teacher)
        for policy in [teacher.policy for teacher in runner.model.teachers.values() if teacher.policy is not None]:
            policy.beta.data.fill_(9.)  # what is drawn is applied: otherwise the policy's first loss has no gradient
        for name, parameter in _trainable(runner.model).items():
            parameter.register_hook(lambda _, name=name: self.reached.add(name))

    def look_at_losses(self, model: nn.Module, args: tuple, kwargs: dict, output: dict) -> None:
        if kwargs.get('mode') != 'loss':
            return
        assert not self.losses, 'more than one training iteration'
        self.losses = {name: sum(value) if isinstance(value, list) else value for name, value in output.items()}
        for name, loss in self.losses.items():
            if 'loss' in name:
                assert loss.isfinite().all(), f'{name} is {loss}'
        for teacher in model.teachers.values():
            prefix = f'distill.{teacher.prefix}'
            distilled = {name.removeprefix(prefix): loss for name, loss in self.losses.items()
                         if name.startswith(f'{prefix}loss')}
            assert distilled, f'no distillation loss {prefix} among {sorted(self.losses)}'
            for name, loss in distilled.items():
                assert loss.numel() == 1 and loss != 0 and loss.requires_grad, f'{prefix}{name} is {loss!r}'
                _check_reach(name, loss, model.student, teacher.distiller)
        self.reached.clear()  # of the single losses; the backward is still to come

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                         outputs: dict | None = None) -> None:
        runner.train_loop.stop_training = True

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None,
                        outputs: Sequence | None = None) -> None:
        self.predictions += outputs


def _normalise_by_batch(teacher: nn.Module) -> None:
    """Has batch norms take the statistics of the batch, as random weights have none: deep maps would be nearly zero."""
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = None


def _check_reach(name: str, loss: Tensor, network: nn.Module, distiller: nn.Module) -> None:
    student, adapters = _recorded_parameters(network, distiller), list(_adapters(distiller))
    meant, others = student, []
    if name == 'loss_aug':
        meant, others = list(distiller.dafa.parameters()), student + adapters
    elif name.startswith('loss_align'):
        meant, others = adapters, student
    gradients = torch.autograd.grad(loss, meant + others, retain_graph=True, allow_unused=True)
    reached = _largest(gradients[:len(meant)])
    assert 0 < reached < float('inf'), f'{name} = {float(loss):g} has the gradient {reached}'
    assert _largest(gradients[len(meant):]) == 0, f'{name} reaches more than it should'


def _adapters(distiller: nn.Module) -> Iterable[Tensor]:
    for part in (distiller.connectors, getattr(distiller, 'aligners', nn.Module())):
        yield from part.parameters()


def _recorded_parameters(student: nn.Module, distiller: nn.Module) -> list[Tensor]:
    """Returns those of the student's recorded layers, so that no loss goes back through all of the student; all
    where layers without parameters or functions are recorded."""
    modules = dict(student.named_modules())
    recorders = distiller.student_recorders.recorders.values()
    inside = [[p for p in modules[recorder.source].parameters() if p.requires_grad] if recorder.source in modules
              else [] for recorder in recorders]
    found = inside if inside and all(inside) else [list(_trainable(student).values())]
    return list({id(parameter): parameter for parameters in found for parameter in parameters}.values())


def _largest(gradients: Iterable[Tensor | None]) -> float:
    return max((float(gradient.abs().max()) for gradient in gradients if gradient is not None), default=0.0)


def _check_optimizer(runner: Runner) -> None:
    wrappers = getattr(runner.optim_wrapper, 'optim_wrappers', dict(student=runner.optim_wrapper))
    optimised = [id(parameter) for wrapper in wrappers.values() for group in wrapper.optimizer.param_groups
                 for parameter in group['params']]
    assert len(optimised) == len(set(optimised)), 'a parameter has two optimisers'
    missing = [name for name, parameter in _trainable(runner.model).items() if id(parameter) not in optimised]
    assert not missing, f'in no optimiser: {missing}'


def _check_prediction(sample) -> None:
    if 'pred_instances' in sample:
        instances = sample.pred_instances
        assert len(instances) and instances.scores.isfinite().all() and instances.bboxes.isfinite().all(), sample
    else:
        assert sample.pred_score.isfinite().all() and 0 < sample.pred_score.max() <= 1, sample
