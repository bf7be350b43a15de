# The teacher: the digits' detector on photographs of blood at 320 x 240, where P3 is 40 x 30, with all 205 training
# images. `val` is for tuning; only reported runs use `test`.
_base_ = '../digits/retinanet_r18-c32_digits.py'

data_root = 'data/bccd/'
data_command = 'python tools/dataset_converters/bccd.py FOLDER'
metainfo = dict(classes=('RBC', 'WBC', 'Platelets'))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(320, 240), keep_ratio=True),  # only sets the scale factor to 1
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
model = dict(bbox_head=dict(num_classes=3))
train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=8,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = dict(
    batch_size=8,
    dataset=dict(
        data_root=data_root, metainfo=metainfo, ann_file='annotations/test.json', data_prefix=dict(img='test/'),
        pipeline=test_pipeline))
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = dict(ann_file=data_root + 'annotations/test.json')
train_cfg = dict(max_epochs=24)
