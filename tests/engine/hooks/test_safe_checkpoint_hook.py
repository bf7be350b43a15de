"""Checkpoints when the disk is full, the run is killed, or a file is torn."""
import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from test_freeze_policy_hook import MODEL, POLICY, loader

from mmkd_plugin.checkpoints.resume import add_safety_hooks, checkpoints_in, is_whole, resume_from
from mmkd_plugin.engine import ReseedHook
from mmkd_plugin.engine.hooks.safe_checkpoint_hook import AtomicBackend, SafeCheckpointHook


def config(tmp_path, epochs=3, **checkpoint):
    return Config(dict(
        model=MODEL, work_dir=str(tmp_path / 'run'), default_scope='mmdet',
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01), **POLICY), randomness=dict(seed=0),
        experiment_name=f'{tmp_path.name}_{epochs}_{len(list(tmp_path.glob("*/*")))}',
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, **checkpoint))))


def train(cfg):
    add_safety_hooks(cfg)
    runner = Runner(train_dataloader=loader(), **cfg)
    runner.train()
    return runner


def names(work_dir):
    return sorted(path.name for path in work_dir.glob('*.pth*'))


def test_those_given_up_go_after_their_successor_is_there(tmp_path, monkeypatch):
    seen = []
    put = AtomicBackend.put

    def put_and_look(self, obj, filepath):
        put(self, obj, filepath)
        seen.append(names(Path(filepath).parent))

    monkeypatch.setattr(AtomicBackend, 'put', put_and_look)
    train(config(tmp_path, max_keep_ckpts=1))
    assert seen == [['epoch_1.pth'], ['epoch_1.pth', 'epoch_2.pth'], ['epoch_2.pth', 'epoch_3.pth']]
    assert names(tmp_path / 'run') == ['epoch_3.pth']


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    syncs = []

    def full_the_second_time(descriptor):
        syncs.append(descriptor)
        if len(syncs) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', full_the_second_time)
    with pytest.raises(OSError, match='No space left'):
        train(config(tmp_path, max_keep_ckpts=1))
    assert names(tmp_path / 'run') == ['epoch_1.pth'] and is_whole(tmp_path / 'run/epoch_1.pth')
    cfg = config(tmp_path, max_keep_ckpts=1)
    assert resume_from(cfg) == [f'--resume: continues {tmp_path}/run/epoch_1.pth, after 2 iterations']
    assert cfg.load_from == str(tmp_path / 'run/epoch_1.pth')
    cfg.resume = True
    train(cfg)
    assert names(tmp_path / 'run') == ['epoch_3.pth']


