"""Small real models for the suite; a test that leaves something behind would change the next one."""
import os

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope, init_default_scope

import mmkd_plugin  # noqa: F401

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # deterministic matrix products on a GPU ask for it


def pytest_collection_modifyitems(items):
    """Begins with the longest, so that in the end no process works alone on them, and skips what needs a GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason='needs an NVIDIA GPU'))
    items.sort(key=lambda item: item.path.name != 'test_main_jobs.py')


@pytest.fixture(autouse=True)
def isolated():
    """Fixed seed, one default scope a test, and no iteration left from a Runner before."""
    torch.manual_seed(0)
    yield
    DefaultScope._instance_dict.clear()
    MessageHub._instance_dict.clear()


def retinanet(base_channels=8, fpn_channels=16, num_classes=3, levels=4, **preprocessor):
    """A RetinaNet of mmdet, small enough for a test."""
    return dict(
        type='mmdet.RetinaNet',
        data_preprocessor=dict(dict(type='mmdet.DetDataPreprocessor', mean=[123.675, 116.28, 103.53],
                                    std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_size_divisor=32),
                               **preprocessor),
        backbone=dict(type='mmdet.ResNet', depth=18, base_channels=base_channels, norm_eval=False),
        neck=dict(type='mmdet.FPN', in_channels=[base_channels * 2**i for i in range(4)], out_channels=fpn_channels,
                  start_level=1, add_extra_convs='on_input', num_outs=levels),
        bbox_head=dict(
            type='mmdet.RetinaHead', num_classes=num_classes, in_channels=fpn_channels, stacked_convs=1,
            feat_channels=fpn_channels,
            anchor_generator=dict(type='mmdet.AnchorGenerator', octave_base_scale=4, scales_per_octave=1,
                                  ratios=[1.0], strides=[8 * 2**i for i in range(levels)]),
            bbox_coder=dict(type='mmdet.DeltaXYWHBBoxCoder'),
            loss_cls=dict(type='mmdet.FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_bbox=dict(type='mmdet.L1Loss', loss_weight=1.0)),
        train_cfg=dict(assigner=dict(type='mmdet.MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
                       sampler=dict(type='mmdet.PseudoSampler'), allowed_border=-1, pos_weight=-1),
        test_cfg=dict(nms_pre=100, min_bbox_size=0, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5),
                      max_per_img=10))


def classifier(base_channels=8, num_classes=4, depth=18, **options):
    """A ResNet classifier of mmpretrain, small enough for a test."""
    return dict(
        type='mmpretrain.ImageClassifier',
        data_preprocessor=dict(type='mmpretrain.ClsDataPreprocessor', num_classes=num_classes,
                               mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
        backbone=dict(type='mmpretrain.ResNet', depth=depth, base_channels=base_channels, stem_channels=base_channels,
                      expansion=1),
        neck=dict(type='mmpretrain.GlobalAveragePooling'),
        head=dict(type='mmpretrain.LinearClsHead', num_classes=num_classes, in_channels=8 * base_channels,
                  loss=dict(type='mmpretrain.CrossEntropyLoss', loss_weight=1.0)), **options)


VIT = dict(type='mmpretrain.VisionTransformer', img_size=64, patch_size=16, out_type='cls_token', arch=dict(
    embed_dims=64, num_layers=2, num_heads=2, feedforward_channels=32))
CONVNEXT = dict(type='mmpretrain.ConvNeXt', arch=dict(depths=[1] * 4, channels=[8, 16, 32, 64]))


def derived():
    """By name: student, teacher, layers, size of the images, and how a loss derives its map from the layer's output."""
    return {
        'tokens': (dict(classifier(), backbone=VIT, neck=None), dict(classifier(), backbone=VIT, neck=None),
                   ['backbone.layers.0'], 64, lambda x: x[:, 1:].transpose(1, 2).unflatten(2, (4, 4))),
        'cropped': (classifier(), dict(classifier(), backbone=CONVNEXT, neck=None),
                    [('backbone.layer1', 'backbone.stages.0')], 50, lambda x: x[:, :, :12, :12])}


def detection_batch(size=64, samples=2, num_classes=3, random=False):
    """Images and samples with one to two objects, as a data loader gives them.

    They are the same in every call, except for the images if they are random.
    """
    from mmdet.testing import demo_mm_inputs
    packed = demo_mm_inputs(samples, image_shapes=[(3, size, size)] * samples, num_items=[2, 1] * (samples // 2),
                            num_classes=num_classes)
    if random:
        packed['inputs'] = [torch.randint_like(image, 256) for image in packed['inputs']]
    return packed


def classification_batch(size=64, samples=4, num_classes=4):
    from mmpretrain.structures import DataSample
    return dict(inputs=torch.randint(0, 256, (samples, 3, size, size), dtype=torch.uint8),
                data_samples=[DataSample().set_gt_label(i % num_classes) for i in range(samples)])


@pytest.fixture
def build():
    """Builds a model from a dict, in the scope of a library."""
    def build(model, scope='mmdet', seed=0):
        init_default_scope(scope)
        from mmengine.registry import MODELS
        torch.manual_seed(seed)
        return MODELS.build(Config(dict(model=model)).model)
    return build
