"""The student by itself: its plain config, and its weights as a checkpoint that needs nothing of ours."""
import os
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader, weights_to_cpu
from torch import nn

from .cfg_path import read_cfg_path
from .checkpoint import load_completely


def plain_config(cfg: Config) -> Config:
    """Returns the config of the student alone; a config without a teacher comes back as it is.

    Hooks that only make sense beside a teacher go with it; data, schedule and
    evaluation stay.
    """
    cfg = cfg.copy()
    if 'architecture' not in cfg.model:
        return cfg
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
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks', [])
                        if not str(hook.get('type')).startswith(('mmkd_plugin.', 'mmrazor.'))]
    return cfg


def build_student(cfg: Config, checkpoint: str) -> BaseModel:
    """Builds the plain student with the weights of ``checkpoint``, exported or of a distillation.

    Raises:
        ValueError: the checkpoint does not fit the student entirely.
    """
    cfg = plain_config(cfg)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(cfg.model)
    load_completely(model, checkpoint, 'checkpoint')
    return model


def foreign_parts(module: nn.Module, name: str = 'the model') -> list[str]:
    """Returns what plain MMDetection and MMPretrain cannot build, such as ``'backbone (mmrazor.WideResNet)'``."""
    package = type(module).__module__.partition('.')[0]
    if package in ('mmkd_plugin', 'mmrazor'):
        return [f'{name} ({package}.{type(module).__name__})']
    inner = '' if name == 'the model' else f'{name}.'
    return [part for child, each in module.named_children() for part in foreign_parts(each, inner + child)]


def export_student(cfg: Config, checkpoint: str, out: str, overwrite: bool = False) -> list[str]:
    """Writes the student of ``checkpoint`` to ``out``, loadable by plain MMDetection or MMPretrain.

    The file has ``state_dict`` and ``meta`` (the classes, and the plain config as text), as
    those libraries write it. It is written whole or not at all.

    Returns:
        :func:`foreign_parts` of the student. Where there are any, the file loads after ``import mmkd_plugin`` only.

    Raises:
        ValueError: the weights do not fit the student, or ``out`` exists and
            ``overwrite`` is False.
    """
    path = Path(out)
    if path.exists() and not overwrite:
        raise ValueError(f'out: {out!r} exists; choose another name, or overwrite it with --overwrite')
    model = build_student(cfg, checkpoint)
    meta = dict(CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu', logger='silent').get('meta', {}))
    meta['cfg'] = plain_config(cfg).pretty_text
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f'{path.name}.unfinished')
    torch.save(dict(meta=meta, state_dict=weights_to_cpu(model.state_dict())), unfinished)
    os.replace(unfinished, path)
    return foreign_parts(model)
