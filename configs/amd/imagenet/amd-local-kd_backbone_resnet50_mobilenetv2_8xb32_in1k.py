# AMD global + local, with KD, ResNet50 to MobileNetV2, ImageNet.
_base_ = './amd-kd_backbone_resnet50_mobilenetv2_8xb32_in1k.py'

model = dict(distiller=dict(amd=dict(local_grid=2)))
