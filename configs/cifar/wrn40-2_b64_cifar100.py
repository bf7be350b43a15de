# WRN-40-2 alone: the teacher of WRN-16-2.
_base_ = ['../_base_/datasets/cifar100_b64.py']

model = dict(backbone=dict(type='mmrazor.WideResNet', depth=40, widen_factor=2), head=dict(in_channels=128))
