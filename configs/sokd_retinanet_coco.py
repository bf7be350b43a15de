# SoKD on FitNet at every level of the pyramid; the policy is searched in the first 2 of 12 epochs.
_base_ = ['./_base_/retinanet_r101_r50_coco.py']

model = dict(
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=['neck'],
        base=dict(type='L2Loss', normalize=False, div_element=True, loss_weight=0.5),
        dafa=dict(),
        dam=dict(anchor='boxes')))
optim_wrapper = dict(
    constructor='mmkd_plugin.PolicyOptimWrapperConstructor',
    policy=dict(type='Adam', lr=1e-3, betas=(0.5, 0.999)))
custom_hooks = [dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=2)]
