"""Pseudo-labels: a teacher's predictions on unlabelled images."""
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.fileio import load
from mmengine.registry import DATASETS, init_default_scope
from torch import nn

from ..checkpoints.reading import load_completely
from ..config.cfg_path import build_model
from ..config.preflight import missing_data
from ..config.teachers import names_of
from .sample_batch import as_tested
from .student import plain_config
from .teacher import build_teacher

ENDINGS = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
IOU = 0.5  # smallest IoU of a correct detection

Track = Callable[[Sequence], Iterable]


class UnreadableError(ValueError):
    """A file is not an image."""


def labelling_model(cfg: Config, checkpoint: str, trust_checkpoint: bool = False) -> nn.Module:
    """Returns the teacher of a distillation, or the model of a plain config, with these weights, in eval mode.

    Raises:
        ValueError: there are several teachers, the teacher lacks classes of the student, or the weights do not fit.
    """
    plain = plain_config(cfg)
    if 'data_preprocessor' in plain:
        plain.model.setdefault('data_preprocessor', plain.data_preprocessor)
    init_default_scope(plain.get('default_scope') or 'mmengine')
    model = build_model('model', plain.model, trust_checkpoint).eval()
    if 'architecture' in cfg.model:
        names = names_of(cfg.model.get('teacher'))
        if names != ['']:
            raise ValueError(f'CONFIG: expected a single teacher, got several: {", ".join(names)}. Pass the config of '
                             'the teacher that labels')
        try:
            model = build_teacher(cfg, 'teacher', cfg.model.teacher, model, trust_checkpoint,
                                  cfg.model.get('teacher_input_size'))
        except ValueError as error:
            raise ValueError(f'CONFIG: {error}. Pass the config of the teacher') from error
    load_completely(model, checkpoint, 'TEACHER_CKPT', trust_checkpoint)
    return model


def images_in(folder: str | Path) -> list[Path]:
    """Returns the image files in a folder and its subfolders, sorted.

    Links to folders are followed. Hidden files and folders are left out.

    Raises:
        ValueError: there are none.
    """
    found, seen = [], set()
    for base, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:  # a link leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith('.')]
        found += [Path(base, name) for name in names
                  if not name.startswith('.') and Path(name).suffix.lower() in ENDINGS]
    if not found:
        raise ValueError(f'IMAGES: no images in the folder {str(folder)!r}, expected files that end with '
                         f'{", ".join(ENDINGS)}')
    return sorted(found)


@torch.no_grad()
def predict(model: nn.Module, plain: Config, path: Path) -> tuple[Any, tuple[int, int]]:
    """Returns a model's prediction for an image file as a data sample, and the image's height and width.

    The image is prepared by the test pipeline of the plain config.

    Raises:
        UnreadableError: the file is not an image.
    """
    image = cv2.imread(str(path))
    if image is None:
        raise UnreadableError(f'IMAGES: {str(path)!r} cannot be read as an image')
    return model.test_step(pseudo_collate([as_tested(plain, image, str(path))]))[0], image.shape[:2]


def best_threshold(scores: np.ndarray, hits: np.ndarray, wanted: int) -> tuple[float, float]:
    """Returns the threshold with the largest F1, and that F1.

    If n predictions have at least the threshold as their score and TP of them are correct, F1 is ``2 TP / (n +
    wanted)``.

    Args:
        scores: (n, ), scores of the predictions.
        hits: (n, ), whether each prediction is correct.
        wanted: number of objects.

    Raises:
        ValueError: no prediction is correct.
    """
    order = np.argsort(-scores, kind='stable')
    scores, right = scores[order], np.cumsum(hits[order])
    f1 = 2 * right / (np.arange(1, len(scores) + 1) + wanted)
    f1[:-1][scores[:-1] == scores[1:]] = 0  # equal scores are on the same side of a threshold
    if not f1.any():
        raise ValueError('--score-thr: auto found no correct prediction of the teacher on the validation images. Check '
                         'the weights and the config, or give a number')
    best = int(f1.argmax())
    return float(scores[best]), float(f1[best])


