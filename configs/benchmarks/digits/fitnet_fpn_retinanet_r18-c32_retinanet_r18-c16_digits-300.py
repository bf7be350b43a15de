# FitNet at every level of the pyramid: the base of SoKD alone.
_base_ = './inherit_retinanet_r18-c32_retinanet_r18-c16_digits-300.py'

model = dict(
    distiller=dict(type='mmkd_plugin.FeatureDistiller', layers=['neck'], base='fitnet', loss_weight=0.5))
