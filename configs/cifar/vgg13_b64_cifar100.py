# VGG-13 alone: the teacher of VGG-8.
_base_ = ['../_base_/datasets/cifar100_b64.py']

model = dict(backbone=dict(type='mmkd_plugin.CIFARVGG', depth=13), head=dict(in_channels=512))