def test_a_torn_checkpoint_is_passed_over_and_that_is_said(tmp_path):
    train(config(tmp_path))
    work_dir = tmp_path / 'run'
    whole = (work_dir / 'epoch_3.pth').read_bytes()
    cuts = {'cut off': whole[:len(whole) // 2], 'one bit': bytes([*whole[:5000], whole[5000] ^ 1, *whole[5001:]]),
            'empty': b''}
    for torn in cuts.values():
        (work_dir / 'epoch_3.pth').write_bytes(torn)
        cfg = config(tmp_path)
        said = resume_from(cfg)
        assert cfg.load_from == str(work_dir / 'epoch_2.pth')
        assert len(said) == 2 and 'epoch_3.pth' in said[0] and f'({len(torn)} bytes)' in said[0]
        assert 'continues' in said[1] and 'epoch_2.pth' in said[1]
    (work_dir / 'epoch_3.pth').unlink()
    assert 'epoch_3.pth is missing' in resume_from(config(tmp_path))[0]
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        (work_dir / name).write_bytes(b'PK')
    with pytest.raises(ValueError, match='no complete checkpoint is left'):
        resume_from(config(tmp_path))
    with pytest.raises(ValueError, match=r'epoch_1.pth.* is damaged or incomplete \(2 bytes\)'):
        resume_from(Config(dict(config(tmp_path), load_from=str(work_dir / 'epoch_1.pth'))))


def test_order_seed_and_no_checkpoint_at_all(tmp_path):
    cfg = config(tmp_path)
    assert 'training starts from the beginning' in resume_from(cfg)[0] and not cfg.get('load_from')
    assert 'training starts from big.pth' in resume_from(cfg, start='big.pth')[0]
    assert cfg.load_from == 'big.pth' and cfg.resume is False
    runner = train(config(tmp_path, epochs=2))
    assert [path.name for path in checkpoints_in(tmp_path / 'run')] == ['epoch_2.pth', 'epoch_1.pth']
    for randomness in (dict(seed=None), dict(deterministic=False), None):
        cfg = config(tmp_path)
        cfg.pop('randomness')
        if randomness:
            cfg.randomness = randomness
        resume_from(cfg)
        assert cfg.randomness == dict(randomness or {}, seed=runner.seed)


def test_what_a_config_says_of_these_hooks_holds(tmp_path):
    cfg = config(tmp_path, epochs=1)
    cfg.default_hooks.update(reseed=None, non_finite_loss=None, checkpoint=dict(type='mmkd_plugin.Mine'))
    add_safety_hooks(cfg)
    assert set(cfg.default_hooks) == {'checkpoint'} and cfg.default_hooks.checkpoint.type == 'mmkd_plugin.Mine'
    cfg.val_dataloader = dict()
    add_safety_hooks(cfg)
    assert set(cfg.default_hooks) == {'checkpoint', 'reseed', 'non_finite_loss', 'best_student'}


@pytest.mark.parametrize('fields', [
    {}, dict(default_hooks=None), dict(default_hooks=dict(best_student=dict(rule='greater'))),
    dict(default_hooks=dict(logger=dict(type='LoggerHook'))),
    dict(default_hooks=dict(checkpoint=dict(interval=2))),
    dict(default_hooks=dict(checkpoint=dict(type='mmengine.CheckpointHook')))])
def test_configs_with_few_hooks_of_their_own_get_these_too(fields):
    cfg = Config(dict(model=dict(architecture={}), val_dataloader={}, **fields))
    add_safety_hooks(cfg)
    assert {'checkpoint', 'reseed', 'non_finite_loss', 'best_student'} <= set(cfg.default_hooks)
    given = (fields.get('default_hooks') or {}).get('best_student', {})
    assert cfg.default_hooks.best_student == dict(given, type='mmkd_plugin.BestStudentHook')
    assert cfg.default_hooks.checkpoint.type == 'mmkd_plugin.SafeCheckpointHook'


def test_the_best_of_the_run_resumed_from_is_left_alone(tmp_path):
    hook = SafeCheckpointHook()
    hook.file_backend, hook.out_dir = AtomicBackend(), str(tmp_path / 'new')
    for name in ('old/best.pth', 'new/best.pth'):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with hook._remove_afterwards():
        for name in ('old/best.pth', 'new/best.pth'):
            hook.file_backend.remove(str(tmp_path / name))
    assert [path.parent.name for path in tmp_path.glob('*/best.pth')] == ['old']


def test_an_iteration_checkpoint_at_the_end_of_an_epoch_resumes_at_the_next(tmp_path):
    first = train(config(tmp_path, epochs=2, by_epoch=False))
    assert first.iter == 4
    cfg = config(tmp_path, epochs=3, by_epoch=False)
    resume_from(cfg)
    cfg.resume = True
    second = train(cfg)
    assert (second.epoch, second.iter) == (3, 6)


@pytest.mark.parametrize('length, epoch, said', [(100, 2, 0), (50, 1, 1)])
def test_an_epoch_of_another_length_is_not_counted(length, epoch, said):
    """MMEngine counts an epoch after the hooks. Here 100 iterations were one."""
    hook, warnings = ReseedHook(), []
    loop = SimpleNamespace(dataloader=range(length), _epoch=1)
    runner = SimpleNamespace(train_loop=loop, iter=100 if length == 50 else 200, epoch=1, logger=SimpleNamespace(
        warning=warnings.append))
    hook.after_load_checkpoint(runner, dict(meta=dict(epoch_length=100)))
    hook.before_train(runner)
    assert loop._epoch == epoch and len(warnings) == said
    checkpoint = dict(meta={})
    hook.before_save_checkpoint(runner, checkpoint)
    assert checkpoint['meta']['epoch_length'] == length
