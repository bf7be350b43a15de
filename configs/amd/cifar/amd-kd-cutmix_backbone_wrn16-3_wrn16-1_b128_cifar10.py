# AMD with KD and CutMix. The teacher gets the same images, and the classification loss gets the mixed labels. The
# teacher is trained without CutMix. alpha is that of CutMix's authors.
_base_ = './amd-kd_backbone_wrn16-3_wrn16-1_b128_cifar10.py'

model = dict(architecture=dict(train_cfg=dict(augments=dict(type='CutMix', alpha=1.0))))
