# SoKD on FitNet at the third stage, ResNet-32x4 to ResNet-8x4, CIFAR-100.
_base_ = ['./_base_/resnet32x4_resnet8x4_cifar100.py', './_base_/sokd_fitnet_cifar100.py']

model = dict(distiller=dict(_base_.sokd.distiller, layers=['backbone.layer3']))
optim_wrapper = _base_.sokd.optim_wrapper
custom_hooks = [_base_.sokd.hook]
