# SoKD on FitNet at the stage that the config names; the policy is searched in the first 5 of 100 epochs.
# FitNet's weight is CIFAR-100's, from CRD's benchmark (arXiv 1910.10699); for ImageNet none is published.
# DAM has four times its default weights, the best for FitNet when tuned on Fashion-MNIST; operations begin at 0.1, as
# the paper's 0.5 cost accuracy there (docs/results.md).
sokd = dict(
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        base=dict(type='L2Loss', normalize=False, div_element=True, loss_weight=100.0),
        dafa=dict(beta_init=0.1),
        dam=dict(anchor='attention', detect_loss_weight=4.0, area_loss_weight=12.0)),
    optim_wrapper=dict(
        constructor='mmkd_plugin.PolicyOptimWrapperConstructor',
        policy=dict(type='Adam', lr=1e-3, betas=(0.5, 0.999))),
    hook=dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=5))
