# The base of every experiment on CIFAR-10, which adds its own distiller (tools/benchmarks/gain_tasks.py). Without a
# distiller, the student trains alone, and the teacher has no effect.
_base_ = './resnet8_cifar10-5000.py'

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='{{ fileDirname }}/resnet20_cifar10.py'),
    teacher_ckpt='work_dirs/gain/teachers/resnet20_cifar10/epoch_20.pth',
    distiller=dict(type='ConfigurableDistiller'))
