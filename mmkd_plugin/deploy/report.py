"""What a student costs and what it can do, beside its teacher."""
import io
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from ..checkpoints.guard import data_only
from ..checkpoints.reading import load_completely
from ..config.cfg_path import build_cfg_path
from ..config.metafile import metafile_metrics
from ..config.preflight import missing_inputs
from .cost import measure
from .sample_batch import sample_batch
from .student import build_student, image_channels, plain_config

COLUMNS = ['', 'parameters', 'FLOPs', 'latency (ms)', 'file (bytes)', 'accuracy']


def report_student(cfg: Config, exported: str, evaluate: bool = False, trust_checkpoint: bool = False) -> dict:
    """Returns ``student`` and ``teacher``, a dict each, and ``input``, the shape of the image that they were timed on.

    Each has ``params``, ``flops``, ``latency_ms`` (see :func:`measure`), ``file_bytes`` (of weights alone), and
    ``accuracy``, by metric. The student's is there if it is evaluated. The teacher's then is too, where its weights
    are a file that is here; else it is what its library's metafile says, ``accuracy_from`` tells. The teacher is None
    where the config has none, and ``dict(missing=...)`` where its config is not here.

    Args:
        cfg: of the distillation, or of the plain model.
        exported: file of the student.
        evaluate: whether to run the config's test.
        trust_checkpoint: whether the teacher's file may run code.

    Raises:
        ValueError: the file does not fit; with ``evaluate``, test data are missing.
    """
    plain = plain_config(cfg)
    student = build_student(cfg, exported, trust_checkpoint).eval()
    batch, _ = sample_batch(plain, image_channels(student))
    one = {key: values[:1] for key, values in batch.items()}
    models, absent = dict(student=student), None
    if 'teacher' in cfg.model:
        try:
            models['teacher'] = _build_teacher(cfg, trust_checkpoint).eval()
        except ValueError as error:
            absent = dict(missing=str(error))
    with torch.no_grad():
        inputs = {name: model.data_preprocessor(dict(one), False) for name, model in models.items()}
    costs = measure({name: (model, inputs[name]) for name, model in models.items()})
    report = dict(student=dict(costs['student'], file_bytes=Path(exported).stat().st_size, accuracy=None),
                  teacher=absent, input=list(inputs['student']['inputs'].shape))
    if evaluate:
        report['student']['accuracy'] = _evaluate(plain, student, trust_checkpoint)
    if 'teacher' in models:
        report['teacher'] = dict(costs['teacher'], file_bytes=_file_bytes(models['teacher']),
                                 **_teacher_accuracy(cfg, models['teacher'], evaluate, trust_checkpoint))
    return report


def rows(report: dict) -> list[list[str]]:
    """Returns the report as rows of :data:`COLUMNS`."""
    return [[name, f'{found["params"]:,}', f'{found["flops"]:,}', f'{found["latency_ms"]:.1f}',
             f'{found["file_bytes"]:,}', _accuracy_text(found)]
            for name in ('student', 'teacher') if (found := report[name]) and 'params' in found]


def _accuracy_text(found: dict) -> str:
    if not found['accuracy']:
        return 'not evaluated'
    text = ', '.join(f'{name} {value:g}' for name, value in list(found['accuracy'].items())[:2])
    return text + (' (metafile)' if found.get('accuracy_from') == 'metafile' else '')


def _build_teacher(cfg: Config, trust_checkpoint: bool) -> BaseModel:
    teacher = cfg.model.teacher
    if teacher.get('cfg_path'):
        return build_cfg_path(teacher.cfg_path, 'teacher', trust_checkpoint=trust_checkpoint)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    with data_only(trust_checkpoint):
        return MODELS.build(teacher)


def _file_bytes(model: BaseModel) -> int:
    file = io.BytesIO()
    torch.save(dict(meta={}, state_dict=model.state_dict()), file)
    return file.tell()


def _teacher_accuracy(cfg: Config, teacher: BaseModel, evaluate: bool, trust_checkpoint: bool) -> dict:
    weights = cfg.model.get('teacher_ckpt') or ''
    if evaluate and Path(weights).is_file():
        load_completely(teacher, weights, 'teacher_ckpt', trust_checkpoint)
        return dict(accuracy=_evaluate(plain_config(cfg), teacher, trust_checkpoint),
                    accuracy_from='evaluated')
    found = metafile_metrics(str(cfg.model.teacher.get('cfg_path')))
    return dict(accuracy=found or None, accuracy_from='metafile' if found else None)


def _evaluate(plain: Config, model: BaseModel, trust_checkpoint: bool) -> dict[str, float]:
    """Runs the test of a plain config with this model."""
    missing = missing_inputs(plain, training=False)
    if missing:
        raise ValueError('--evaluate: ' + '\n'.join(missing))
    with TemporaryDirectory() as work_dir:
        cfg = plain.copy()
        # A visualizer of the config's name would be that of the run before, whose folder is gone.
        cfg.update(work_dir=work_dir, load_from=None, resume=False, launcher='none', custom_hooks=[], visualizer=None,
                   experiment_name=f'evaluation_{id(model)}')
        with data_only(trust_checkpoint):
            runner = Runner.from_cfg(cfg)
            runner.model = model.to(get_device())
            metrics = runner.test()
        return {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
