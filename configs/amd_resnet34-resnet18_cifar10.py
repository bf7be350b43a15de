# AMD with KD at the last three stages, ResNet34 to ResNet18, CIFAR-10.
_base_ = ['./_base_/resnet34_resnet18_cifar10.py', './_base_/amd_kd.py']

model = dict(
    architecture=_base_.amd_kd.architecture,
    distiller=dict(
        _base_.amd_kd.distiller,
        layers=['backbone.layer2', 'backbone.layer3', 'backbone.layer4']))
