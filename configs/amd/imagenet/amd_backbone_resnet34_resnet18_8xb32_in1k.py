# AMD without KD, ResNet34 to ResNet18, ImageNet. The classification loss keeps its weight of 1, which is our choice.
_base_ = '../../_base_/pairs/resnet34_resnet18_8xb32_in1k.py'

model = dict(
    distiller=dict(
        type='mmkd_plugin.AMDDistiller',
        layers=['backbone.layer2', 'backbone.layer3', 'backbone.layer4'],
        amd=dict(loss_weight=1000.0)))
