# AT from ResNet-20's last two stages to those of RepVGG that have their strides.
_base_ = './kd_repvgg_fashion_mnist-300.py'

model = dict(
    distiller=dict(
        _delete_=True,
        type='mmkd_plugin.SoKDDistiller',
        layers=[('backbone.stage_2', 'backbone.layer2'), ('backbone.stage_4', 'backbone.layer3')],
        base=dict(type='ATLoss', loss_weight=100.0),
        connect=False))
