# AT at every level of the pyramid.
_base_ = './inherit_retinanet_r18-c16_clothing-300.py'

model = dict(
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=['neck'],
        base=dict(type='ATLoss', loss_weight=100.0),
        connect=False))
