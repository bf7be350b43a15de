# The student: the teacher's detector with a quarter-width ResNet18. It has labels for 60 of the 205 training images
# only, so that the teacher knows more than these labels.
_base_ = './retinanet_r18-c32_bccd.py'
model = dict(
    backbone=dict(base_channels=16),
    neck=dict(in_channels=[16, 32, 64, 128]))
train_dataloader = dict(dataset=dict(indices=60))
train_cfg = dict(max_epochs=60)
