# SoKD on ReviewKD over all four stages, ResNet34 to ResNet18, ImageNet. ReviewKD warms up for an epoch; the policy is
# searched in the first 5 of 100 epochs.
_base_ = '../../_base_/pairs/resnet34_resnet18_8xb32_in1k.py'

model = dict(
    loss_schedules={'loss_reviewkd*': dict(start_factor=0.0, end=1, by_epoch=True)},
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=['backbone.layer1', 'backbone.layer2', 'backbone.layer3', 'backbone.layer4'],
        base=dict(preset='reviewkd', connector=dict(mid_channels=512)),
        dam=dict(anchor='attention', adapter=dict(signed=False))))
optim_wrapper = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor')
custom_hooks = [dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=5)]
