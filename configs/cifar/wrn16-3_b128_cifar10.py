# WRN-16-3 alone: the teacher of WRN-16-1.
_base_ = ['../_base_/datasets/cifar10_b128.py']

model = dict(backbone=dict(type='mmrazor.WideResNet', depth=16, widen_factor=3), head=dict(in_channels=192))
