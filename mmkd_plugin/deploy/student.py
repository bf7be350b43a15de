"""The student by itself: its plain config, and its weights as a checkpoint that needs nothing of ours."""
import copy
import io
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import weights_to_cpu
from mmengine.structures import BaseDataElement
from torch import nn

from ..checkpoints.guard import data_only
from ..checkpoints.reading import load_completely, read_checkpoint
from ..config.cfg_path import build_model, read_cfg_path
from .cost import RawOutputs
from .files import finished, refuse_existing
from .sample_batch import sample_batch


def plain_config(cfg: Config) -> Config:
    """Returns the config of the student alone, or of a model without a teacher, with nothing of ours.

    Hooks that only make sense beside a teacher go with it; data, schedule and
    evaluation stay.
    """
    cfg = copy.deepcopy(cfg)  # Config.copy() shares what is nested, and the caller's config would change
    if 'architecture' in cfg.model:
        student = cfg.model.architecture
        if student.get('cfg_path'):
            library = read_cfg_path(student.cfg_path, 'architecture')
            student = library.model
            cfg.default_scope = library.get('default_scope', cfg.get('default_scope'))
        if 'data_preprocessor' in cfg.model:
            student.setdefault('data_preprocessor', cfg.model.data_preprocessor)
        cfg.model = student
    if str(cfg.get('optim_wrapper', {}).get('constructor')).startswith('mmkd_plugin.'):
        cfg.optim_wrapper.pop('constructor')
        cfg.optim_wrapper.pop('policy', None)
        if 'student_constructor' in cfg.optim_wrapper:
            cfg.optim_wrapper.constructor = cfg.optim_wrapper.pop('student_constructor')
    if _is_ours(cfg.get('optim_wrapper')):
        cfg.optim_wrapper.type = 'OptimWrapper'  # whose arguments ours has
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks', []) if not _is_ours(hook)]
    if _is_ours(cfg.get('val_cfg')):
        cfg.val_cfg.pop('type')
    if _is_ours(cfg.get('train_cfg')):
        cfg.train_cfg.type = cfg.train_cfg.type.removeprefix('mmkd_plugin.Unlabelled')  # whose arguments ours has
        cfg.train_cfg.pop('unlabelled_dataloader', None)
    for name, hook in list(cfg.get('default_hooks', {}).items()):
        if _is_ours(hook):
            if name == 'checkpoint':
                hook.type = 'CheckpointHook'  # whose arguments ours has
            else:
                del cfg.default_hooks[name]
    return cfg


def _is_ours(part: dict | None) -> bool:
    return part is not None and str(part.get('type')).startswith(('mmkd_plugin.', 'mmrazor.'))


def build_student(cfg: Config, checkpoint: str, trust_checkpoint: bool = False) -> BaseModel:
    """Builds the plain student with the weights of ``checkpoint``, exported or of a distillation.

    Raises:
        ValueError: the checkpoint does not fit the student entirely, or as :func:`read_checkpoint`.
    """
    cfg = plain_config(cfg)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with data_only(trust_checkpoint):
        model = MODELS.build(cfg.model)
    load_completely(model, checkpoint, 'checkpoint', trust_checkpoint)
    return model


def foreign_parts(module: nn.Module, name: str = 'the model') -> list[str]:
    """Returns what plain MMDetection and MMPretrain cannot build, such as ``'backbone (mmrazor.WideResNet)'``."""
    package = type(module).__module__.partition('.')[0]
    if package in ('mmkd_plugin', 'mmrazor'):
        return [f'{name} ({package}.{type(module).__name__})']
    inner = '' if name == 'the model' else f'{name}.'
    return [part for child, each in module.named_children() for part in foreign_parts(each, inner + child)]


