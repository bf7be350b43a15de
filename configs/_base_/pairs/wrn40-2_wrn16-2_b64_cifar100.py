# WRN-40-2 teaches WRN-16-2 on CIFAR-100. Train the teacher first, with configs/cifar/wrn40-2_b64_cifar100.py.
_base_ = ['../../cifar/wrn16-2_b64_cifar100.py']

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='{{ fileDirname }}/../../cifar/wrn40-2_b64_cifar100.py'),
    teacher_ckpt='work_dirs/wrn40-2_b64_cifar100/epoch_240.pth')
