# SoKD on FitNet at the third block, VGG-13 to VGG-8, CIFAR-100. FitNet's weight is that of CRD's benchmark (arXiv
# 1910.10699), and the layer is that of the only known code of SoKD. The policy is searched in the first 20 of 240
# epochs.
_base_ = '../../_base_/pairs/vgg13_vgg8_b64_cifar100.py'

model = dict(
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=[('backbone.features.4', 'backbone.features.7')],
        base='fitnet',
        loss_weight=100.0,
        dam=dict(anchor='attention', adapter=dict(signed=False))))  # the layer ends in a ReLU
optim_wrapper = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor')
custom_hooks = [dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=20)]
