# ResNet-8x4 alone.
_base_ = ['../_base_/datasets/cifar100_b64.py']

model = dict(
    backbone=dict(type='mmkd_plugin.CIFARResNet', depth=8, stem_channels=32, base_channels=64),
    head=dict(in_channels=256))
