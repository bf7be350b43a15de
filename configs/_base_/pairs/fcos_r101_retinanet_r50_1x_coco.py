# FCOS R101 teaches RetinaNet R50 on COCO; the student's model, data and schedule are MMDetection's. The teacher is
# caffe-style (BGR, no division by the standard deviation) and gets every batch in that form. Nothing is inherited,
# because the heads have different tasks and the necks serve them.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='mmdet::fcos/fcos_r101-caffe_fpn_gn-head-1x_coco.py'),
    teacher_ckpt='https://download.openmmlab.com/mmdetection/v2.0/fcos/fcos_r101_caffe_fpn_gn-head_1x_coco/fcos_r101_caffe_fpn_gn-head_1x_coco-0e37b982.pth')  # noqa: E501
