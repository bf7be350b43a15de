# WRN-16-2 alone.
_base_ = ['../_base_/datasets/cifar100_b64.py']

model = dict(backbone=dict(type='mmrazor.WideResNet', depth=16, widen_factor=2), head=dict(in_channels=128))
