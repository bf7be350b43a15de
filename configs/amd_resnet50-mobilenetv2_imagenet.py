# AMD with KD at the last three stages, ResNet50 to MobileNetV2, ImageNet.
_base_ = ['./_base_/resnet50_mobilenetv2_imagenet.py', './_base_/amd_kd.py']

model = dict(
    architecture=_base_.amd_kd.architecture,
    distiller=dict(
        _base_.amd_kd.distiller,
        layers=[
            ('backbone.layer3', 'backbone.layer2'),
            ('backbone.layer5', 'backbone.layer3'),
            ('backbone.layer7', 'backbone.layer4')
        ]))
