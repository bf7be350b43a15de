# FitNet with the other 1,300 training images as unlabelled images. Each step has 8 labelled and 8 unlabelled images.
_base_ = './fitnet_fpn_retinanet_r18-c32_retinanet_r18-c16_digits-300.py'

train_cfg = dict(
    type='mmkd_plugin.UnlabelledEpochBasedTrainLoop',
    unlabelled_dataloader=dict(
        batch_size=8,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=dict(
            type='CocoDataset',
            data_root=_base_.data_root,
            metainfo=_base_.metainfo,
            ann_file='annotations/train.json',
            data_prefix=dict(img='train/'),
            indices=-1300,
            filter_cfg=dict(filter_empty_gt=False),
            pipeline=[dict(type='LoadImageFromFile'), dict(type='PackDetInputs')])))
