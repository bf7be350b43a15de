# SoKD on FitNet at the teacher's layer2, ResNet50 to MobileNetV2, CIFAR-100. FitNet's weight is that of CRD's benchmark
# (arXiv 1910.10699), and the layer is that of the only known code of SoKD. The policy is searched in the first 20 of
# 240 epochs.
_base_ = '../../_base_/pairs/resnet50_mobilenetv2_b64_cifar100.py'

model = dict(
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=[('backbone.layer2', 'backbone.layer2')],
        base='fitnet',
        loss_weight=100.0,
        dam=dict(anchor='attention', adapter=dict(signed=False))))
optim_wrapper = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor')
custom_hooks = [dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=20)]
