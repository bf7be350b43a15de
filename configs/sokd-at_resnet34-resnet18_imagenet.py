# SoKD on AT at all stages, ResNet34 to ResNet18, ImageNet. AT's weight is CRD's benchmark's for CIFAR-100.
_base_ = ['./sokd-fitnet_resnet34-resnet18_imagenet.py']

model = dict(
    distiller=dict(
        layers=['backbone.layer1', 'backbone.layer2', 'backbone.layer3', 'backbone.layer4'],
        base=dict(_delete_=True, type='ATLoss', loss_weight=1000.0),
        connect=False))
