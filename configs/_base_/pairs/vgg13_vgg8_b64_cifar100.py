# VGG-13 teaches VGG-8 on CIFAR-100. Train the teacher first, with configs/cifar/vgg13_b64_cifar100.py.
_base_ = ['../../cifar/vgg8_b64_cifar100.py']

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='{{ fileDirname }}/../../cifar/vgg13_b64_cifar100.py'),
    teacher_ckpt='work_dirs/vgg13_b64_cifar100/epoch_240.pth')
