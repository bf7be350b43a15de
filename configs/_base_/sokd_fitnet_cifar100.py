# SoKD on FitNet at the stage that the config names; the policy is searched in the first 20 of 240 epochs.
# FitNet's weight is that of CRD's benchmark (arXiv 1910.10699). DAM's two terms keep their defaults: at 1000, the one
# weight known for them, ours diverged in 5 steps.
sokd = dict(
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        base=dict(type='L2Loss', normalize=False, div_element=True, loss_weight=100.0),
        dafa=dict(),
        dam=dict(anchor='attention')),
    optim_wrapper=dict(
        constructor='mmkd_plugin.PolicyOptimWrapperConstructor',
        policy=dict(type='Adam', lr=1e-3, betas=(0.5, 0.999))),
    hook=dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=20))
