# The teacher: ResNet-20 of half the usual width, 50,000 training images.
_base_ = ['../_base_/datasets/fashion_mnist.py', '../_base_/schedules/schedule_fashion.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmkd_plugin.CIFARResNet', depth=20, stem_channels=8, base_channels=8, in_channels=1),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=32,
              loss=dict(type='CrossEntropyLoss', loss_weight=1.0)))
train_dataloader = dict(batch_size=125)
train_cfg = dict(max_epochs=8, val_interval=4)
