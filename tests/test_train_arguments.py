import argparse
import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location('train', Path(__file__).parent.parent / 'tools/train.py')
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)


def load(config='configs/amd_retinanet_coco.py', **arguments):
    defaults = dict(config=config, work_dir=None, amp=False, auto_scale_lr=False, resume=None, cfg_options=None,
                    launcher='none')
    return train.load_config(argparse.Namespace(**dict(defaults, **arguments)))


def test_work_dir_is_named_by_the_config():
    assert load().work_dir == 'work_dirs/amd_retinanet_coco'
    assert load(work_dir='x').work_dir == 'x'


@pytest.mark.parametrize('config', ['configs/amd_retinanet_coco.py', 'configs/sokd_retinanet_coco.py'])
def test_amp_changes_the_students_wrapper(config):
    cfg = load(config, amp=True)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper' and cfg.optim_wrapper.loss_scale == 'dynamic'
    with pytest.raises(ValueError, match='--amp needs'):
        load(config, amp=True, cfg_options={'optim_wrapper.type': 'ApexOptimWrapper'})


def test_auto_scale_lr():
    assert load(auto_scale_lr=True).auto_scale_lr.enable is True
    with pytest.raises(ValueError, match='base_batch_size'):
        load(auto_scale_lr=True, cfg_options={'auto_scale_lr': {'_delete_': True}})


def test_resume_from_the_latest_or_from_a_file():
    cfg = load(resume='auto')
    assert cfg.resume is True and cfg.load_from is None
    cfg = load(resume='epoch_3.pth')
    assert cfg.resume is True and cfg.load_from == 'epoch_3.pth'


def test_cfg_options():
    assert load(cfg_options={'model.teacher_ckpt': 'mine.pth'}).model.teacher_ckpt == 'mine.pth'