def validation_threshold(model: nn.Module, plain: Config, track: Track) -> tuple[float, float]:
    """Returns the threshold with the largest F1 on the validation set of a config, and that F1.

    A detection is correct if its IoU with an object of its class is at least :data:`IOU`, and no detection with a
    higher score matches that object. The class of an image is correct if it is the label.

    Raises:
        ValueError: data are missing, or no prediction is correct.
    """
    missing = missing_data(plain, 'val_dataloader')
    if missing:
        raise ValueError('--score-thr auto: ' + '\n'.join(missing))
    dataset = DATASETS.build(plain.val_dataloader.dataset)
    scores, hits, wanted = [], [], 0
    for index in track(range(len(dataset))):
        truth = dataset.get_data_info(index)
        with torch.no_grad():
            sample = model.test_step(pseudo_collate([dataset[index]]))[0]
        if 'pred_instances' in sample:
            found, right, objects = _detections(sample.pred_instances, truth['instances'])
        else:
            found, right, objects = [float(sample.pred_score.max())], [int(sample.pred_label) == truth['gt_label']], 1
        scores.extend(found)
        hits.extend(right)
        wanted += objects
    return best_threshold(np.array(scores, float), np.array(hits, bool), wanted)


def _detections(found, objects: Sequence[dict]) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the scores, which detections are correct, and the number of objects of an image, without ignored ones."""
    from mmdet.evaluation.functional.mean_ap import tpfp_default
    boxes, scores = found.bboxes.cpu().numpy(), found.scores.cpu().numpy()
    away = 2 * max([1., *boxes.ravel(), *(x for each in objects for x in each['bbox'])])  # separates the classes
    boxes = boxes + away * found.labels.cpu().numpy()[:, None]
    truth = np.array([[x + away * each['bbox_label'] for x in each['bbox']] for each in objects]).reshape(-1, 4)
    ignored = np.array([bool(each.get('ignore_flag')) for each in objects], bool)
    right, wrong = tpfp_default(np.column_stack([boxes, scores]), truth[~ignored], truth[ignored], IOU)
    counts = (right[0] + wrong[0]) > 0
    return scores[counts], right[0][counts] > 0, int((~ignored).sum())


def coco_annotations(model: nn.Module, plain: Config, folder: Path, threshold: float, track: Track) -> dict:
    """Returns the detections on a folder's images with a score of at least ``threshold``, in COCO format.

    File names are relative to the folder. The categories are those of the validation set. Boxes with a width or height
    below one pixel are left out, because MMDetection does not read them.
    """
    categories = _categories(plain)
    files, annotations = [], []
    for path, sample, (height, width) in _predictions(model, plain, folder, track):
        files.append(dict(id=len(files), file_name=path.relative_to(folder).as_posix(), height=height, width=width))
        found = sample.pred_instances
        sizes = found.bboxes[:, 2:] - found.bboxes[:, :2]
        found = found[(found.scores >= threshold) & (sizes >= 1).all(1)].cpu()
        for (x1, y1, x2, y2), label, score in zip(found.bboxes.tolist(), found.labels.tolist(), found.scores.tolist()):
            annotations.append(dict(
                id=len(annotations) + 1, image_id=files[-1]['id'], category_id=categories[label]['id'], iscrowd=0,
                bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1), score=score))
    return dict(images=files, annotations=annotations, categories=categories)


def class_list(model: nn.Module, plain: Config, folder: Path, threshold: float, track: Track) -> list[str]:
    """Returns a line ``FILE CLASS`` for each of a folder's images with a class score of at least ``threshold``.

    MMPretrain's ``CustomDataset`` reads these lines as ``ann_file``, with the folder as ``data_prefix``.
    """
    lines = []
    for path, sample, _ in _predictions(model, plain, folder, track):
        if float(sample.pred_score.max()) >= threshold:
            lines.append(f'{path.relative_to(folder).as_posix()} {int(sample.pred_label)}')
    return lines


def _predictions(model: nn.Module, plain: Config, folder: Path,
                 track: Track) -> Iterator[tuple[Path, Any, tuple[int, int]]]:
    """Yields each image file of a folder with the results of :func:`predict`. It names files that it cannot read."""
    for path in track(images_in(folder)):
        try:
            sample, size = predict(model, plain, path)
        except UnreadableError as error:
            print(f'\n{error}. It is left out')
        else:
            yield path, sample, size


def _categories(plain: Config) -> list[dict]:
    """Returns COCO's categories in the order of the model's labels."""
    dataset = DATASETS.build(plain.val_dataloader.dataset)
    if hasattr(dataset, 'cat_ids'):
        names = {category['id']: category['name'] for category in load(dataset.ann_file)['categories']}
        return [dict(id=i, name=names[i]) for i in dataset.cat_ids]
    return [dict(id=i, name=name) for i, name in enumerate(dataset.metainfo['classes'])]
