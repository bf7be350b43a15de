# SoKD on CRD, which pools and embeds the refined last stage, ResNet34 to ResNet18, ImageNet. CRD's memory bank of all
# images, 1.3 GB, is in every checkpoint.
_base_ = '../../_base_/pairs/resnet34_resnet18_8xb32_in1k.py'

model = dict(
    distiller=dict(
        type='mmkd_plugin.SoKDDistiller',
        layers=['backbone.layer4'],
        base=dict(preset='crd', loss=dict(sample_n=1281167)),
        dam=dict(anchor='attention', adapter=dict(signed=False))))
optim_wrapper = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor')
custom_hooks = [dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=5)]
train_dataloader = dict(
    dataset=dict(
        _delete_=True, type='mmkd_plugin.CRDDataset', neg_num=16384, dataset=_base_.train_dataloader.dataset))
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
