"""A few real images as a model's test gives them, whether its data set is here or not."""
from typing import Any

import cv2
import numpy as np
from matplotlib import cbook
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, init_default_scope

from ..config.preflight import downloads, missing_inputs

_IN_MEMORY = 32  # side of the images of data sets that load no files, such as CIFAR


def sample_batch(cfg: Config, channels: int = 3) -> tuple[dict[str, Any], str]:
    """Returns the first two images of the test, or of the validation, as a collated batch; and what they are.

    Where the data set is not here, it is a photograph that comes with Matplotlib and its mirror image, through the
    same pipeline. Nothing is downloaded.

    Args:
        cfg: of a plain model.
        channels: of the images that the model takes.

    Raises:
        ValueError: the config has neither ``test_dataloader`` nor ``val_dataloader``.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    name = _loader(cfg)
    dataset = cfg[name].dataset
    only = Config({name.replace('val', 'test'): cfg[name], 'default_scope': cfg.get('default_scope')})
    if not missing_inputs(only, training=False):
        try:
            found = DATASETS.build(dict(dataset, download=False) if downloads(dataset) else dataset)
            return pseudo_collate([found[i] for i in range(min(2, len(found)))]), f'the first images of {name}'
        except RuntimeError:
            if not downloads(dataset):  # the others say so where their files are not there
                raise
    path = cbook.get_sample_data('grace_hopper.jpg', asfileobj=False)
    image = cv2.imread(path, cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR)
    return pseudo_collate([as_tested(cfg, pixels, path) for pixels in (image, np.ascontiguousarray(image[:, ::-1]))]), \
        'a photograph of Matplotlib and its mirror image'


def as_tested(cfg: Config, image: np.ndarray, path: str) -> dict[str, Any]:
    """Returns an image as an item of the test's, or the validation's, data set.

    Args:
        cfg: of a plain model.
        image: (H, W, 3) in BGR or (H, W). Where the data set is one of images in memory, it is made as small as these.
        path: of its file.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    dataset = cfg[_loader(cfg)].dataset
    while 'pipeline' not in dataset:
        dataset = dataset.get('dataset') or dataset.datasets[0]
    loads = [str(step['type']).split('.')[-1].startswith('Load') for step in dataset.pipeline]  # images, annotations
    steps = [step for step, load in zip(dataset.pipeline, loads) if not load]
    height, width = image.shape[:2]
    item = dict(img=image, img_path=path, img_id=0, img_shape=(height, width), ori_shape=(height, width),
                height=height, width=width, instances=[])
    if not any(loads):  # as MMPretrain has them: RGB, and no file
        image = cv2.resize(image, (_IN_MEMORY, _IN_MEMORY), interpolation=cv2.INTER_AREA)
        item.update(img=image if image.ndim == 2 else np.ascontiguousarray(image[..., ::-1]), img_path=None)
    return Compose(steps)(item)


def _loader(cfg: Config) -> str:
    for name in ('test_dataloader', 'val_dataloader'):
        if cfg.get(name):
            return name
    raise ValueError('The config has neither test_dataloader nor val_dataloader, whose pipeline would tell how the '
                     'model gets its images')