def export_student(cfg: Config, checkpoint: str, out: str, overwrite: bool = False,
                   trust_checkpoint: bool = False) -> list[str]:
    """Writes the student of ``checkpoint`` to ``out``, loadable by plain MMDetection or MMPretrain.

    The file has ``state_dict`` and ``meta`` (the classes, and the plain config as text), as
    those libraries write it. It gets its name when it is written and checked: loaded strictly into
    the model of that config, it must put out for real images, to the bit, what the student puts out
    that the distillation builds. See :func:`sample_batch` for the images.

    Of a run with MMEngine's ``EMAHook`` it is the average, which is what was validated: in its checkpoints, that
    is ``state_dict``, and what training goes on from is in ``ema_state_dict``.

    Returns:
        :func:`foreign_parts` of the student. Where there are any, the file loads after ``import mmkd_plugin`` only.

    Raises:
        ValueError: the weights do not fit the student, the file fails the check, or ``out`` exists and
            ``overwrite`` is False.
    """
    refuse_existing('out', out, overwrite)
    model = build_student(cfg, checkpoint, trust_checkpoint)
    meta = dict(read_checkpoint(checkpoint, 'checkpoint', trust_checkpoint).get('meta', {}))
    meta['cfg'] = plain_config(cfg).pretty_text
    with finished('out', out, overwrite) as unfinished:
        content = io.BytesIO()  # torch.save to a file on a full disk says nothing of the disk
        torch.save(dict(meta=meta, state_dict=weights_to_cpu(model.state_dict())), content)
        unfinished.write_bytes(content.getbuffer())
        _check_exported(unfinished, cfg, checkpoint, trust_checkpoint)
    return foreign_parts(model)


def _check_exported(path: Path, cfg: Config, checkpoint: str, trust_checkpoint: bool) -> None:
    """Raises ``ValueError`` unless the file is, in all that counts, the student of the checkpoint."""
    text = read_checkpoint(str(path), 'out', trust_checkpoint)['meta']['cfg']
    exported = build_student(Config.fromstring(text, '.py'), str(path), trust_checkpoint).eval()
    trained = _distilled_student(cfg, checkpoint, trust_checkpoint).eval()
    batch, _ = sample_batch(plain_config(cfg), image_channels(exported))
    for one, other in zip(_outputs(exported, batch), _outputs(trained, batch), strict=True):
        if not torch.equal(one, other):
            raise ValueError(f'out: the exported student puts out something else than that of {checkpoint!r}; the '
                             f'largest difference is {(one - other).abs().max():g}. Nothing is written')


def _distilled_student(cfg: Config, checkpoint: str, trust_checkpoint: bool) -> BaseModel:
    """Builds the student as :class:`TeacherStudentDistill` does."""
    if 'architecture' not in cfg.model:
        return build_student(cfg, checkpoint, trust_checkpoint)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    architecture = cfg.model.architecture.copy()
    preprocessor = cfg.model.get('data_preprocessor', cfg.get('data_preprocessor'))
    if preprocessor is not None and not architecture.get('cfg_path'):
        architecture.setdefault('data_preprocessor', preprocessor)
    model = build_model('architecture', architecture, trust_checkpoint)
    load_completely(model, checkpoint, 'checkpoint', trust_checkpoint)
    return model


def image_channels(model: nn.Module) -> int:
    """Returns how many channels the images have that a model takes: one or three."""
    mean = getattr(model.data_preprocessor, 'mean', None)
    if mean is not None:
        return mean.numel()
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    return 1 if first == 1 else 3  # YOLOX folds its images to twelve


@torch.no_grad()
def _outputs(model: BaseModel, batch: dict) -> list[torch.Tensor]:
    """Returns the tensors that a model makes of a batch: raw, and after post-processing."""
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    raw = RawOutputs(model, data.get('data_samples'))(data['inputs'])
    return [*raw, *_tensors(model(**data, mode='predict'))]


def _tensors(predictions: object) -> list[torch.Tensor]:
    """Returns the tensors in predictions of any kind: boxes, masks, panoptic maps, scores, those of several tasks."""
    if isinstance(predictions, torch.Tensor):
        return [predictions]
    if isinstance(predictions, BaseDataElement):  # without what the data set says
        predictions = [value for name, value in predictions.items() if not name.startswith('gt_')]
    elif isinstance(predictions, dict):
        predictions = list(predictions.values())
    if isinstance(predictions, (list, tuple)):
        return [tensor for each in predictions for tensor in _tensors(each)]
    return []
