# SoKD on CRD, which pools and embeds the refined last stage, ResNet50 to MobileNetV2, ImageNet.
_base_ = ['./_base_/resnet50_mobilenetv2_imagenet.py', './_base_/sokd_fitnet_imagenet.py', './_base_/crd_imagenet.py']

model = dict(
    loss_schedules=_base_.crd.loss_schedules,
    distiller=dict(
        _base_.sokd.distiller,
        base=None,
        refine=['feature'],
        student_recorders=dict(
            _base_.crd.student_recorders, feature=dict(type='ModuleOutputs', source='backbone.conv2')),
        teacher_recorders=dict(feature=dict(type='ModuleOutputs', source='backbone.layer4')),
        connectors=dict(
            s_embed=[_base_.crd.pool, dict(type='CRDConnector', dim_in=1280, dim_out=128)],
            t_embed=[_base_.crd.pool, dict(type='CRDConnector', dim_in=2048, dim_out=128)]),
        distill_losses=_base_.crd.distill_losses,
        loss_forward_mappings=_base_.crd.loss_forward_mappings))
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmkd_plugin.CRDDataset',
        neg_num=16384,
        dataset=_base_.train_dataloader.dataset))
default_hooks = dict(checkpoint=_base_.crd.checkpoint)
optim_wrapper = _base_.sokd.optim_wrapper
custom_hooks = [_base_.sokd.hook]
