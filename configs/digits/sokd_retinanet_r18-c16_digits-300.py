# SoKD on FitNet, with the first quarter of the epochs for the search.
_base_ = './fitnet_retinanet_r18-c16_digits-300.py'

model = dict(distiller=dict(dafa=dict(), dam=dict(anchor='boxes')))
optim_wrapper = dict(
    constructor='mmkd_plugin.PolicyOptimWrapperConstructor',
    policy=dict(type='Adam', lr=5e-3, betas=(0.5, 0.999)))
custom_hooks = [dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=6)]
