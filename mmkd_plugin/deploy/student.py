"""Export of the student: its plain config, and a checkpoint that does not need this package."""
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
from ..models.dummy_input import input_channels
from ..utils import type_name
from .cost import RawOutputs
from .files import finished, refuse_existing
from .sample_batch import sample_batch


def plain_config(cfg: Config) -> Config:
    """Returns the config of the student alone, or of a model without a teacher, without types of this package.

    Hooks that need a teacher are removed. Data, schedule and evaluation stay.
    """
    cfg = copy.deepcopy(cfg)  # Config.copy() is shallow and would change the caller's config
    if 'architecture' in cfg.model:
        student = cfg.model.architecture
        if student.get('cfg_path'):
            library = read_cfg_path(student.cfg_path, 'architecture')
            student = library.model
            cfg.default_scope = library.get('default_scope', cfg.get('default_scope'))
        if 'data_preprocessor' in cfg.model:
            student.setdefault('data_preprocessor', cfg.model.data_preprocessor)
        cfg.model = student
    if _is_ours(cfg.get('optim_wrapper'), 'constructor'):
        cfg.optim_wrapper.pop('constructor')
        cfg.optim_wrapper.pop('policy', None)
        if 'student_constructor' in cfg.optim_wrapper:
            cfg.optim_wrapper.constructor = cfg.optim_wrapper.pop('student_constructor')
    if _is_ours(cfg.get('optim_wrapper')):
        cfg.optim_wrapper.type = 'OptimWrapper'  # it has the same arguments
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or [] if not _is_ours(hook)]
    if _is_ours(cfg.get('val_cfg')):
        cfg.val_cfg.pop('type')
    if _is_ours(cfg.get('train_cfg')):
        cfg.train_cfg.type = type_name(cfg.train_cfg.type).removeprefix('Unlabelled').removeprefix('Darts')
        for second in ('unlabelled_dataloader', 'mutator_dataloader'):  # the other arguments are the same
            cfg.train_cfg.pop(second, None)
    for name, hook in list((cfg.get('default_hooks') or {}).items()):
        if _is_ours(hook):
            if name == 'checkpoint':
                hook.type = 'CheckpointHook'  # it has the same arguments
            else:
                del cfg.default_hooks[name]
    return cfg


def _is_ours(part: dict | None, key: str = 'type') -> bool:
    kind = (part or {}).get(key)
    name = f'{kind.__module__}.' if isinstance(kind, type) else str(kind)
    return name.startswith(('mmkd_plugin.', 'mmrazor.'))


def build_student(cfg: Config, checkpoint: str, trust_checkpoint: bool = False) -> BaseModel:
    """Builds the plain student with the weights of ``checkpoint``, an exported one or one of a distillation.

    Raises:
        ValueError: the checkpoint does not fit the student; or as in :func:`read_checkpoint`.
    """
    cfg = plain_config(cfg)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with data_only(trust_checkpoint):
        model = MODELS.build(cfg.model)
    load_completely(model, checkpoint, 'checkpoint', trust_checkpoint)
    return model


def foreign_parts(module: nn.Module, name: str = 'the model') -> list[str]:
    """Returns the modules that MMDetection and MMPretrain cannot build, such as ``'backbone (mmrazor.WideResNet)'``."""
    package = type(module).__module__.partition('.')[0]
    if package in ('mmkd_plugin', 'mmrazor'):
        return [f'{name} ({package}.{type(module).__name__})']
    inner = '' if name == 'the model' else f'{name}.'
    return [part for child, each in module.named_children() for part in foreign_parts(each, inner + child)]


