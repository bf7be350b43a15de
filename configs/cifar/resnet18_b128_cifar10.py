# MMPretrain's ResNet18 for 32 x 32 images alone.
_base_ = ['../_base_/datasets/cifar10_b128.py']

model = dict(backbone=dict(type='ResNet_CIFAR', depth=18), head=dict(in_channels=512))
