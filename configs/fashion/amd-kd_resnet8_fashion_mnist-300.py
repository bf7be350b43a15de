# AMD with KD at all three stages, the paper's objective.
_base_ = ['./inherit_resnet8_fashion_mnist-300.py', '../_base_/amd_kd.py']

model = dict(
    inherit=[],
    architecture=_base_.amd_kd.architecture,
    distiller=dict(_base_.amd_kd.distiller, layers=['backbone.layer1', 'backbone.layer2', 'backbone.layer3']))
