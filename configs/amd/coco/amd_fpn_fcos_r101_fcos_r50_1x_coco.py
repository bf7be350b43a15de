# AMD, scale-free, global + local, at every level of the pyramid.
_base_ = '../../_base_/pairs/fcos_r101_fcos_r50_1x_coco.py'

model = dict(distiller=dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=dict(scale_free=True, local_grid=2)))
