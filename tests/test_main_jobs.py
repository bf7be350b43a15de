"""The commands of the README, on data laid out as the real: train, resume, test, export, load without us."""
import os
import re
import subprocess
import sys
from pathlib import Path

import miniature
import pytest
import torch

ROOT = Path(__file__).parent.parent

LOAD = '''
import sys
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope
content = torch.load(sys.argv[1])
cfg = get_config(sys.argv[2]) if len(sys.argv) > 2 else Config.fromstring(content['meta']['cfg'], '.py')
init_default_scope(cfg.default_scope)
if 'data_preprocessor' in cfg:
    cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
MODELS.build(cfg.model).load_state_dict(content['state_dict'], strict=True)
print('loaded strictly', len(content['state_dict']))
'''
STRICT_LOAD = '''
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.split('.')[0] in ('mmkd_plugin', 'mmrazor'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
''' + LOAD + '''
assert 'mmkd_plugin' not in sys.modules and 'mmrazor' not in sys.modules
'''

# COCO's images at a quarter of the size that the configs give them: the same code in a sixteenth of the time.
SMALL = ['train_dataloader.dataset.pipeline.2.scale=(333,200)', 'val_dataloader.dataset.pipeline.1.scale=(333,200)',
         'test_dataloader.dataset.pipeline.1.scale=(333,200)']
# ImageNet's at half.
SMALL_IMAGENET = ['train_dataloader.dataset.pipeline.1.scale=112', *(
    f'{split}_dataloader.dataset.pipeline.{step}' for split in ('val', 'test')
    for step in ('1.scale=128', '2.crop_size=112'))]


def run(*command, ok=True, **env):
    done = subprocess.run([sys.executable, '-W', 'ignore', *map(str, command)], cwd=ROOT, text=True,
                          capture_output=True, env=dict(os.environ, **env))
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output[-6000:]
    return output


def train(config, work_dir, *options, script=('tools/train.py', )):
    """Trains for an epoch; returns the checkpoint, which has no teacher, and what was printed."""
    output = run(*script, config, '--work-dir', work_dir, '--cfg-options', 'train_cfg.max_epochs=1',
                 'default_hooks.logger.interval=1', *options)
    checkpoint = work_dir / 'epoch_1.pth'
    assert not any('teacher' in key for key in torch.load(checkpoint, weights_only=False)['state_dict'])
    losses = {key: float(value) for key, value in re.findall(r'distill\.(loss_\w+): (\S+)', output)}
    assert losses and all(0 < value < 1e3 for name, value in losses.items() if not name.startswith('loss_base')), losses
    assert all(value < 1e3 for value in losses.values()), losses  # those of a warm-up begin at zero
    return checkpoint, output


def jobs(tmp_path, config, student, options, weights, test_options=()):
    work_dir = tmp_path / 'work'
    checkpoint, output = train(config, work_dir, *weights, *options)

    resumed = run('tools/train.py', config, '--work-dir', work_dir, '--resume', '--cfg-options',
                  'train_cfg.max_epochs=2', 'default_hooks.logger.interval=1', *weights, *options)
    assert 'resumed epoch: 1' in resumed
    assert 'Epoch(train) [2]' in resumed and 'Epoch(train) [1]' not in resumed

    exported = tmp_path / 'student.pth'
    run('tools/export_student.py', config, checkpoint, exported, '--cfg-options', *options)
    assert 'exists' in run('tools/export_student.py', config, checkpoint, exported, ok=False)
    assert 'loaded strictly' in run('-c', STRICT_LOAD, exported, student)

    metrics = [re.findall(r'Epoch\(test\)\s+\[\d+/\d+\]\s+(.*?)\s+data_time', run(
        'tools/test.py', config, file, '--work-dir', tmp_path / 'test', '--cfg-options', *test_options, *options))[-1]
        for file in (checkpoint, exported)]
    assert metrics[0] and metrics[0] == metrics[1]
    return output


@pytest.mark.parametrize('method', ['amd', 'sokd'])
def test_detector(method, tmp_path):
    root = miniature.make_coco(tmp_path / 'coco')
    teacher = miniature.save_weights('mmdet::retinanet/retinanet_r101_fpn_1x_coco.py', tmp_path / 'teacher.pth')
    backbone = miniature.save_backbone(50, tmp_path / 'resnet50.pth')
    output = jobs(tmp_path, f'configs/{method}_retinanet_coco.py', 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
                  [*miniature.coco_options(root), *SMALL],
                  [f'model.teacher_ckpt={teacher}', f'model.architecture.backbone.init_cfg.checkpoint={backbone}'],
                  ['model.architecture.test_cfg.score_thr=0.0'])
    assert "weights of 'neck' come from the teacher" in output


@pytest.mark.parametrize('method', ['amd', 'sokd'])
def test_classifier(method, tmp_path):
    root = miniature.make_imagenet(tmp_path / 'imagenet')
    teacher = miniature.save_weights('mmpretrain::resnet/resnet34_8xb32_in1k.py', tmp_path / 'teacher.pth')
    jobs(tmp_path, f'configs/{method}_resnet_imagenet.py', 'mmpretrain::resnet/resnet18_8xb32_in1k.py',
         [*miniature.imagenet_options(root), *SMALL_IMAGENET], [f'model.teacher_ckpt={teacher}'])


@pytest.mark.parametrize('config, missing', [
    ('configs/amd_retinanet_coco.py',
     ['train_dataloader.dataset.data_root', 'val_evaluator.ann_file', 'model.teacher_ckpt',
      'model.architecture.backbone.init_cfg.checkpoint']),
    ('configs/amd_resnet_imagenet.py', ['train_dataloader.dataset.data_root', 'model.teacher_ckpt']),
])
def test_what_is_missing_is_said_in_one_sentence_each_before_training(config, missing, tmp_path):
    options = ['model.teacher_ckpt=no/teacher.pth', 'train_dataloader.dataset.data_root=no/data',
               'val_dataloader.dataset.data_root=no/data']
    if 'retinanet' in config:
        options += ['model.architecture.backbone.init_cfg.checkpoint=no/backbone.pth',
                    'val_evaluator.ann_file=no/annotations.json']
    output = run('tools/train.py', config, '--work-dir', tmp_path, '--cfg-options', *options, ok=False)
    for option in missing:
        lines = [line for line in output.splitlines() if line.startswith(option)]
        assert len(lines) == 1 and 'looked for' in lines[0] and f'--cfg-options {option}=' in lines[0]
    assert 'Traceback' not in output
