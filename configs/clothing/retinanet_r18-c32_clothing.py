# The teacher: the digits' detector, on all 2,000 training images of clothing. What validates a training is the split to
# tune on; only reported runs see the test images.
_base_ = '../digits/retinanet_r18-c32_digits.py'

data_root = 'data/clothing/'
data_command = 'python tools/dataset_converters/make_fashion.py'
metainfo = dict(classes=('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag',
                         'Ankle boot'))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),  # only notes the scale factor of 1
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=50,
    dataset=dict(
        data_root=data_root, metainfo=metainfo, ann_file='annotations/tuning.json', data_prefix=dict(img='tuning/'),
        pipeline=test_pipeline))
test_dataloader = dict(
    batch_size=50,
    dataset=dict(
        data_root=data_root, metainfo=metainfo, ann_file='annotations/test.json', data_prefix=dict(img='test/'),
        pipeline=test_pipeline))
val_evaluator = dict(ann_file=data_root + 'annotations/tuning.json')
test_evaluator = dict(ann_file=data_root + 'annotations/test.json')
train_cfg = dict(max_epochs=16)
