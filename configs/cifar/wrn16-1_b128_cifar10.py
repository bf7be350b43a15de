# WRN-16-1 alone.
_base_ = ['../_base_/datasets/cifar10_b128.py']

model = dict(backbone=dict(type='mmrazor.WideResNet', depth=16, widen_factor=1), head=dict(in_channels=64))
