# AMD with KD at all three stages, WRN-16-3 to WRN-16-1, CIFAR-10.
_base_ = ['./_base_/wrn16w3_wrn16w1_cifar10.py', './_base_/amd_kd.py']

model = dict(
    architecture=_base_.amd_kd.architecture,
    distiller=dict(
        _base_.amd_kd.distiller,
        layers=['backbone.layer1', 'backbone.layer2', 'backbone.layer3']))
