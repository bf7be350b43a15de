import argparse
import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location('train', Path(__file__).parents[2] / 'tools/train.py')
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)


def load(config='configs/amd_retinanet_coco.py', **arguments):
    defaults = dict(config=config, work_dir=None, amp=False, auto_scale_lr=False, resume=None, cfg_options=None,
                    launcher='none', check_teacher=False, trust_checkpoint=False)
    return train.load_config(argparse.Namespace(**dict(defaults, **arguments)))


def test_work_dir_is_named_by_the_config():
    assert load().work_dir == 'work_dirs/amd_retinanet_coco'
    assert load(work_dir='x').work_dir == 'x'


@pytest.mark.parametrize('config', ['configs/amd_retinanet_coco.py', 'configs/sokd_retinanet_coco.py'])
def test_amp_changes_the_students_wrapper(config, monkeypatch):
    monkeypatch.setattr(train, 'is_cuda_available', lambda: True)
    cfg = load(config, amp=True)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper' and cfg.optim_wrapper.loss_scale == 'dynamic'
    monkeypatch.setattr(train, 'is_cuda_available', lambda: False)
    cfg = load(config, amp=True)
    assert cfg.optim_wrapper.type == 'mmkd_plugin.AutocastOptimWrapper' and 'loss_scale' not in cfg.optim_wrapper
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


def test_check_teacher_adds_its_hook():
    hooks = load(check_teacher=True).custom_hooks
    assert [hook.type for hook in hooks].count('mmkd_plugin.CheckTeacherHook') == 1
    with pytest.raises(ValueError, match='--check-teacher: .*no teacher'):
        load('configs/benchmarks/digits/retinanet_r18-c16_digits-300.py', check_teacher=True)


def test_trust_checkpoint_reaches_the_model():
    assert load(trust_checkpoint=True).model.trust_checkpoint is True
    assert 'trust_checkpoint' not in load().model
    alone = load('configs/benchmarks/digits/retinanet_r18-c16_digits-300.py', trust_checkpoint=True)
    assert 'trust_checkpoint' not in alone.model


def test_compile_is_answered_with_the_hook():
    with pytest.raises(ValueError, match='CompileStudentHook'):
        load(cfg_options={'compile': True})
    assert load('configs/cifar/vgg8_b64_cifar100.py', cfg_options={'compile': True}).compile is True


def test_the_learning_rate_is_scaled_with_the_images_of_an_optimizer_step(capsys):
    base = load().auto_scale_lr.base_batch_size
    options = {'optim_wrapper.accumulative_counts': 4}
    assert load(auto_scale_lr=True, cfg_options=options).auto_scale_lr.base_batch_size == base / 4
    assert 'the optimizer steps every 4 iterations' in capsys.readouterr().out
    assert load(cfg_options=options).auto_scale_lr.base_batch_size == base


def test_amp_knows_the_wrapper_by_its_path(monkeypatch):
    monkeypatch.setattr(train, 'is_cuda_available', lambda: False)
    wrapper = 'mmengine.optim.optimizer.optimizer_wrapper.OptimWrapper'
    assert 'Autocast' in load(amp=True, cfg_options={'optim_wrapper.type': wrapper}).optim_wrapper.type


def test_a_loss_schedule_by_epoch_needs_epochs(tmp_path):
    config = tmp_path / 'a.py'
    config.write_text(f"""_base_ = {str(Path('configs/amd_retinanet_coco.py').resolve())!r}
model = dict(loss_schedules={{'loss_amd*': dict(start_factor=0, end=1, by_epoch=True)}})
""")
    assert load(str(config)).model.loss_schedules
    config.write_text(config.read_text() + "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=9)\n")
    with pytest.raises(ValueError, match='model.loss_schedules.loss_amd.*train_cfg counts iterations'):
        load(str(config))


