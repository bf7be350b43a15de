# SoKD on PKD at every level of the pyramid. The policy is searched in the first 2 of 12 epochs.
_base_ = '../../_base_/pairs/faster-rcnn_r50_faster-rcnn_mobilenetv2_1x_coco.py'

model = dict(
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=['neck'],
        base='pkd',
        dam=dict(detect_loss_weight=0.3, area_loss_weight=0.9)))  # with the defaults, DAM outweighs the task
optim_wrapper = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor')
custom_hooks = [dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=2)]
