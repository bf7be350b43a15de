# CIFAR-10 with the recipe of AMD's authors on one GPU; the rest is MMPretrain's.
_base_ = [
    'mmpretrain::_base_/datasets/cifar10_bs16.py', 'mmpretrain::_base_/schedules/cifar10_bs128.py',
    'mmpretrain::_base_/default_runtime.py'
]

model = dict(
    type='ImageClassifier',
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, loss=dict(type='CrossEntropyLoss', loss_weight=1.0)))
train_dataloader = dict(batch_size=128)
param_scheduler = dict(milestones=[40, 80, 120, 160], gamma=0.2)
