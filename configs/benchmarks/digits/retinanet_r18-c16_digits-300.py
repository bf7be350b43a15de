# The student: the teacher's detector with a quarter-width ResNet18. It has labels for the first 300 of the 1,600
# training images only, so that the teacher knows more than these labels.
_base_ = './retinanet_r18-c32_digits.py'
model = dict(
    backbone=dict(base_channels=16),
    neck=dict(in_channels=[16, 32, 64, 128]))
train_cfg = dict(max_epochs=12)
train_dataloader = dict(dataset=dict(indices=300))
