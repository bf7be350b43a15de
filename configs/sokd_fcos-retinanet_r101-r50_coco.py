# SoKD on FitNet at every level of the pyramid; the policy is searched in the first 2 of 12 epochs.
_base_ = ['./_base_/fcos-retinanet_r101_r50_coco.py', './_base_/sokd_fitnet_neck.py']

model = dict(distiller=_base_.sokd.distiller)
optim_wrapper = _base_.sokd.optim_wrapper
custom_hooks = [_base_.sokd.hook]
