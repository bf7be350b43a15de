"""Accuracy and cost of a student, its teacher, and its exports."""
import io
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import nn

from ..checkpoints.reading import load_completely
from ..config.metafile import metafile_metrics
from ..config.teachers import teachers_in
from ..utils import in_words
from .cost import latency, size
from .evaluation import evaluate
from .onnx_model import OnnxModel
from .student import build_student, plain_config
from .teacher import build_teacher

COLUMNS = ['', 'parameters', 'FLOPs', 'latency (ms)', '95th percentile (ms)', 'file (bytes)', 'accuracy']
LABELS = dict(teacher='teacher', baseline='student alone', student='student', onnx='ONNX', int8='ONNX, 8 bits')


class Report:
    """Measures teacher, student alone, student, ONNX and 8 bits in the same way.

    Args:
        cfg: config of the distillation, or of the plain model.
        exported: checkpoint of the exported student.
        batch: a batch of a data loader with at least one image, for timing.
        baseline: checkpoint of the same student, trained alone.
        trust_checkpoint: whether the files may run code.

    Attributes:
        models: by name, models with a ``test_step``.
        found: by name, the results. ``latency_ms`` is from pixels to detections or scores, with post-processing;
            ``file_bytes`` is the size of the weights alone; ``accuracy`` is by metric. Several teachers are
            ``teacher.NAME``. The teacher is None if the config has none, and ``dict(missing=...)`` if its config is
            missing, it has other classes than the student, or it does not run on the student's images. Its accuracy is
            evaluated or taken from its library's metafile; ``accuracy_from`` tells which.
    """

    def __init__(self, cfg: Config, exported: str, batch: dict, baseline: str | None = None,
                 trust_checkpoint: bool = False) -> None:
        self.cfg, self.trust = cfg, trust_checkpoint
        self.plain = plain_config(cfg)
        self.one = {key: values[:1] for key, values in batch.items()}
        self.models: dict[str, nn.Module] = {}
        student = build_student(cfg, exported, trust_checkpoint).eval()
        teachers = {f'teacher{name}': (teacher, weights) for name, teacher, weights in teachers_in(cfg.model)}
        self.found: dict[str, dict | None] = {} if teachers else dict(teacher=None)
        self.without_weights: set[str] = set()  # teachers
        for name, (teacher, weights) in teachers.items():
            try:
                self._add_teacher(name, teacher, weights or '', student)
            except Exception as error:  # the export of the student does not need it
                self.models.pop(name, None)
                self.without_weights.discard(name)
                self.found[name] = dict(missing=str(error) if isinstance(error, ValueError) else in_words(error))
        if baseline:
            self._add('baseline', build_student(cfg, baseline, trust_checkpoint).eval())
        self._add('student', student, exported)
        self.input = list(self.models['student'].data_preprocessor(dict(self.one), False)['inputs'].shape)

    def add_onnx(self, name: str, path: str, result: dict) -> None:
        """Adds a graph; ``result`` is the result of its export."""
        self.models[name] = OnnxModel(path, threads=torch.get_num_threads())
        self.found[name] = dict(params=self.found['student']['params'], flops=self.found['student']['flops'],
                                file=path, file_bytes=Path(path).stat().st_size, accuracy=result.get('accuracy'),
                                **{key: value for key, value in result.items() if key != 'accuracy'})

    def evaluate(self, name: str) -> dict[str, float]:
        """Evaluates a model on the test set of the config; returns its metrics."""
        found = self.found[name]
        if found.get('accuracy_from', 'evaluated') != 'evaluated' or not found['accuracy']:
            accuracy = evaluate(self.plain, self.models[name], trust_checkpoint=self.trust)
            found.update(accuracy=accuracy, accuracy_from='evaluated')
        return found['accuracy']

    def evaluate_all(self) -> None:
        """Evaluates all models. A teacher without weights gets the accuracy in its library's metafile, if any."""
        for name in self.models:
            if name not in self.without_weights:
                self.evaluate(name)

    def time(self) -> None:
        """Times all models on one image."""
        times = latency({name: lambda model=model: model.test_step(self.one) for name, model in self.models.items()})
        for name, values in times.items():
            self.found[name].update(values)

    def rows(self) -> list[list[str]]:
        """Returns the report as rows of :data:`COLUMNS`."""
        shown = sorted(((name, found) for name, found in self.found.items() if 'params' in (found or {})), key=_place)
        return [[LABELS.get(name) or name.replace('.', ' '), f'{found["params"]:,}', f'{found["flops"]:,}',
                 f'{found["latency_ms"]:.1f}', f'{found["latency_p95_ms"]:.1f}', f'{found["file_bytes"]:,}',
                 _accuracy_text(found)] for name, found in shown]

    def _add(self, name: str, model: BaseModel, file: str | None = None) -> None:
        with torch.no_grad():
            costs = size(model, model.data_preprocessor(dict(self.one), False))
        self.models[name] = model
        self.found[name] = dict(costs, accuracy=None, file_bytes=(
            Path(file).stat().st_size if file else _file_bytes(model)))

    def _add_teacher(self, name: str, config: dict, weights: str, student: BaseModel) -> None:
        size = self.cfg.model.get('teacher_input_size')
        size = size.get(name.removeprefix('teacher.')) if isinstance(size, dict) else size
        teacher = build_teacher(self.cfg, name, config, student, self.trust, size)
        if Path(weights).is_file():
            load_completely(teacher, weights, name.replace('teacher', 'teacher_ckpt', 1), self.trust)
        else:
            self.without_weights.add(name)
        self._add(name, teacher)
        known = metafile_metrics(str(config.get('cfg_path')))
        if known:
            self.found[name].update(accuracy=known, accuracy_from='metafile')


def _place(found: tuple[str, dict]) -> int:
    return list(LABELS).index(found[0].partition('.')[0])


def _accuracy_text(found: dict) -> str:
    if not found['accuracy']:
        return 'not evaluated'
    text = ', '.join(f'{name} {value:g}' for name, value in list(found['accuracy'].items())[:2])
    return text + (' (metafile)' if found.get('accuracy_from') == 'metafile' else '')


def _file_bytes(model: BaseModel) -> int:
    file = io.BytesIO()
    torch.save(dict(meta={}, state_dict=model.state_dict()), file)
    return file.tell()
