# AMD without KD, ResNet50 to MobileNetV2, ImageNet. The classification loss keeps its weight of 1, which is our choice.
_base_ = '../../_base_/pairs/resnet50_mobilenetv2_8xb32_in1k.py'

model = dict(
    distiller=dict(
        type='mmkd_plugin.AMDDistiller',
        layers=[
            ('backbone.layer3', 'backbone.layer2'),
            ('backbone.layer5', 'backbone.layer3'),
            ('backbone.layer7', 'backbone.layer4')
        ],
        amd=dict(loss_weight=1000.0)))
