# SoKD on ReviewKD over all four stages: ReviewKD warms up for an epoch, the policy is searched in the first 5 of 100.
# DAM has four times its default weights, the best for ReviewKD when tuned on Fashion-MNIST; operations begin at 0.1, as
# the paper's 0.5 cost accuracy there (docs/results.md).
_base_ = ['./_base_/resnet34_resnet18_imagenet.py']

model = dict(
    loss_schedules={'loss_base*': dict(start_factor=0.0, end=1, by_epoch=True)},
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=['backbone.layer1', 'backbone.layer2', 'backbone.layer3', 'backbone.layer4'],
        base=dict(type='mmkd_plugin.ReviewKDLoss'),
        adapter=dict(mid_channels=512),
        dafa=dict(beta_init=0.1),
        dam=dict(anchor='attention', detect_loss_weight=4.0, area_loss_weight=12.0)))
optim_wrapper = dict(
    constructor='mmkd_plugin.PolicyOptimWrapperConstructor',
    policy=dict(type='Adam', lr=1e-3, betas=(0.5, 0.999)))
custom_hooks = [dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=5)]
