# ResNet50 teaches MobileNetV2 of half width on CIFAR-100. The teacher is that of MMPretrain. Its recipe differs from
# the benchmark's: 79.90 instead of 79.34 top-1.
_base_ = ['../../cifar/mobilenetv2_b64_cifar100.py']

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='mmpretrain::resnet/resnet50_8xb16_cifar100.py'),
    teacher_ckpt='https://download.openmmlab.com/mmclassification/v0/resnet/resnet50_b16x8_cifar100_20210528-67b58a1b.pth')  # noqa: E501
