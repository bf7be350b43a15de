# FitNet at the third stage.
_base_ = './inherit_resnet8_fashion_mnist-300.py'

model = dict(
    inherit=[],
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=['backbone.layer3'],
        base=dict(type='L2Loss', normalize=False, div_element=True, loss_weight=1.0)))
