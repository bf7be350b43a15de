"""Bootstrap of AP and accuracy over test images.

The draws are the same for every run on the same test set, so that runs can be compared draw by draw.

Letters: B draws, I images, T IoU thresholds, D detections of a class.
"""
import contextlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

DRAWS = 500
SEED = 0


def draw(images: int, draws: int = DRAWS) -> np.ndarray:
    """Returns the count of each image in each draw, (B, I). Every draw has I images."""
    rng = np.random.default_rng(SEED)
    return rng.multinomial(images, np.full(images, 1 / images), size=draws)


def resampled_ap(annotations: str | Path, detections: str | Path, counts: np.ndarray | None = None) -> np.ndarray:
    """Returns COCO's AP, in [0, 1], of a file of detections on each draw of the images, (B,).

    Args:
        annotations: file in COCO format.
        detections: file of MMDetection's ``CocoMetric``.
        counts: count of each image in each draw, (B, I), in the order of the image ids.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO(str(annotations))
        counts = draw(len(truth.imgs)) if counts is None else counts
        found = json.loads(Path(detections).read_text())
        if not found:  # pycocotools does not read an empty list
            return np.zeros(len(counts))
        evaluation = COCOeval(truth, truth.loadRes(found), 'bbox')
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ['all']
        evaluation.evaluate()
    params = evaluation.params
    place = {image: i for i, image in enumerate(params.imgIds)}
    results = np.array(evaluation.evalImgs, dtype=object).reshape(len(params.catIds), -1)  # (classes, I)
    per_class = [_class_ap([one for one in row if one is not None], place, counts, params.recThrs) for row in results]
    return np.nanmean(per_class, axis=0)


def _class_ap(results: list[dict], place: dict[int, int], counts: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """Returns the AP of one class on each draw, (B,); NaN if a draw has no object of the class."""
    ap = np.full(len(counts), np.nan)
    objects = np.zeros(counts.shape[1])
    for one in results:
        objects[place[one['image_id']]] = np.count_nonzero(one['gtIgnore'] == 0)
    if not objects.any():
        return ap
    scores = np.concatenate([one['dtScores'] for one in results])
    order = np.argsort(-scores, kind='mergesort')
    image = np.repeat([place[one['image_id']] for one in results], [len(one['dtScores']) for one in results])[order]
    matched, ignored = (np.concatenate([one[key] for one in results], axis=1)[:, order] > 0
                        for key in ('dtMatches', 'dtIgnore'))  # (T, D)
    hits, misses = matched & ~ignored, ~matched & ~ignored
    for i, count in enumerate(counts):
        total = count @ objects
        if not total:
            continue
        times = count[image]
        true = np.cumsum(hits * times, axis=1)
        positive = true + np.cumsum(misses * times, axis=1)
        precision = np.maximum.accumulate((true / np.maximum(positive, 1))[:, ::-1], axis=1)[:, ::-1]
        precision = np.pad(precision, ((0, 0), (0, 1)))  # precision is 0 at a recall that is not reached
        ap[i] = np.mean([row[np.searchsorted(reached, recalls)] for row, reached in zip(precision, true / total)])
    return ap


def resampled_accuracy(predictions: str | Path, counts: np.ndarray | None = None) -> np.ndarray:
    """Returns the top-1 accuracy, in percent, of a file of ``DumpResults`` on each draw of the images, (B,)."""
    with open(predictions, 'rb') as file:
        samples = pickle.load(file)
    correct = np.array([int(sample['pred_label']) == int(sample['gt_label']) for sample in samples])
    counts = draw(len(correct)) if counts is None else counts
    return 100 * (counts @ correct) / len(correct)
