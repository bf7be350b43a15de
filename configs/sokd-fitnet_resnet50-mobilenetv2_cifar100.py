# SoKD on FitNet at the teacher's third stage, ResNet50 to MobileNetV2, CIFAR-100. The student's layer3 has its stride.
_base_ = ['./_base_/resnet50_mobilenetv2_cifar100.py', './_base_/sokd_fitnet_cifar100.py']

model = dict(distiller=dict(_base_.sokd.distiller, layers=['backbone.layer3']))
optim_wrapper = _base_.sokd.optim_wrapper
custom_hooks = [_base_.sokd.hook]
