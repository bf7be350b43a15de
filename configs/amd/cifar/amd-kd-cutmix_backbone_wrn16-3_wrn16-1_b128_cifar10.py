# AMD with KD on images with a part of each other. The teacher sees the same, and the classification loss the mixed
# labels. The teacher is trained without; alpha is that of CutMix's authors.
_base_ = './amd-kd_backbone_wrn16-3_wrn16-1_b128_cifar10.py'

model = dict(architecture=dict(train_cfg=dict(augments=dict(type='CutMix', alpha=1.0))))
