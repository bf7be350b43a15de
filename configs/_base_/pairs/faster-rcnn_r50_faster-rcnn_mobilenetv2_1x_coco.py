# Faster R-CNN R50 teaches Faster R-CNN MobileNetV2 on COCO. The schedule is SoKD's: see
# faster-rcnn_r101_faster-rcnn_r50_1x_coco.py.
_base_ = ['../models/faster-rcnn_mobilenetv2_fpn_1x_coco.py']

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'),
    teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r50_fpn_1x_coco/faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth',  # noqa: E501
    inherit=['neck', 'rpn_head', 'roi_head'])  # in the neck, all but the lateral convolutions
