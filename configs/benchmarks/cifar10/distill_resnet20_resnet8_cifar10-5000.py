# What every experiment on CIFAR-10 is with a distiller of its own (tools/benchmarks/gain_tasks.py); as it stands, the
# student alone beside a teacher that it does not listen to.
_base_ = './resnet8_cifar10-5000.py'

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='{{ fileDirname }}/resnet20_cifar10.py'),
    teacher_ckpt='work_dirs/gain/teachers/resnet20_cifar10/epoch_20.pth',
    distiller=dict(type='ConfigurableDistiller'))
