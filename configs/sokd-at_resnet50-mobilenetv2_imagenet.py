# SoKD on AT at all stages, ResNet50 to MobileNetV2, ImageNet. AT's weight is CRD's benchmark's for CIFAR-100.
_base_ = ['./sokd-fitnet_resnet50-mobilenetv2_imagenet.py']

model = dict(
    distiller=dict(
        layers=[
            ('backbone.layer2', 'backbone.layer1'),
            ('backbone.layer3', 'backbone.layer2'),
            ('backbone.layer5', 'backbone.layer3'),
            ('backbone.layer7', 'backbone.layer4')
        ],
        base=dict(_delete_=True, type='ATLoss', loss_weight=1000.0),
        connect=False))
