# SoKD on FitNet at every level of the pyramid; the policy is searched in the first 50 of 300 epochs, as in the others
# a sixth of the training. The base's hooks stay: EMA, the switch of pipelines, the end of the distillation.
_base_ = ['./_base_/rtmdet_l_s_coco.py', './_base_/sokd_fitnet_neck.py']

model = dict(distiller=_base_.sokd.distiller)
optim_wrapper = _base_.sokd.optim_wrapper
custom_hooks = [*_base_.custom_hooks, dict(_base_.sokd.hook, search_epochs=50)]
