# The student alone, but it starts from the teacher's head and FPN convolutions. It shows the gain of the inherited
# start.
_base_ = './retinanet_r18-c16_digits-300.py'

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='{{ fileDirname }}/retinanet_r18-c32_digits.py'),
    teacher_ckpt='work_dirs/retinanet_r18-c32_digits/epoch_5.pth',
    inherit=['neck.fpn_convs', 'bbox_head'],
    distiller=dict(type='ConfigurableDistiller'))
