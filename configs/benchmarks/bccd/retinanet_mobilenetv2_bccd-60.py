# A student with another architecture: MobileNetV2 with ImageNet weights, which tools/model_converters/mobilenet_v2.py
# converts from torchvision. It has the same 60 images.
_base_ = './retinanet_r18-c16_bccd-60.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        out_indices=(1, 2, 4, 6),
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='data/mobilenet_v2.pth')),
    neck=dict(in_channels=[24, 32, 96, 320]))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}))
find_unused_parameters = True  # the backbone's last convolution feeds only a classifier
