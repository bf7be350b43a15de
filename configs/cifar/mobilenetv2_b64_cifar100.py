# MobileNetV2 of half width alone; the benchmark trains it with a smaller learning rate.
_base_ = ['../_base_/datasets/cifar100_b64.py']

model = dict(backbone=dict(type='mmkd_plugin.CIFARMobileNetV2', widen_factor=0.5), head=dict(in_channels=1280))
optim_wrapper = dict(optimizer=dict(lr=0.01))
