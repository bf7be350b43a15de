"""Evaluation of a model on the test set of a config, and its headline metric."""
import copy
from tempfile import TemporaryDirectory

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn

from ..checkpoints.guard import data_only
from ..config.preflight import missing_inputs

# factor to points of 100, by the end of the metric's name
_POINTS = {'bbox_mAP': 100., 'bbox_AP': 100., 'multi-label/mAP': 1., 'mAP': 100., 'PQ': 1., 'accuracy/top1': 1.,
           'top1': 1., 'f1-score': 1.}


def evaluate(plain: Config, model: nn.Module, option: str = '--evaluate',
             trust_checkpoint: bool = False) -> dict[str, float]:
    """Evaluates a model on the test set of a plain config.

    Args:
        plain: the config.
        model: a model of MMDetection or MMPretrain, or :class:`OnnxModel`.
        option: the option that error messages name.
        trust_checkpoint: whether weights files in the config may run code.

    Raises:
        ValueError: data are missing.
    """
    missing = missing_inputs(plain, training=False)
    if missing:
        raise ValueError(f'{option}: ' + '\n'.join(missing))
    with TemporaryDirectory() as work_dir:
        cfg = copy.deepcopy(plain)
        # A visualizer with the config's name would be that of the previous run, whose folder is deleted.
        cfg.update(work_dir=work_dir, load_from=None, resume=False, launcher='none', custom_hooks=[], visualizer=None,
                   experiment_name=f'evaluation_{id(model)}')
        init_default_scope(cfg.get('default_scope') or 'mmengine')
        # TensorFloat-32 would change the result, which is compared with that of an ONNX file.
        with data_only(trust_checkpoint), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            runner = Runner.from_cfg(cfg)
            runner.model = model.to(get_device())
            metrics = runner.test()
        model.cpu()
    return {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}


def headline(metrics: dict[str, float]) -> tuple[str, float]:
    """Returns the name of the metric to compare models by, and its value in points of 100.

    Raises:
        ValueError: none of the metrics is known.
    """
    for end, points in _POINTS.items():
        for name, value in metrics.items():
            if name.endswith(end):
                return name, points * value
    raise ValueError(f'test_evaluator: got the metrics {", ".join(metrics) or "(none)"}, expected one that ends with '
                     f'{", ".join(_POINTS)}')
