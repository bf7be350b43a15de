# AMD global + local, with KD, ResNet34 to ResNet18, ImageNet.
_base_ = ['./amd_resnet_imagenet.py']

model = dict(distiller=dict(amd=dict(local_grid=2)))
