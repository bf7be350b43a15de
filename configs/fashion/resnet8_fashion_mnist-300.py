# The student: ResNet-8, with labels for the first 300 of the 50,000 training images only, so that the teacher knows
# something that the student's labels do not tell.
_base_ = './resnet20_fashion_mnist.py'
model = dict(backbone=dict(depth=8))
train_dataloader = dict(batch_size=25, dataset=dict(indices=300))
train_cfg = dict(max_epochs=60, val_interval=20)
