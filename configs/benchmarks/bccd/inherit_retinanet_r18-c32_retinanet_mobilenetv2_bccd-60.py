# MobileNetV2 with the teacher's head and FPN convolutions. Experiments with MobileNetV2 start from this config.
_base_ = './retinanet_mobilenetv2_bccd-60.py'

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='{{ fileDirname }}/retinanet_r18-c32_bccd.py'),
    teacher_ckpt='work_dirs/gain/teachers/retinanet_r18-c32_bccd/epoch_24.pth',
    inherit=['neck.fpn_convs', 'bbox_head'],
    distiller=dict(type='ConfigurableDistiller'))
