"""The test of a config with any model, and the one figure that a model is judged by."""
import copy
from tempfile import TemporaryDirectory

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn

from ..checkpoints.guard import data_only
from ..config.preflight import missing_inputs

# by the end of a metric's name: in how many points of 100 it is counted
_POINTS = {'bbox_mAP': 100., 'mAP': 100., 'PQ': 1., 'accuracy/top1': 1., 'top1': 1., 'f1-score': 1.}


def evaluate(plain: Config, model: nn.Module, option: str = '--evaluate',
             trust_checkpoint: bool = False) -> dict[str, float]:
    """Runs the test of a plain config with this model.

    Args:
        plain: the config.
        model: one of MMDetection or MMPretrain, or :class:`OnnxModel`.
        option: what the message names.
        trust_checkpoint: whether files that the config names may run code.

    Raises:
        ValueError: data are missing.
    """
    missing = missing_inputs(plain, training=False)
    if missing:
        raise ValueError(f'{option}: ' + '\n'.join(missing))
    with TemporaryDirectory() as work_dir:
        cfg = copy.deepcopy(plain)
        # A visualizer of the config's name would be that of the run before, whose folder is gone.
        cfg.update(work_dir=work_dir, load_from=None, resume=False, launcher='none', custom_hooks=[], visualizer=None,
                   experiment_name=f'evaluation_{id(model)}')
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        with data_only(trust_checkpoint):
            runner = Runner.from_cfg(cfg)
            runner.model = model.to(get_device())
            metrics = runner.test()
        model.cpu()
    return {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}


def headline(metrics: dict[str, float]) -> tuple[str, float]:
    """Returns the metric that a model is judged by, and its value in points of 100.

    Raises:
        ValueError: none of the metrics is known.
    """
    for end, points in _POINTS.items():
        for name, value in metrics.items():
            if name.endswith(end):
                return name, points * value
    raise ValueError(f'test_evaluator: none of its metrics, {", ".join(metrics) or "of which there are none"}, can be '
                     f'compared, expected one that ends with {", ".join(_POINTS)}')
