# VGG-8 alone.
_base_ = ['../_base_/datasets/cifar100_b64.py']

model = dict(backbone=dict(type='mmkd_plugin.CIFARVGG', depth=8), head=dict(in_channels=512))
