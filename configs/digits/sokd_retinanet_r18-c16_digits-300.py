# SoKD on FitNet, with the first quarter of the epochs for the search. That is too short to unlearn operations that
# harm, and most do: it starts from applying each with probability 0.1, not the paper's 0.5.
_base_ = './dam_retinanet_r18-c16_digits-300.py'

model = dict(distiller=dict(dafa=dict(beta_init=0.1)))
optim_wrapper = dict(
    constructor='mmkd_plugin.PolicyOptimWrapperConstructor',
    policy=dict(type='Adam', lr=1e-2, betas=(0.5, 0.999)))
custom_hooks = [
    dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=6),
    dict(type='mmkd_plugin.DistillVisualizationHook', interval=76),
]
