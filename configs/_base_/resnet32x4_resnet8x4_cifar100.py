# ResNet-32x4 teaches ResNet-8x4 on CIFAR-100. The teacher is to be trained first, with configs/resnet32x4_cifar100.py.
_base_ = ['../resnet8x4_cifar100.py']

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='{{ fileDirname }}/../resnet32x4_cifar100.py'),
    teacher_ckpt='work_dirs/resnet32x4_cifar100/epoch_240.pth')
