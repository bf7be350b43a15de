# MMDetection has no Faster R-CNN on MobileNetV2; this is its R50's with the last block of each stride, as in ReviewKD
# (arXiv 2104.09044). As with the R50, batch norm keeps its statistics; no stage is frozen, as in ReviewKD.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        out_indices=(1, 2, 4, 6),
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://mmdet/mobilenet_v2')),
    neck=dict(in_channels=[24, 32, 96, 320]))
find_unused_parameters = True  # the backbone's last convolution, which feeds a classifier only
