# WRN-16-3 teaches WRN-16-1 on CIFAR-10. Train the teacher first, with configs/cifar/wrn16-3_b128_cifar10.py.
_base_ = ['../../cifar/wrn16-1_b128_cifar10.py']

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='{{ fileDirname }}/../../cifar/wrn16-3_b128_cifar10.py'),
    teacher_ckpt='work_dirs/wrn16-3_b128_cifar10/epoch_200.pth')
