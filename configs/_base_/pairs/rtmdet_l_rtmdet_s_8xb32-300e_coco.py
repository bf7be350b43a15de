# RTMDet-l teaches RTMDet-s on COCO; the student's model, data and schedule are MMDetection's. Neck and head of the
# student have half the teacher's width, so nothing can be inherited. The student's weights are averaged (EMA). In the
# last epochs, without mosaic and mixup, it learns from the labels alone.
_base_ = ['mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py']

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py'),
    teacher_ckpt='https://download.openmmlab.com/mmdetection/v3.0/rtmdet/rtmdet_l_8xb32-300e_coco/rtmdet_l_8xb32-300e_coco_20220719_112030-5a0be7c4.pth')  # noqa: E501
custom_hooks = [
    *_base_.custom_hooks,  # EMA, and the pipeline switch
    dict(type='mmrazor.StopDistillHook', stop_epoch=_base_.max_epochs - _base_.stage2_num_epochs),
]
