# Fashion-MNIST in three parts: the first 50,000 training images to learn from, the last 10,000 to tune on, and the test
# images, which only reported runs see. `python tools/dataset_converters/make_fashion.py` makes it.
data_root = 'data/fashion_mnist'
data_command = 'python tools/dataset_converters/make_fashion.py'
data_preprocessor = dict(mean=[72.80], std=[89.96], to_rgb=False)

train_dataloader = dict(
    batch_size=50,
    num_workers=0,  # a batch loads in 4 ms of a step of 28
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='FashionMNIST',
        data_root=data_root,
        download=False,
        indices=50000,
        pipeline=[
            dict(type='RandomCrop', crop_size=28, padding=2),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ]))
val_dataloader = dict(
    batch_size=500,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='FashionMNIST', data_root=data_root, download=False, indices=-10000, pipeline=[dict(type='PackInputs')]))
test_dataloader = dict(
    batch_size=500,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='FashionMNIST', data_root=data_root, download=False, split='test', test_mode=True,
        pipeline=[dict(type='PackInputs')]))
val_evaluator = dict(type='Accuracy', topk=1)
test_evaluator = val_evaluator
