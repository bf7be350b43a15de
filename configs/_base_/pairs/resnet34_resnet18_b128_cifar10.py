# ResNet34 teaches ResNet18 on CIFAR-10, both MMPretrain's.
_base_ = ['../../cifar/resnet18_b128_cifar10.py']

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='mmpretrain::resnet/resnet34_8xb16_cifar10.py'),
    teacher_ckpt='https://download.openmmlab.com/mmclassification/v0/resnet/resnet34_b16x8_cifar10_20210528-a8aa36a6.pth')  # noqa: E501
