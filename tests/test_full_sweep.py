"""Every distillation through the commands: train, export, load without us. Slow: only `pytest -m sweep` runs it."""
import shutil

import miniature
import pytest
import sweep
import test_classifier_configs
from mmengine.config import Config
from test_main_jobs import LOAD, STRICT_LOAD, run, train

from mmkd_plugin.config.teachers import teachers_in

pytestmark = pytest.mark.sweep

# MMPretrain's CIFAR takes the true files only.
ANY_CHECKSUM = '''
import runpy
import sys
from mmpretrain.datasets import cifar
cifar.check_md5 = lambda *_: True
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


@pytest.fixture
def work_dir(tmp_path):
    """Goes as soon as the test is over, for the checkpoints are big."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def data_options(config, root):
    if config in sweep.DETECTORS:
        return miniature.coco_options(miniature.make_coco(root))
    roots = miniature.make_imagenet(root / 'imagenet'), miniature.make_cifar(root / 'cifar')
    options = test_classifier_configs.options(config, roots)
    options |= {key.replace('test_', 'val_', 1): value for key, value in options.items() if key.startswith('test_')}
    return [f'{key}={value}' for key, value in options.items()]


@pytest.mark.parametrize('config', sweep.DETECTORS + sweep.CLASSIFIERS, ids=lambda path: path.stem)
def test_train_export_and_load(config, work_dir):
    cfg = Config.fromfile(config)
    weights = [f'model.teacher_ckpt{name}={miniature.save_weights(teacher.cfg_path, work_dir / f"teacher{name}.pth")}'
               for name, teacher, _ in teachers_in(cfg.model)]
    script = ('tools/train.py', ) if 'cifar' not in config.stem else ('-c', ANY_CHECKSUM, 'tools/train.py')
    checkpoint, _ = train(
        config, work_dir / 'work', 'train_dataloader.num_batch_per_epoch=2', 'train_dataloader.batch_size=2',
        *weights, *miniature.save_pretrained(cfg, work_dir / 'backbone.pth'),
        *data_options(config, work_dir / 'data'), script=script)
    exported = work_dir / 'student.pth'
    said = run('tools/export_student.py', config, checkpoint, exported)
    strict = STRICT_LOAD if 'neither mmkd_plugin nor mmrazor' in said else f'import mmkd_plugin{LOAD}'
    assert 'loaded strictly' in run('-c', strict, exported)
