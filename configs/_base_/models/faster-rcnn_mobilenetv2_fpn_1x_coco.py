# MMDetection has no Faster R-CNN with MobileNetV2. This is its R50 config with the last block of each stride, as in
# ReviewKD (arXiv 2104.09044). As in the R50 config, batch norm does not update its statistics. As in ReviewKD, no stage
# is frozen.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        out_indices=(1, 2, 4, 6),
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://mmdet/mobilenet_v2')),
    neck=dict(in_channels=[24, 32, 96, 320]))
find_unused_parameters = True  # the backbone's last convolution feeds only a classifier
