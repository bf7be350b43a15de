# Faster R-CNN R101 teaches Faster R-CNN R50 on COCO; the student's model, data and schedule are MMDetection's. SoKD
# trains its pairs for 180k iterations at learning rate 0.01, x0.1 at 120k and 160k. The pairs and the schedule are
# those of ReviewKD, with batch size 8, so this is 12 epochs. It corresponds to MMDetection's 1x schedule with batch
# size 16 and learning rate 0.02.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py']

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py'),
    teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r101_fpn_1x_coco/faster_rcnn_r101_fpn_1x_coco_20200130-f513f705.pth',  # noqa: E501
    inherit=['neck', 'rpn_head', 'roi_head'])