def test_checkpoints_and_learning_rates_by_epoch_need_epochs(tmp_path):
    config = tmp_path / 'a.py'
    parts = f"""_base_ = {str(Path('configs/amd_retinanet_coco.py').resolve())!r}
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=90000, val_interval=10000)
""", 'default_hooks = dict(checkpoint=dict(by_epoch=False, interval=10000))\n', """param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=BY_EPOCH, milestones=[60000, 80000])]
"""
    for text, message in ((parts[0], r'^default_hooks.checkpoint: counts epochs.*could not be resumed'),
                          (''.join(parts), r'^param_scheduler.1: MultiStepLR counts epochs.*never act')):
        config.write_text(text.replace('BY_EPOCH', 'True'))
        with pytest.raises(ValueError, match=message):
            load(str(config))
    config.write_text(''.join(parts).replace('BY_EPOCH', 'False'))
    assert load(str(config)).train_cfg.max_iters == 90000
    for extra, message in (('default_hooks = dict(checkpoint=dict(_delete_=True))', 'default_hooks.checkpoint: counts'),
                           ("default_hooks = dict(checkpoint=dict(_delete_=True, type='Mine', minutes=30))", None),
                           ("param_scheduler = dict(_delete_=True, student=[dict(type='MultiStepLR', milestones=[6])])",
                            'param_scheduler.student.0: MultiStepLR counts epochs')):
        config.write_text(parts[0] + (parts[1] if 'param' in extra else '') + extra + '\n' + (
            '' if 'param' in extra else parts[2].replace('BY_EPOCH', 'False')))
        if message is None:
            assert load(str(config)).default_hooks.checkpoint.minutes == 30
            continue
        with pytest.raises(ValueError, match=message):
            load(str(config))


def test_fields_that_are_none_are_as_good_as_missing():
    hooks = load(check_teacher=True, cfg_options={'custom_hooks': None}).custom_hooks
    assert [hook.type for hook in hooks] == ['mmkd_plugin.CheckTeacherHook']
    with pytest.raises(ValueError, match='base_batch_size'):
        load(auto_scale_lr=True, cfg_options={'auto_scale_lr': None})
    with pytest.raises(ValueError, match='config: cannot be trained, expected train_cfg, train_dataloader and optim'):
        load(cfg_options={'train_cfg': None})


def test_a_preprocessor_that_would_be_ignored_is_refused():
    with pytest.raises(ValueError, match='model.data_preprocessor: would be ignored.*model.architecture.data_prep'):
        load(cfg_options={'model.data_preprocessor': dict(mean=[1, 2, 3])})
    same = load().model.architecture.data_preprocessor
    assert load(cfg_options={'model.data_preprocessor': same}).model.data_preprocessor == same


def test_a_search_needs_a_hook_that_ends_it():
    sokd, options = 'configs/sokd_retinanet_coco.py', {'custom_hooks': [dict(type='EMAHook')]}
    with pytest.raises(ValueError, match="custom_hooks: has no hook that ends the search.*FreezePolicyHook"):
        load(sokd, cfg_options=options)
    assert load(sokd, cfg_options={**options, 'model.distiller.dafa': None})
    assert load(cfg_options=options)


def test_a_schedule_over_epochs_needs_an_end_in_a_loop_of_iterations(tmp_path):
    config = tmp_path / 'a.py'
    text = f"""_base_ = {str(Path('configs/amd_retinanet_coco.py').resolve())!r}
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=1000)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=10000))
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True{{}})
"""
    config.write_text(text.format(''))
    with pytest.raises(ValueError, match='param_scheduler.0: CosineAnnealingLR has no end'):
        load(str(config))
    config.write_text(text.format(', end=12'))
    assert load(str(config)).param_scheduler.end == 12


@pytest.mark.parametrize('options, field', [
    ({'model.type': 'TeacherStudentDistill'}, 'model.type'), ({'model.distiller.type': 'AMDDistiller'}, 'model.dist'),
    ({'custom_hooks': [dict(type='CheckTeacherHook')]}, 'custom_hooks.type')])
def test_types_of_this_package_need_their_scope(options, field):
    with pytest.raises(ValueError, match=f"^{field}.*is a type of this package. Write 'mmkd_plugin."):
        load(cfg_options=options)
