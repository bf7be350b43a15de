"""Images for calibration: those of the training set, prepared by the test pipeline."""
import copy

import numpy as np
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope

from ..config.preflight import missing_inputs


def calibration_batches(cfg: Config, count: int) -> list[dict]:
    """Returns ``count`` images of the training set, evenly spaced, as batches of one image.

    The test pipeline prepares them. If the config has no training data, images of the test set are used.

    Args:
        cfg: config of a plain model.
        count: number of images; if the set is smaller, all of its images.

    Raises:
        ValueError: ``count`` is below 1, the set is empty, or images are missing or cannot be read.
    """
    if count < 1:
        raise ValueError(f'--calibrate: expected at least one image, got {count}')
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    name = 'train_dataloader' if cfg.get('train_dataloader') else 'test_dataloader'
    missing = missing_inputs(Config(dict(default_scope=cfg.get('default_scope'), test_dataloader=cfg[name])),
                             training=False)
    if missing:
        raise ValueError('--calibrate: ' + '\n'.join(missing).replace('test_dataloader', name))
    innermost = _innermost(cfg[name].dataset)
    innermost.pipeline = copy.deepcopy(_innermost(cfg.test_dataloader.dataset).pipeline)
    dataset = DATASETS.build(dict(innermost, serialize_data=False))  # some fail without images
    if not len(dataset):
        raise ValueError(f'--calibrate: {name}.dataset has no images')
    batches = []
    for index in np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)):
        try:
            item = dataset[int(index)]
        except Exception as error:  # decoders raise many types
            path = dataset.get_data_info(int(index)).get('img_path', 'in memory')
            raise ValueError(f'--calibrate: image {index} of {name}.dataset ({path}) cannot be read: '
                             f'{error}') from error
        batches.append(pseudo_collate([item]))
    return batches


def _innermost(dataset: dict) -> dict:
    dataset = copy.deepcopy(dataset)
    while 'dataset' in dataset or 'datasets' in dataset:  # RepeatDataset, MultiImageMixDataset, ConcatDataset
        dataset = dataset['dataset'] if 'dataset' in dataset else dataset['datasets'][0]
    return dataset
