# AMD as the paper has it at every level of the pyramid; the same features as AT.
_base_ = './inherit_retinanet_r18-c16_clothing-300.py'

model = dict(
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=['neck'],
        base=dict(type='mmkd_plugin.AMDLoss'),
        connect=False))
