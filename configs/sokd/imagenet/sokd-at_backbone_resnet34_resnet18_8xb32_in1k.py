# SoKD on AT at all stages, ResNet34 to ResNet18, ImageNet. AT's weight is that of CRD's benchmark for CIFAR-100.
_base_ = '../../_base_/pairs/resnet34_resnet18_8xb32_in1k.py'

model = dict(
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=['backbone.layer1', 'backbone.layer2', 'backbone.layer3', 'backbone.layer4'],
        base='at',
        dam=dict(anchor='attention', adapter=dict(signed=False))))
optim_wrapper = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor')
custom_hooks = [dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=5)]
