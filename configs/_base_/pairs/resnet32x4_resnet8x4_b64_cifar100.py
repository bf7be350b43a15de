# ResNet-32x4 teaches ResNet-8x4 on CIFAR-100. Train the teacher first, with configs/cifar/resnet32x4_b64_cifar100.py.
_base_ = ['../../cifar/resnet8x4_b64_cifar100.py']

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='{{ fileDirname }}/../../cifar/resnet32x4_b64_cifar100.py'),
    teacher_ckpt='work_dirs/resnet32x4_b64_cifar100/epoch_240.pth')
