# The student alone, but starting from the teacher's linear classifier: what inheriting gives by itself.
_base_ = './resnet8_fashion_mnist-300.py'

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='{{ fileDirname }}/resnet20_fashion_mnist.py'),
    teacher_ckpt='work_dirs/resnet20_fashion_mnist/epoch_8.pth',
    inherit=['head'],
    distiller=dict(type='ConfigurableDistiller'))
