# AMD at all three stages, as the paper has it but without KD; the same features as AT.
_base_ = './at_resnet8_fashion_mnist-300.py'

model = dict(distiller=dict(base=dict(_delete_=True, type='mmkd_plugin.AMDLoss', loss_weight=1000.0)))
