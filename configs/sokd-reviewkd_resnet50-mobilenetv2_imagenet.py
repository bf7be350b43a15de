# SoKD on ReviewKD over all four stages, which warms up for an epoch, ResNet50 to MobileNetV2, ImageNet. Its weight and
# width are those of ReviewKD's authors for MobileNetV1, the nearest published.
_base_ = ['./sokd-fitnet_resnet50-mobilenetv2_imagenet.py']

model = dict(
    loss_schedules={'loss_base*': dict(start_factor=0.0, end=1, by_epoch=True)},
    distiller=dict(
        layers=[
            ('backbone.layer2', 'backbone.layer1'),
            ('backbone.layer3', 'backbone.layer2'),
            ('backbone.layer5', 'backbone.layer3'),
            ('backbone.layer7', 'backbone.layer4')
        ],
        base=dict(_delete_=True, type='mmkd_plugin.ReviewKDLoss', loss_weight=8.0),
        adapter=dict(mid_channels=256)))
