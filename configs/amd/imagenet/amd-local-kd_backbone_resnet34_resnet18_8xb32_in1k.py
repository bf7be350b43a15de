# AMD global + local, with KD, ResNet34 to ResNet18, ImageNet.
_base_ = './amd-kd_backbone_resnet34_resnet18_8xb32_in1k.py'

model = dict(distiller=dict(amd=dict(local_grid=2)))
