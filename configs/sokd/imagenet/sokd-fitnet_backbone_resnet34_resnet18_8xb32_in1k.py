# SoKD on FitNet at the teacher's layer2, ResNet34 to ResNet18, ImageNet. The weight is that of CRD's benchmark (arXiv
# 1910.10699) for CIFAR-100; none is published for ImageNet.
_base_ = '../../_base_/pairs/resnet34_resnet18_8xb32_in1k.py'

model = dict(
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=['backbone.layer2'],
        base='fitnet',
        loss_weight=100.0,
        dam=dict(anchor='attention', adapter=dict(signed=False))))
optim_wrapper = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor')
custom_hooks = [dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=5)]
