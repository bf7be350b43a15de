# CIFAR-100 with the recipe of CRD's benchmark (arXiv 1910.10699) on one GPU, which SoKD also uses; the rest is
# MMPretrain's.
_base_ = [
    'mmpretrain::_base_/datasets/cifar100_bs16.py', 'mmpretrain::_base_/schedules/cifar10_bs128.py',
    'mmpretrain::_base_/default_runtime.py'
]

model = dict(
    type='ImageClassifier',
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=100, loss=dict(type='CrossEntropyLoss', loss_weight=1.0)))
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(optimizer=dict(lr=0.05, weight_decay=5e-4))
param_scheduler = dict(milestones=[150, 180, 210])
train_cfg = dict(max_epochs=240)
auto_scale_lr = dict(base_batch_size=64)
