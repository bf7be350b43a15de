# FitNet from ResNet-20's third stage to RepVGG's fourth, which has its stride.
_base_ = './kd_repvgg_fashion_mnist-300.py'

model = dict(
    distiller=dict(
        _delete_=True,
        type='mmkd_plugin.SoKDDistiller',
        layers=[('backbone.stage_4', 'backbone.layer3')],
        base=dict(type='L2Loss', normalize=False, div_element=True, loss_weight=1.0)))
