# SoKD on FitNet at the teacher's third stage, ResNet50 to MobileNetV2, ImageNet.
_base_ = ['./_base_/resnet50_mobilenetv2_imagenet.py', './_base_/sokd_fitnet_imagenet.py']

model = dict(distiller=dict(_base_.sokd.distiller, layers=[('backbone.layer5', 'backbone.layer3')]))
optim_wrapper = _base_.sokd.optim_wrapper
custom_hooks = [_base_.sokd.hook]
