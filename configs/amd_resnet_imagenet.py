# AMD for classifiers, with KD: ResNet34 to ResNet18. The name stays; the recommended config is its base.
_base_ = './amd/imagenet/amd-kd_backbone_resnet34_resnet18_8xb32_in1k.py'
