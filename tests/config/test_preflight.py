import re

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmpretrain.datasets import CIFAR10

from mmkd_plugin.config.preflight import missing_inputs


def config(tmp_path, **model):
    for name in ('train.json', 'val.json', 'teacher.pth'):
        (tmp_path / name).write_text('{}')
    torch.save({'weight': torch.zeros(1)}, tmp_path / 'teacher.pth')
    (tmp_path / 'train').mkdir()
    dataset = dict(data_root=str(tmp_path), ann_file='train.json', data_prefix=dict(img='train/'))
    return Config(dict(train_dataloader=dict(dataset=dataset), val_dataloader=dict(dataset=dict(dataset)),
                       val_evaluator=dict(ann_file=f'{tmp_path}/val.json'), model=ConfigDict(model)))


def test_nothing_is_missing(tmp_path):
    assert missing_inputs(config(tmp_path, architecture=dict(type='X'), teacher_ckpt=f'{tmp_path}/teacher.pth')) == []


@pytest.mark.parametrize('change, option', [
    (lambda cfg: cfg.train_dataloader.dataset.update(ann_file='no.json'), 'train_dataloader.dataset.ann_file'),
    (lambda cfg: cfg.train_dataloader.dataset.update(data_root='no/'), 'train_dataloader.dataset.data_root'),
    (lambda cfg: cfg.train_dataloader.dataset.update(data_prefix=dict(img='no/')),
     'train_dataloader.dataset.data_prefix.img'),
    (lambda cfg: cfg.train_dataloader.update(dataset=dict(type='RepeatDataset', dataset=dict(data_root='no/'))),
     'train_dataloader.dataset.dataset.data_root'),
    (lambda cfg: cfg.train_dataloader.update(dataset=dict(type='ConcatDataset', datasets=[dict(data_root='no/')])),
     'train_dataloader.dataset.datasets.0.data_root'),
    (lambda cfg: cfg.val_evaluator.update(ann_file='no.json'), 'val_evaluator.ann_file'),
    (lambda cfg: cfg.model.update(teacher_ckpt='no.pth'), 'model.teacher_ckpt'),
    (lambda cfg: cfg.model.update(student_ckpt='no.pth'), 'model.student_ckpt'),
    (lambda cfg: cfg.update(load_from='no.pth'), 'load_from'),
    (lambda cfg: cfg.model.update(architecture=dict(backbone=dict(init_cfg=dict(type='Pretrained',
                                                                                checkpoint='no.pth')))),
     'model.architecture.backbone.init_cfg.checkpoint'),
    (lambda cfg: cfg.model.update(architecture=dict(backbone=dict(init_cfg=dict(checkpoint='no.pth')))),  # PVT's way
     'model.architecture.backbone.init_cfg.checkpoint'),
    (lambda cfg: cfg.model.update(architecture=dict(backbone=dict(init_cfg=[dict(type='Kaiming'), dict(
        type='Normal', override=dict(type='Pretrained', name='x', checkpoint='no.pth'))]))),
     'model.architecture.backbone.init_cfg.1.override.checkpoint'),
    (lambda cfg: cfg.model.update(architecture=dict(backbone=dict(pretrained='no.pth'))),
     'model.architecture.backbone.pretrained'),
    (lambda cfg: setattr(cfg, 'model', ConfigDict(type='X', backbone=dict(pretrained='no.pth'))),
     'model.backbone.pretrained'),
    (lambda cfg: (cfg.model.pop('teacher_ckpt'), cfg.model.update(
        teacher=dict(init_cfg=dict(checkpoint='no.pth')), allow_random_teacher=True)),
     'model.teacher.init_cfg.checkpoint'),
])
def test_each_missing_thing_is_one_sentence_with_its_option(tmp_path, change, option):
    cfg = config(tmp_path, architecture=dict(type='X'), teacher_ckpt=f'{tmp_path}/teacher.pth')
    change(cfg)
    sentence, = missing_inputs(cfg)
    assert sentence.startswith(f'{option} not found: looked for ')
    assert sentence.endswith(f'supply it with --cfg-options {option}=PATH')


