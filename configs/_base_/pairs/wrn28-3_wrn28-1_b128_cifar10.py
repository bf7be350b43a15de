# WRN-28-3 teaches WRN-28-1 on CIFAR-10. Train the teacher first, with configs/cifar/wrn28-3_b128_cifar10.py.
_base_ = ['../../cifar/wrn28-1_b128_cifar10.py']

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='{{ fileDirname }}/../../cifar/wrn28-3_b128_cifar10.py'),
    teacher_ckpt='work_dirs/wrn28-3_b128_cifar10/epoch_200.pth')
