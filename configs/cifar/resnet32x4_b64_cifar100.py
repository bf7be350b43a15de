# ResNet-32x4 alone: the teacher of ResNet-8x4.
_base_ = ['../_base_/datasets/cifar100_b64.py']

model = dict(
    backbone=dict(type='mmkd_plugin.CIFARResNet', depth=32, stem_channels=32, base_channels=64),
    head=dict(in_channels=256))
