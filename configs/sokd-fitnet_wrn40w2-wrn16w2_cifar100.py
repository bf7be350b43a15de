# SoKD on FitNet at the third stage, WRN-40-2 to WRN-16-2, CIFAR-100.
# Read after normalisation and ReLU: what the last block puts out has no fixed scale, and large values make DAM diverge.
_base_ = ['./_base_/wrn40w2_wrn16w2_cifar100.py', './_base_/sokd_fitnet_cifar100.py']

model = dict(distiller=dict(_base_.sokd.distiller, layers=['backbone.relu']))
optim_wrapper = _base_.sokd.optim_wrapper
custom_hooks = [_base_.sokd.hook]
