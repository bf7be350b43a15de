# CWD at every level of the pyramid.
_base_ = './inherit_retinanet_r18-c16_clothing-300.py'

model = dict(
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=['neck'],
        base=dict(type='ChannelWiseDivergence', tau=1, loss_weight=10.0)))
