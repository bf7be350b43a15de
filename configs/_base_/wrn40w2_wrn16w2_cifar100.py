# WRN-40-2 teaches WRN-16-2 on CIFAR-100. The teacher is to be trained first, with configs/wrn40w2_cifar100.py.
_base_ = ['../wrn16w2_cifar100.py']

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='{{ fileDirname }}/../wrn40w2_cifar100.py'),
    teacher_ckpt='work_dirs/wrn40w2_cifar100/epoch_240.pth')
