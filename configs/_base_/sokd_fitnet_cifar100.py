# SoKD on FitNet at the stage that the config names; the policy is searched in the first 20 of 240 epochs.
# FitNet's weight is that of CRD's benchmark (arXiv 1910.10699). With 1000 for DAM's two terms, the one weight known for
# them, ours diverged in 5 steps: they have four times their defaults, the best for FitNet when tuned on Fashion-MNIST.
# Operations begin at 0.1, as the paper's 0.5 cost accuracy there (docs/results.md).
sokd = dict(
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        base=dict(type='L2Loss', normalize=False, div_element=True, loss_weight=100.0),
        dafa=dict(beta_init=0.1),
        dam=dict(anchor='attention', detect_loss_weight=4.0, area_loss_weight=12.0)),
    optim_wrapper=dict(
        constructor='mmkd_plugin.PolicyOptimWrapperConstructor',
        policy=dict(type='Adam', lr=1e-3, betas=(0.5, 0.999))),
    hook=dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=20))
