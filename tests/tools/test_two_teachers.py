"""The commands with the config of two teachers: train, resume, export, visualise; on CIFAR-10 in miniature."""
import json
import runpy
import shutil
import sys

import cv2
import miniature
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.visualization import Visualizer
from mmpretrain.datasets import cifar

from mmkd_plugin.config.loading import read_config
from mmkd_plugin.config.preflight import missing_inputs
from mmkd_plugin.config.teachers import teachers_in
from mmkd_plugin.deploy import cost
from mmkd_plugin.deploy.pseudo_labels import labelling_model

CONFIG = '''
_base_ = '{root}/configs/amd/cifar/amd-kd_backbone_wrn28-3+wrn16-3_wrn16-1_b128_cifar10.py'
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
train_cfg = dict(max_epochs=2)
val_cfg = dict(type='mmkd_plugin.TeacherStudentValLoop')
model = dict(teacher_ckpt=dict(wrn28='wrn28.pth', wrn16='wrn16.pth'), inherit=dict(wrn16=['head']),
             architecture=dict(head=dict(in_channels=192), backbone=dict(widen_factor=3)))
custom_hooks = [dict(type='mmkd_plugin.DistillVisualizationHook', interval=1000, num_images=1)]
default_hooks = dict(logger=dict(interval=1))
'''


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs a tool; returns what it says."""
    monkeypatch.syspath_prepend('tools')
    monkeypatch.setattr(cost, 'ROUNDS', 3)
    monkeypatch.setattr(cifar, 'check_md5', lambda *_: True)  # MMPretrain's CIFAR takes the true files only

    def tool(name, *args):
        Visualizer._instance_dict.clear()
        monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
        runpy.run_path(f'tools/{name}', run_name='__main__')
        said = capsys.readouterr()
        return said.out + said.err

    return tool


@pytest.fixture
def config(tmp_path, pytestconfig):
    """A config beside which both teachers lie, and the options that name the data."""
    path = tmp_path / 'two.py'
    path.write_text(CONFIG.format(root=pytestconfig.rootpath))
    for name in ('wrn28', 'wrn16'):
        miniature.save_weights(f'configs/cifar/{name}-3_b128_cifar10.py', tmp_path / f'{name}.pth')
    options = miniature.cifar_options(miniature.make_cifar(tmp_path / 'cifar'))
    return path, ['--cfg-options', *(f'{key}={value}' for key, value in options.items())]


@pytest.mark.slow
def test_train_resume_export_and_look(tool, config, tmp_path):
    path, data = config
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    tool('train.py', path, '--work-dir', whole, '--check-teacher', *data)
    log = next(whole.rglob('*.log')).read_text()
    for name in ('wrn28', 'wrn16'):
        assert f"Teacher '{name}' on the validation set: accuracy/top1" in log
        assert f'teacher.{name}.accuracy/top1' in log
        assert all(f'distill.{name}.{loss}: ' in log for loss in ('loss_kd', 'loss_amd_backbone_layer3'))
    end = torch.load(whole / 'epoch_2.pth', weights_only=False)
    assert not any('teacher' in key for key in end['state_dict'])

    cut.mkdir()
    shutil.copy(whole / 'epoch_1.pth', cut)
    (cut / 'last_checkpoint').write_text(str(cut / 'epoch_1.pth'))
    seed = f'randomness.seed={end["meta"]["seed"]}'
    tool('train.py', path, '--work-dir', cut, '--check-teacher', '--resume', *data, seed)
    assert 'Epoch(train) [1]' not in next(cut.rglob('*.log')).read_text()
    resumed = torch.load(cut / 'epoch_2.pth', weights_only=False)['state_dict']
    assert all(torch.equal(value, resumed[key]) for key, value in end['state_dict'].items())

    exported, best = tmp_path / 'student.pth', torch.load(whole / 'student_best.pth', weights_only=False)
    said = tool('export_student.py', path, whole / 'epoch_2.pth', exported, *data)
    state = torch.load(exported, weights_only=False)['state_dict']
    assert {f'architecture.{key}' for key in state} == set(end['state_dict']) and set(best['state_dict']) == set(state)
    assert all(torch.equal(value, end['state_dict'][f'architecture.{key}']) for key, value in state.items())
    report = json.loads(exported.with_suffix('.json').read_text())
    assert report['teacher.wrn28']['params'] > report['teacher.wrn16']['params'] == report['student']['params']
    assert '| teacher wrn28 |' in said and said.index('teacher wrn16') < said.index('| student |')

    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    tool('visualize.py', path, whole / 'epoch_2.pth', tmp_path / 'image.png', '--out-dir', tmp_path / 'out', *data)
    assert cv2.imread(str(tmp_path / 'out/image.png')) is not None


def test_what_is_missing_is_named(config, tmp_path):
    path, _ = config
    (tmp_path / 'wrn16.pth').unlink()
    cfg = read_config(str(path))
    assert [weights for _, _, weights in teachers_in(cfg.model)] == [str(tmp_path / 'wrn28.pth'), 'wrn16.pth']
    missing = [sentence for sentence in missing_inputs(cfg) if 'model.teacher' in sentence]
    assert len(missing) == 1 and missing[0].endswith('supply it with --cfg-options model.teacher_ckpt.wrn16=PATH')
    cfg.model.update(teacher_ckpt=None, allow_random_teacher=True, teacher=dict(
        one=dict(type='X', init_cfg=dict(checkpoint='no.pth')), other=dict(type='X')))
    missing = [sentence for sentence in missing_inputs(cfg) if 'model.teacher' in sentence]
    assert len(missing) == 1 and missing[0].startswith('model.teacher.one.init_cfg.checkpoint not found')


def test_one_of_several_labels(config):
    with pytest.raises(ValueError, match='^CONFIG: expected a single teacher.*several: wrn28, wrn16'):
        labelling_model(Config.fromfile(config[0]), 'any.pth')
