"""Images for calibration: those of the training set, prepared by the test pipeline."""
import copy

import numpy as np
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope

from ..config.datasets import wrapped
from ..config.preflight import missing_data
from ..utils import in_words
from .sample_batch import test_loader, test_pipeline


def calibration_batches(cfg: Config, count: int) -> list[dict]:
    """Returns ``count`` images of the training set, evenly spaced, as batches of one image.

    The test pipeline prepares them. If the config has no training data, images of the test or validation set
    are used.

    Args:
        cfg: config of a plain model.
        count: number of images; if the set is smaller, all of its images.

    Raises:
        ValueError: ``count`` is below 1, the set is empty, or images are missing or cannot be read.
    """
    if count < 1:
        raise ValueError(f'--calibrate: expected at least one image, got {count}')
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    name = 'train_dataloader' if cfg.get('train_dataloader') else test_loader(cfg)
    missing = missing_data(cfg, name)
    if missing:
        raise ValueError('--calibrate: ' + '\n'.join(missing))
    *_, innermost = wrapped(cfg[name].dataset)
    dataset = DATASETS.build(copy.deepcopy(dict(innermost, pipeline=test_pipeline(cfg), serialize_data=False)))
    if not len(dataset):  # without serialize_data=False, some fail in the constructor
        raise ValueError(f'--calibrate: {name}.dataset has no images')
    batches = []
    for index in np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)):
        try:
            item = dataset[int(index)]
        except Exception as error:  # decoders raise many types
            path = dataset.get_data_info(int(index)).get('img_path', 'in memory')
            raise ValueError(f'--calibrate: image {index} of {name}.dataset ({path}) cannot be read: '
                             f'{in_words(error)}') from error
        batches.append(pseudo_collate([item]))
    return batches
