# SoKD on FitNet at every level of the pyramid. The policy is searched in the first 50 of 300 epochs. PKD needs necks of
# equal width, so the base is FitNet. The hooks of the base config stay: EMA, the pipeline switch and the end of the
# distillation.
_base_ = '../../_base_/pairs/rtmdet_l_rtmdet_s_8xb32-300e_coco.py'

model = dict(
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=['neck'],
        base='fitnet',
        dam=dict(detect_loss_weight=0.3, area_loss_weight=0.9)))  # with the defaults, DAM outweighs the task
optim_wrapper = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor')
custom_hooks = [*_base_.custom_hooks, dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=50)]
