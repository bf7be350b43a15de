# WRN-16-3 teaches WRN-16-1 on CIFAR-10. The teacher is to be trained first, with configs/wrn16w3_cifar10.py.
_base_ = ['../wrn16w1_cifar10.py']

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='{{ fileDirname }}/../wrn16w3_cifar10.py'),
    teacher_ckpt='work_dirs/wrn16w3_cifar10/epoch_200.pth')
