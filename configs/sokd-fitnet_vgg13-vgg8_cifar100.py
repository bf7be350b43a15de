# SoKD on FitNet at the last convolution of the third stage, VGG-13 to VGG-8, CIFAR-100.
_base_ = ['./_base_/vgg13_vgg8_cifar100.py', './_base_/sokd_fitnet_cifar100.py']

model = dict(distiller=dict(_base_.sokd.distiller, layers=[('backbone.features.4', 'backbone.features.7')]))
optim_wrapper = _base_.sokd.optim_wrapper
custom_hooks = [_base_.sokd.hook]
