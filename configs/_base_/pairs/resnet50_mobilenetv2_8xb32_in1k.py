# ResNet50 teaches MobileNetV2 on ImageNet, with the papers' schedule of 100 epochs instead of MMPretrain's 300. The
# papers often use MobileNetV1 as the student, which MMPretrain does not have.
_base_ = [
    'mmpretrain::_base_/models/mobilenet_v2_1x.py', 'mmpretrain::_base_/datasets/imagenet_bs32.py',
    'mmpretrain::_base_/schedules/imagenet_bs256.py', 'mmpretrain::_base_/default_runtime.py'
]

model = dict(
    _delete_=True,
    type='mmkd_plugin.TeacherStudentDistill',
    architecture=_base_.model,
    teacher=dict(cfg_path='mmpretrain::resnet/resnet50_8xb32_in1k.py'),
    teacher_ckpt='https://download.openmmlab.com/mmclassification/v0/resnet/resnet50_8xb32_in1k_20210831-ea4938fc.pth')  # noqa: E501
