# AMD global + local, with KD, ResNet50 to MobileNetV2, ImageNet.
_base_ = ['./amd_resnet50-mobilenetv2_imagenet.py']

model = dict(distiller=dict(amd=dict(local_grid=2)))
