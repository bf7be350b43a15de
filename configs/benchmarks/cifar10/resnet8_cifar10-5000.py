# The student: ResNet-8, with labels for 5,000 of the 45,000 images only, 500 of each class.
_base_ = './resnet20_cifar10.py'
model = dict(backbone=dict(depth=8))
train_dataloader = dict(batch_size=64, dataset=dict(indices=5000))
auto_scale_lr = dict(base_batch_size=64)
train_cfg = dict(max_epochs=30, val_interval=30)
