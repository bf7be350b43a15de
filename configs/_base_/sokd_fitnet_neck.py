# SoKD on FitNet at every level of the pyramid, in three parts for the three fields that they belong to. Operations
# begin with a probability of 0.1 instead of the paper's 0.5, at which they cost accuracy on the digits.
sokd = dict(
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=['neck'],
        base=dict(type='L2Loss', normalize=False, div_element=True, loss_weight=0.5),
        dafa=dict(beta_init=0.1),
        dam=dict(anchor='boxes')),
    optim_wrapper=dict(
        constructor='mmkd_plugin.PolicyOptimWrapperConstructor',
        policy=dict(type='Adam', lr=1e-3, betas=(0.5, 0.999))),
    hook=dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=2))
