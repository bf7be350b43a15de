"""Pictures of ground truth and predictions on a few test images."""
import copy

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from torch import nn

from ..config.preflight import missing_inputs

THRESHOLD = 0.3  # lowest score to draw
SIDE = 280  # longer side of a picture, in pixels
_COLORS = [(80, 200, 60), (40, 130, 240), (220, 90, 40), (200, 60, 200), (30, 200, 220), (60, 60, 230)]


def draw(plain: Config, models: dict[str, nn.Module], count: int = 4) -> list[dict[str, bytes]]:
    """Returns, for each image, PNG pictures with the keys ``'truth'`` and the names of the models.

    The images are evenly spaced over the test set. If the test set is missing, the list is empty.

    Args:
        plain: config of the plain model.
        models: by name, models with a ``test_step``.
        count: number of images.
    """
    if missing_inputs(plain, training=False):
        return []
    init_default_scope(plain.get('default_scope') or 'mmengine')
    dataset = DATASETS.build(copy.deepcopy(plain.test_dataloader.dataset))
    classes = dataset.metainfo.get('classes')
    sheets = []
    for index in np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)):
        pixels, truth = _truth(dataset, int(index))
        sheet = dict(truth=_picture(pixels, truth, classes))
        for name, model in models.items():
            sample, = model.test_step(pseudo_collate([dataset[int(index)]]))
            sheet[name] = _picture(pixels, _found(sample), classes)
        sheets.append(sheet)
    return sheets


def _truth(dataset: BaseDataset, index: int) -> tuple[np.ndarray, list[tuple]]:
    """Returns the image in BGR, and its ground truth: boxes or None, labels, and scores or None."""
    info = dataset.get_data_info(index)
    pixels = cv2.imread(info['img_path']) if info.get('img_path') else np.asarray(info['img'])
    if pixels.ndim == 2:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR)
    elif not info.get('img_path'):  # in memory as RGB
        pixels = pixels[..., ::-1]
    if 'instances' in info:
        return pixels, [(each['bbox'], each['bbox_label'], None) for each in info['instances']
                        if not each.get('ignore_flag')]
    labels = np.atleast_1d(info.get('gt_label', []))
    return pixels, [(None, int(label), None) for label in labels]


def _found(sample) -> list[tuple]:
    if 'pred_instances' in sample and 'bboxes' in sample.pred_instances:
        found = sample.pred_instances
        return [(box, label, score) for box, label, score in zip(
            found.bboxes.tolist(), found.labels.tolist(), found.scores.tolist()) if score > THRESHOLD]
    if 'pred_score' in sample:
        label = int(sample.pred_score.argmax())
        return [(None, label, float(sample.pred_score[label]))]
    return []


def _picture(pixels: np.ndarray, objects: list[tuple], classes: tuple[str, ...] | None) -> bytes:
    factor = SIDE / max(pixels.shape[:2])
    canvas = np.ascontiguousarray(cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR))
    for row, (box, label, score) in enumerate(objects):
        color = _COLORS[label % len(_COLORS)]
        text = (str(classes[label]) if classes else str(label)) + ('' if score is None else f' {score:.2f}')
        x, y = (4, 16 * (row + 1)) if box is None else (int(factor * box[0]), max(int(factor * box[1]) - 3, 11))
        if box is not None:
            left, top, right, bottom = (int(factor * side) for side in box)
            cv2.rectangle(canvas, (left, top), (right, bottom), color, 2)
        (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)
        cv2.rectangle(canvas, (x, y - height - 2), (x + width, y + 2), color, -1)
        cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA)
    return cv2.imencode('.png', canvas)[1].tobytes()
