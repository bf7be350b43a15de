# AMD, scale-free, global + local, at every level of the pyramid, with the inherited start.
_base_ = './inherit_retinanet_r18-c32_retinanet_r18-c16_digits-300.py'

model = dict(distiller=dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=dict(scale_free=True, local_grid=2)))