@pytest.mark.parametrize('name', ['CIFAR10', 'mmpretrain.CIFAR10', CIFAR10])
def test_a_data_set_that_downloads_itself_is_not_missing(tmp_path, name):
    cfg = config(tmp_path, architecture=dict(type='X'), teacher_ckpt=f'{tmp_path}/teacher.pth')
    cfg._cfg_dict['default_scope'] = 'mmpretrain'  # a class cannot be set in a Config
    cfg._cfg_dict['train_dataloader'] = ConfigDict(dataset=dict(type=name, data_root='no/'))
    assert missing_inputs(cfg) == []
    cfg.train_dataloader.dataset.download = False
    sentence, = missing_inputs(cfg)
    assert sentence.startswith('train_dataloader.dataset.data_root not found: ')


def test_data_in_other_storages_are_not_missing(tmp_path):
    cfg = config(tmp_path, architecture=dict(type='X'), teacher_ckpt=f'{tmp_path}/teacher.pth')
    cfg.train_dataloader.dataset = dict(data_root='s3://bucket/coco/', ann_file='train.json', backend_args=None)
    cfg.val_dataloader.dataset = dict(ann_file='s3://bucket/coco/val.json', data_prefix=dict(img='s3://bucket/val/'))
    cfg.val_evaluator.ann_file = 's3://bucket/coco/val.json'
    assert missing_inputs(cfg) == []


@pytest.mark.parametrize('dataset, message', [
    (dict(ann_file=['a.json', 'b.json']), 'train_dataloader.dataset.ann_file must be one path, got 2. .*ConcatDataset'),
    ([dict(type='CocoDataset')], 'train_dataloader.dataset must be a dict, got list. .*ConcatDataset')])
def test_data_sets_of_earlier_versions(tmp_path, dataset, message):
    cfg = config(tmp_path, architecture=dict(type='X'), teacher_ckpt=f'{tmp_path}/teacher.pth')
    cfg.train_dataloader.dataset = dataset
    sentence, = missing_inputs(cfg)
    assert re.match(message, sentence)


@pytest.mark.parametrize('model', [dict(architecture='my_small.py', teacher_ckpt=None),
                                   dict(architecture=dict(type='X'), teacher='my_big.py', allow_random_teacher=True)])
def test_what_is_no_model_is_for_the_build_to_say(tmp_path, model):
    assert missing_inputs(config(tmp_path, **model)) == []


def test_student_ckpt_makes_the_backbones_weights_unneeded(tmp_path):
    backbone = dict(init_cfg=dict(type='Pretrained', checkpoint='no.pth'))
    assert missing_inputs(config(tmp_path, architecture=dict(backbone=backbone),
                                 student_ckpt=f'{tmp_path}/teacher.pth')) == []


def test_a_name_of_a_hub_is_no_file(tmp_path):
    assert missing_inputs(config(tmp_path, architecture=dict(
        a=dict(pretrained='google/vit'), b=dict(pretrained=True), c=dict(pretrained=None)))) == []


def test_weights_elsewhere_are_not_files(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.save({}, tmp_path / 'w.pth')
    cfg = config(tmp_path, architecture=dict(type='X'), teacher_ckpt='~/w.pth')
    assert missing_inputs(cfg) == []
    cfg.model.teacher_ckpt = '~backup.pth'  # no user has this name
    assert missing_inputs(cfg)[0].startswith('model.teacher_ckpt not found')
    cfg.model.teacher_ckpt = 's3://bucket/w.pth'
    sentence, = missing_inputs(cfg)
    assert sentence.startswith('model.teacher_ckpt: ') and 'only MMEngine\'s own loader' in sentence


def test_how_to_make_the_data_is_said(tmp_path):
    cfg = config(tmp_path, architecture=dict(type='X'))
    cfg.val_evaluator.ann_file = 'no.json'
    cfg.data_command = 'python tools/dataset_converters/make_digits.py'
    assert missing_inputs(cfg)[-1] == 'To make this data: python tools/dataset_converters/make_digits.py'