def export_student(cfg: Config, checkpoint: str, out: str, overwrite: bool = False,
                   trust_checkpoint: bool = False) -> list[str]:
    """Writes the student of ``checkpoint`` to ``out`` as a checkpoint of plain MMDetection or MMPretrain.

    The file has ``state_dict`` and ``meta`` (the classes, and the plain config as text), like checkpoints of those
    libraries. It is checked before it gets its name: it is loaded strictly into the model of that config, and on real
    images (:func:`sample_batch`) its outputs must be bit-identical to those of the student in the distillation.

    If the run used MMEngine's ``EMAHook``, the averaged weights are exported, which are those that were validated. In
    such a checkpoint, ``state_dict`` has the averaged weights and ``ema_state_dict`` those that training resumes from.

    Returns:
        :func:`foreign_parts` of the student. If there are any, the file loads only after ``import mmkd_plugin``.

    Raises:
        ValueError: the weights do not fit the student, the file fails the check, or ``out`` exists and
            ``overwrite`` is False.
    """
    refuse_existing('out', out, overwrite)
    model = build_student(cfg, checkpoint, trust_checkpoint)
    meta = dict(read_checkpoint(checkpoint, 'checkpoint', trust_checkpoint).get('meta', {}))
    meta['cfg'] = plain_config(cfg).pretty_text
    with finished('out', out, overwrite) as unfinished:
        content = io.BytesIO()  # torch.save to a full disk does not report the cause
        torch.save(dict(meta=meta, state_dict=weights_to_cpu(model.state_dict())), content)
        unfinished.write_bytes(content.getbuffer())
        _check_exported(unfinished, cfg, checkpoint, trust_checkpoint)
    return foreign_parts(model)


def _check_exported(path: Path, cfg: Config, checkpoint: str, trust_checkpoint: bool) -> None:
    """Raises ``ValueError`` unless the outputs of the file are those of the student in the checkpoint."""
    text = read_checkpoint(str(path), 'out', trust_checkpoint)['meta']['cfg']
    exported = build_student(Config.fromstring(text, '.py'), str(path), trust_checkpoint).eval()
    trained = _distilled_student(cfg, checkpoint, trust_checkpoint).eval()
    batch, _ = sample_batch(plain_config(cfg), input_channels(exported))
    for one, other in zip(_outputs(exported, batch), _outputs(trained, batch), strict=True):
        if not torch.equal(one, other):
            raise ValueError(f'out: the outputs of the exported student differ from those of {checkpoint!r} by up to '
                             f'{(one - other).abs().max():g}. No file was written')


def _distilled_student(cfg: Config, checkpoint: str, trust_checkpoint: bool) -> BaseModel:
    """Builds the student in the same way as :class:`TeacherStudentDistill`."""
    if 'architecture' not in cfg.model:
        return build_student(cfg, checkpoint, trust_checkpoint)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    architecture = cfg.model.architecture.copy()
    preprocessor = cfg.model.get('data_preprocessor', cfg.get('data_preprocessor'))
    if preprocessor is not None and not architecture.get('cfg_path'):
        architecture.setdefault('data_preprocessor', preprocessor)
    model = build_model('architecture', architecture, trust_checkpoint)
    load_completely(model, checkpoint, 'checkpoint', trust_checkpoint)
    return model


@torch.no_grad()
def _outputs(model: BaseModel, batch: dict) -> list[torch.Tensor]:
    """Returns a model's outputs for a batch as tensors, before and after post-processing."""
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    raw = RawOutputs(model, data.get('data_samples'))(data['inputs'])
    return [*raw, *_tensors(model(**data, mode='predict'))]


def _tensors(predictions: object) -> list[torch.Tensor]:
    """Returns the tensors in predictions of any kind: boxes, masks, panoptic maps, scores, or several tasks."""
    if isinstance(predictions, torch.Tensor):
        return [predictions]
    if isinstance(predictions, BaseDataElement):  # without the metainfo
        predictions = [value for name, value in predictions.items() if not name.startswith('gt_')]
    elif isinstance(predictions, dict):
        predictions = list(predictions.values())
    if isinstance(predictions, (list, tuple)):
        return [tensor for each in predictions for tensor in _tensors(each)]
    return []
