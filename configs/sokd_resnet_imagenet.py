# SoKD for classifiers, on ReviewKD: ResNet34 to ResNet18. This name is stable; its base is the recommended config.
_base_ = './sokd/imagenet/sokd-reviewkd_backbone_resnet34_resnet18_8xb32_in1k.py'
