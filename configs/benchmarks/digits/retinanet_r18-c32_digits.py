# The teacher: RetinaNet with a ResNet18 of half the usual width, on all 1,600 training images. It is trained from
# scratch and therefore has GroupNorm in neck and head, as in MMDetection's configs/scratch.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../../_base_/datasets/digits_detection.py',
    '../../_base_/schedules/schedule_digits.py',
]
norm_cfg = dict(type='GN', num_groups=8, requires_grad=True)
model = dict(
    backbone=dict(
        depth=18, base_channels=32, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, num_outs=3, norm_cfg=norm_cfg),
    bbox_head=dict(
        num_classes=10, in_channels=64, feat_channels=64, stacked_convs=2, norm_cfg=norm_cfg,
        anchor_generator=dict(octave_base_scale=2, strides=[8, 16, 32])))
