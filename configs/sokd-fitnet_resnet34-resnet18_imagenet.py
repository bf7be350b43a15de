# SoKD on FitNet at the third stage, ResNet34 to ResNet18, ImageNet.
_base_ = ['./_base_/resnet34_resnet18_imagenet.py', './_base_/sokd_fitnet_imagenet.py']

model = dict(distiller=dict(_base_.sokd.distiller, layers=['backbone.layer3']))
optim_wrapper = _base_.sokd.optim_wrapper
custom_hooks = [_base_.sokd.hook]
