"""Real kills: a run that is killed and resumed, again and again, ends with the weights of the run that was not."""
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from mmkd_plugin.datasets.digits import make_digits

ROOT = Path(__file__).parents[2]
KILLS = 4  # of each run
# A run starts as a fork of a process that has only imported the libraries: one with threads cannot be forked safely.
PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload(['mmdet.models', 'mmdet.datasets', 'mmdet.evaluation', 'mmkd_plugin.models'])

# Everything that can be random: order, transforms in persistent workers, anchors in the main process, the policy.
CONFIG = '''
_base_ = '{root}/configs/benchmarks/digits/{config}'
train_dataloader = dict(
    batch_size=4, num_workers={workers}, persistent_workers={workers} > 0,
    dataset=dict(data_root='{data}/', indices=20, pipeline=[
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
        dict(type='RandomFlip', prob=0.5), dict(type='PhotoMetricDistortion'),
        {cached}
        dict(type='PackDetInputs')]))
val_dataloader = dict(dataset=dict(data_root='{data}/'))
val_evaluator = dict(ann_file='{data}/annotations/val.json')
model = dict(teacher_ckpt='{data}/teacher.pth', architecture=dict(train_cfg=dict(sampler=dict(
    _delete_=True, type='RandomSampler', num=256, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=False))))
randomness = dict(seed=None)
{rest}
'''
MOSAIC = "dict(type='CachedMosaic', img_scale=(96, 96), max_cached_images=6), dict(type='Resize', scale=(128, 128)),"
BY_EPOCH = '''
train_cfg = dict(max_epochs=6, val_interval=3)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=1, save_best='auto'))
custom_hooks = [dict(type='EMAHook', momentum=0.3)]
'''
SOKD = BY_EPOCH + '''
custom_hooks = custom_hooks + [dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=3)]
'''
BY_ITERATION = '''
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=30, val_interval=10)
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=False, T_max=30)]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=4, max_keep_ckpts=2))
custom_hooks = [dict(type='mmkd_plugin.FreezePolicyHook', search_iters=15)]
train_dataloader['sampler'] = dict(type='InfiniteSampler')
log_processor = dict(by_epoch=False)
'''
AMD = 'amd_fpn_retinanet_r18-c32_retinanet_r18-c16_digits-300.py'
SOKD_ON_FITNET = 'sokd-fitnet_fpn_retinanet_r18-c32_retinanet_r18-c16_digits-300.py'
RUNS = {
    'amd': dict(config=AMD, workers=2, cached=MOSAIC, rest=BY_EPOCH),
    'sokd': dict(config=SOKD_ON_FITNET, workers=2, cached='', rest=SOKD),
    'by iteration': dict(config=SOKD_ON_FITNET, workers=0, cached='', rest=BY_ITERATION),
}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    from miniature import save_weights
    root = tmp_path_factory.mktemp('data') / 'digits'
    make_digits(root, num_train=20, num_val=2)
    save_weights(f'{ROOT}/configs/benchmarks/digits/retinanet_r18-c32_digits.py', root / 'teacher.pth')
    return root


def start(*arguments, log):
    """Runs tools/train.py in a process of its own, which leads its data workers."""
    process = PROCESSES.Process(target=run, args=([*map(str, arguments)], log))
    process.start()
    return process


def run(arguments, log):
    os.setsid()
    with log.open('a') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ['tools/train.py', *arguments]
    torch.manual_seed(time.time_ns() % 2**31)
    runpy.run_path(str(ROOT / 'tools/train.py'), run_name='__main__')


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
def test_killed_again_and_again(name, data, tmp_path):
    config, log = tmp_path / 'config.py', tmp_path / 'log'
    config.write_text(CONFIG.format(root=ROOT, data=data, **RUNS[name]))
    began = time.time()
    finish(start(config, '--work-dir', tmp_path / 'whole', log=log), log)
    whole, seconds = latest(tmp_path / 'whole'), time.time() - began

    kills, finished, work_dir, chance = 0, False, tmp_path / 'killed', random.Random(0)
    first = [config, '--work-dir', work_dir, '--cfg-options', f'randomness.seed={whole["meta"]["seed"]}']
    while not finished:
        noted = pointer(work_dir)
        child = start(*([config, '--work-dir', work_dir, '--resume'] if noted else first), log=log)
        if kills == KILLS:
            finish(child, log)
            finished = True
            continue
        while pointer(work_dir) == noted and child.is_alive():
            time.sleep(0.02)  # every life gets as far as a checkpoint, and not much further
        time.sleep(chance.uniform(0, seconds / 8))
        if pointer(work_dir) == pointer(tmp_path / 'whole').replace('whole', 'killed'):
            finish(child, log)  # too far to be killed again: once more
            shutil.rmtree(work_dir)
        else:
            os.killpg(child.pid, signal.SIGKILL)
            child.join()
            assert child.exitcode == -signal.SIGKILL, log.read_text()[-3000:]
            kills += 1
    killed = latest(work_dir)
    for key in ('state_dict', 'optimizer', 'ema_state_dict', 'param_schedulers'):
        assert same(whole.get(key), killed.get(key)), key
    assert not list(work_dir.glob('*.unfinished'))


def finish(child, log):
    child.join()
    assert child.exitcode == 0, log.read_text()[-3000:]


def pointer(work_dir):
    path = work_dir / 'last_checkpoint'
    return path.read_text() if path.exists() else ''


def latest(work_dir):
    return torch.load(pointer(work_dir), weights_only=False)


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b
