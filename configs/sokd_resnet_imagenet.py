# SoKD for classifiers, on ReviewKD: ResNet34 to ResNet18. The name stays; the recommended config is its base.
_base_ = './sokd/imagenet/sokd-reviewkd_backbone_resnet34_resnet18_8xb32_in1k.py'
