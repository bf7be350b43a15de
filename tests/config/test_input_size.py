import pytest
from mmengine.config import Config
from mmengine.hub import get_config

from mmkd_plugin.config.input_size import fixed_input_size


@pytest.mark.parametrize('name, size', [
    ('mmpretrain::resnet/resnet18_8xb32_in1k.py', (224, 224)),
    ('mmpretrain::resnet/resnet18_8xb16_cifar10.py', (32, 32)),
    ('mmpretrain::swin_transformer/swin-base_16xb64_in1k-384px.py', (384, 384)),
    ('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', None),
    ('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', (640, 640)),
    ('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py', None),
])
def test_of_library_configs(name, size):
    assert fixed_input_size(get_config(name)) == size


@pytest.mark.parametrize('pipeline, size', [
    ([dict(type='Resize', scale=(300, 200), keep_ratio=False)], (200, 300)),  # a pipeline names the width first
    ([dict(type='Resize', scale=(300, 200), keep_ratio=True)], None),
    ([dict(type='RandomCrop', crop_size=(64, 32))], None),
    ([dict(type='mmpretrain.RandomCrop', crop_size=32, padding=4)], (32, 32)),
    ([dict(type='mmpretrain.RandomCrop', crop_size=(48, 32))], (48, 32)),  # MMPretrain's random crops, the height
    ([dict(type='mmpretrain.RandomResizedCrop', scale=(48, 32))], (48, 32)),
    ([dict(type='CenterCrop', crop_size=(48, 32))], (32, 48)),
    ([dict(type='CenterCrop', crop_size=32), dict(type='ResizeEdge', scale=64)], None),
    ([dict(type='Pad', size_divisor=32)], None),
    ([dict(type='LoadImageFromFile')], None),
])
def test_of_single_transforms(pipeline, size):
    dataset = dict(type='RepeatDataset', dataset=dict(type='CocoDataset', pipeline=pipeline))
    assert fixed_input_size(Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=dataset)))) == size


def test_without_training_data():
    assert fixed_input_size(Config(dict(model=dict()))) is None
