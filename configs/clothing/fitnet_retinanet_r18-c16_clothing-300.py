# FitNet at every level of the pyramid.
_base_ = './inherit_retinanet_r18-c16_clothing-300.py'

model = dict(
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=['neck'],
        base=dict(type='L2Loss', normalize=False, div_element=True, loss_weight=0.5)))
