# AMD with KD and mixup. The teacher gets the same images, and the classification loss gets the mixed labels. The
# teacher is trained without mixup. alpha is our choice.
_base_ = './amd-kd_backbone_wrn16-3_wrn16-1_b128_cifar10.py'

model = dict(architecture=dict(train_cfg=dict(augments=dict(type='Mixup', alpha=0.2))))
