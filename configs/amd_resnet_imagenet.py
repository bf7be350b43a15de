# AMD for classifiers, with KD: ResNet34 to ResNet18. This name is stable; its base is the recommended config.
_base_ = './amd/imagenet/amd-kd_backbone_resnet34_resnet18_8xb32_in1k.py'
