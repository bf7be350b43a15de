# AMD with KD on images with a part of each other. The teacher sees the same, and the classification loss their mixed
# labels. The teacher is trained without; alpha is that of CutMix's authors.
_base_ = ['./amd_wrn16w3-wrn16w1_cifar10.py']

model = dict(architecture=dict(train_cfg=dict(augments=dict(type='CutMix', alpha=1.0))))
