# SoKD on ReviewKD over all four stages, ResNet50 to MobileNetV2, ImageNet. ReviewKD warms up for an epoch; the policy
# is searched in the first 5 of 100 epochs. Weight and width are those of ReviewKD's authors for MobileNetV1, the
# closest published network.
_base_ = '../../_base_/pairs/resnet50_mobilenetv2_8xb32_in1k.py'

model = dict(
    loss_schedules={'loss_reviewkd*': dict(start_factor=0.0, end=1, by_epoch=True)},
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=[
            ('backbone.layer2', 'backbone.layer1'),
            ('backbone.layer3', 'backbone.layer2'),
            ('backbone.layer5', 'backbone.layer3'),
            ('backbone.layer7', 'backbone.layer4')
        ],
        base=dict(preset='reviewkd', connector=dict(mid_channels=256)),
        loss_weight=8.0,
        dam=dict(anchor='attention', adapter=dict(signed=False))))
optim_wrapper = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor')
custom_hooks = [dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=5)]
