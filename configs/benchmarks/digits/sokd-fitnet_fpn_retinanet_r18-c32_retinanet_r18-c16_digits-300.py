# SoKD on FitNet. The policy is searched in the first quarter of the epochs. DAM has its default weights, with which the
# demo was measured. The configs for COCO have 0.3 times these weights.
_base_ = './fitnet_fpn_retinanet_r18-c32_retinanet_r18-c16_digits-300.py'

model = dict(distiller=dict(type='mmkd_plugin.SoKDDistiller'))
optim_wrapper = dict(
    constructor='mmkd_plugin.PolicyOptimWrapperConstructor',
    policy=dict(type='Adam', lr=1e-2, betas=(0.5, 0.999)))
custom_hooks = [
    dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=3),
    dict(type='mmkd_plugin.DistillVisualizationHook', interval=76),
]
