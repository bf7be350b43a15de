# The teacher: ResNet-20 on maps of half the usual side, for the benchmark runs on CPUs; 50,000 training images.
_base_ = ['../_base_/datasets/fashion_mnist.py', '../_base_/schedules/schedule_fashion.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmkd_plugin.CIFARResNet', depth=20, strides=(2, 2, 2), in_channels=1),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=64,
              loss=dict(type='CrossEntropyLoss', loss_weight=1.0)))
train_dataloader = dict(batch_size=125)
train_cfg = dict(max_epochs=8, val_interval=4)
