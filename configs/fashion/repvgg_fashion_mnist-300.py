# The student of another architecture: a RepVGG of four stages, without the teacher's residual blocks.
_base_ = './resnet8_fashion_mnist-300.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='RepVGG',
        arch=dict(
            num_blocks=[1, 1, 2, 1], width_factor=[0.25, 0.25, 0.25, 0.125], group_layer_map=None, se_cfg=None,
            stem_channels=16),
        in_channels=1,
        strides=(1, 2, 2, 1),
        out_indices=(3, )),
    head=dict(in_channels=64))
