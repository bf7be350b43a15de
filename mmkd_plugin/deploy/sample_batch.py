"""A batch of real images from a model's test pipeline, with a substitute if the data set is missing."""
from typing import Any

import cv2
import numpy as np
from matplotlib import cbook
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, init_default_scope

from ..config.datasets import downloads, pipeline_of
from ..config.preflight import missing_data
from ..utils import type_name

_IN_MEMORY = 32  # image side of data sets in memory, such as CIFAR


def sample_batch(cfg: Config, channels: int = 3) -> tuple[dict[str, Any], str]:
    """Returns the first two images of the test or validation set as a collated batch, and a description of them.

    If the data set is missing, the images are a photograph of Matplotlib and its mirror image, from the same pipeline.
    Nothing is downloaded.

    Args:
        cfg: config of a plain model.
        channels: number of channels of the model's images.

    Raises:
        ValueError: the config has neither ``test_dataloader`` nor ``val_dataloader``.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    name = test_loader(cfg)
    dataset = cfg[name].dataset
    if not missing_data(cfg, name):
        try:
            found = DATASETS.build(dict(dataset, download=False) if downloads(dataset) else dataset)
            return pseudo_collate([found[i] for i in range(min(2, len(found)))]), f'the first images of {name}'
        except RuntimeError:
            if not downloads(dataset):  # other data sets report missing files themselves
                raise
    path = cbook.get_sample_data('grace_hopper.jpg', asfileobj=False)
    image = cv2.imread(path, cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR)
    return pseudo_collate([as_tested(cfg, pixels, path) for pixels in (image, np.ascontiguousarray(image[:, ::-1]))]), \
        'a photograph of Matplotlib and its mirror image'


def as_tested(cfg: Config, image: np.ndarray, path: str) -> dict[str, Any]:
    """Returns an image as an item of the test or validation set.

    Args:
        cfg: config of a plain model.
        image: (H, W, 3) in BGR, or (H, W). If the data set is in memory, it is resized to the size of such images.
        path: path of its file.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    pipeline = test_pipeline(cfg)
    loads = [type_name(step['type']).startswith('Load') for step in pipeline]  # images, annotations
    steps = [step for step, load in zip(pipeline, loads) if not load]
    height, width = image.shape[:2]
    item = dict(img=image, img_path=path, img_id=0, img_shape=(height, width), ori_shape=(height, width),
                height=height, width=width, instances=[])
    if not any(loads):  # data sets of MMPretrain in memory have RGB images and no file
        image = cv2.resize(image, (_IN_MEMORY, _IN_MEMORY), interpolation=cv2.INTER_AREA)
        item.update(img=image if image.ndim == 2 else np.ascontiguousarray(image[..., ::-1]), img_path=None)
    return Compose(steps)(item)


def test_pipeline(cfg: Config) -> list[dict]:
    """Returns the pipeline of the test set or, if there is none, of the validation set."""
    return pipeline_of(cfg[test_loader(cfg)].dataset)


def test_loader(cfg: Config) -> str:
    """Returns the name of the data loader of the test set or, if there is none, of the validation set.

    Raises:
        ValueError: there is neither.
    """
    for name in ('test_dataloader', 'val_dataloader'):
        if cfg.get(name):
            return name
    raise ValueError('config: has neither test_dataloader nor val_dataloader, expected one whose pipeline prepares '
                     'the images')
