# The student alone, but starting from the teacher's head and FPN convolutions: what inheriting gives by itself.
_base_ = './retinanet_r18-c16_digits-300.py'

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='{{ fileDirname }}/retinanet_r18-c32_digits.py'),
    teacher_ckpt='work_dirs/retinanet_r18-c32_digits/epoch_7.pth',
    inherit=['neck.fpn_convs', 'bbox_head'],
    distiller=dict(type='ConfigurableDistiller'))
