# AMD with KD from two teachers at three stages, WRN-28-3 and WRN-16-3 to WRN-16-1, CIFAR-10.
# The losses of each teacher have half of the weight that they have with one teacher. Train both teachers first.
_base_ = './amd-kd_backbone_wrn16-3_wrn16-1_b128_cifar10.py'

half = dict(_base_.model.distiller, amd=dict(loss_weight=500.0),
            distill_losses=dict(loss_kd=dict(type='KLDivergence', tau=4, loss_weight=0.45)))

model = dict(
    teacher=dict(
        _delete_=True,
        wrn28=dict(cfg_path='{{ fileDirname }}/../../cifar/wrn28-3_b128_cifar10.py'),
        wrn16=_base_.model.teacher),
    teacher_ckpt=dict(_delete_=True, wrn28='work_dirs/wrn28-3_b128_cifar10/epoch_200.pth',
                      wrn16=_base_.model.teacher_ckpt),
    distiller=dict(_delete_=True, wrn28=half, wrn16=half))
del half
