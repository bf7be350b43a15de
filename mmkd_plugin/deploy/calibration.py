"""Images for calibration: of the training set, by the pipeline of the test."""
import copy

import numpy as np
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope

from ..config.preflight import missing_inputs


def calibration_batches(cfg: Config, count: int) -> list[dict]:
    """Returns ``count`` images of the training set, evenly spaced, as batches of one.

    The test's pipeline prepares them. Where the config has no training data, they are those of the test.

    Args:
        cfg: of a plain model.
        count: of images; if there are fewer, all.

    Raises:
        ValueError: images are missing, cannot be read, or are none.
    """
    if count < 1:
        raise ValueError(f'--calibrate: at least one image is needed, got {count}')
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    name = 'train_dataloader' if cfg.get('train_dataloader') else 'test_dataloader'
    missing = missing_inputs(Config(dict(default_scope=cfg.get('default_scope'), test_dataloader=cfg[name])),
                             training=False)
    if missing:
        raise ValueError('--calibrate: ' + '\n'.join(missing).replace('test_dataloader', name))
    innermost = _innermost(cfg[name].dataset)
    innermost.pipeline = copy.deepcopy(_innermost(cfg.test_dataloader.dataset).pipeline)
    dataset = DATASETS.build(dict(innermost, serialize_data=False))  # which fails without images
    if not len(dataset):
        raise ValueError(f'--calibrate: {name}.dataset has no images')
    batches = []
    for index in np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)):
        try:
            item = dataset[int(index)]
        except Exception as error:  # whatever the decoder raises
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
