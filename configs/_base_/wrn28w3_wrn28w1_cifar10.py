# WRN-28-3 teaches WRN-28-1 on CIFAR-10. The teacher is to be trained first, with configs/wrn28w3_cifar10.py.
_base_ = ['../wrn28w1_cifar10.py']

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='{{ fileDirname }}/../wrn28w3_cifar10.py'),
    teacher_ckpt='work_dirs/wrn28w3_cifar10/epoch_200.pth')
