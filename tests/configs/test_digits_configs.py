"""Every config of the demo, through the real Runner on a few images."""
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmkd_plugin.datasets.digits import make_digits
from mmkd_plugin.deploy.student import build_student, export_student, plain_config

CONFIGS = sorted(Path('configs/benchmarks/digits').glob('*.py'))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'digits'
    make_digits(root, num_train=8, num_val=4)
    return root


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope
    cfg = Config.fromfile('configs/benchmarks/digits/retinanet_r18-c32_digits.py')
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.save(model.state_dict(), path)
    return path


def load(path, data, teacher, work_dir):
    cfg = Config.fromfile(path)
    options = {f'{loader}.dataset.data_root': f'{data}/' for loader in ('train_dataloader', 'val_dataloader',
                                                                        'test_dataloader')}
    options.update({f'{evaluator}.ann_file': f'{data}/annotations/val.json' for evaluator in ('val_evaluator',
                                                                                              'test_evaluator')})
    options.update({'work_dir': str(work_dir), 'train_cfg.max_epochs': 1, 'default_hooks.checkpoint.interval': 1,
                    'train_dataloader.dataset.indices': 8})
    if 'unlabelled_dataloader' in cfg.train_cfg:
        dataset = 'train_cfg.unlabelled_dataloader.dataset'
        options.update({f'{dataset}.data_root': f'{data}/', f'{dataset}.indices': -4})
    if 'teacher_ckpt' in cfg.model:
        options['model.teacher_ckpt'] = str(teacher)
    cfg.merge_from_dict(options)
    return cfg


def test_there_are_configs():
    assert len(CONFIGS) >= 4


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_trains_and_exports(path, data, teacher, tmp_path):
    cfg = load(path, data, teacher, tmp_path)
    runner = Runner.from_cfg(cfg)
    runner.train()
    logged = {key: buffer.data[0][-1] for key, buffer in runner.message_hub.log_scalars.items() if 'loss' in key}
    assert all(torch.isfinite(torch.as_tensor(value)) for value in logged.values())
    distilled = {key: value for key, value in logged.items() if 'distill' in key or 'unlabelled' in key}
    assert all(value > 0 for value in distilled.values()), distilled
    assert bool(distilled) == ('distiller' in cfg.model and cfg.model.distiller.type.startswith('mmkd_plugin'))
    export_student(cfg, str(tmp_path / 'epoch_1.pth'), str(tmp_path / 'student.pth'))
    exported = build_student(plain_config(cfg), str(tmp_path / 'student.pth'))
    trained = getattr(runner.model, 'student', runner.model).state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in exported.state_dict().items())


def test_ema_keeps_no_teacher_and_resumes(data, teacher, tmp_path):
    path = next(path for path in CONFIGS if path.stem.startswith('amd'))
    cfg = load(path, data, teacher, tmp_path)
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.5)]
    cfg.train_cfg.max_epochs = 2  # the first step only copies
    Runner.from_cfg(cfg).train()
    saved = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    assert not any('teacher' in key for key in [*saved['state_dict'], *saved['ema_state_dict']])
    assert any((value != saved['ema_state_dict'][f'module.{key}']).any() for key, value in saved['state_dict'].items())

    cfg = load(path, data, teacher, tmp_path)
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.5)]
    cfg.merge_from_dict({'train_cfg.max_epochs': 3, 'resume': True})
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.epoch == 3
    export_student(cfg, str(tmp_path / 'epoch_3.pth'), str(tmp_path / 'student.pth'))
    exported = torch.load(tmp_path / 'student.pth')['state_dict']
    averaged = torch.load(tmp_path / 'epoch_3.pth', weights_only=False)['state_dict']  # what was validated
    assert all(torch.equal(value, averaged[f'architecture.{key}']) for key, value in exported.items())
