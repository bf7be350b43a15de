"""Metrics on images drawn with replacement."""
import contextlib
import importlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def bootstrap():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'tools/benchmarks')
        yield importlib.import_module('bootstrap')


@pytest.fixture
def noisy(tmp_path):
    """Objects of three classes on six images, the last without any, and detections near half of them."""
    rng = np.random.default_rng(0)
    objects, detections = [], []
    for image in range(6):
        for _ in range(8 if image < 5 else 0):
            x, y, w, h = (rng.uniform(low, high) for low, high in ((0, 200), (0, 200), (10, 60), (10, 60)))
            label = int(rng.integers(3))
            objects.append(dict(id=len(objects) + 1, image_id=image, category_id=label, bbox=[x, y, w, h], area=w * h,
                                iscrowd=0))
            if rng.random() < 0.6:
                detections.append(dict(image_id=image, category_id=label, score=float(rng.random()),
                                       bbox=[x + rng.normal(0, 3), y + rng.normal(0, 3), w, h]))
        detections += [dict(image_id=image, category_id=int(rng.integers(3)), score=float(rng.random()),
                            bbox=[*rng.uniform(0, 200, 2), 30.0, 30.0]) for _ in range(4)]
    return objects, detections, tmp_path


def save(objects, detections, images, folder):
    book = dict(images=[dict(id=i, width=300, height=300) for i in images], annotations=objects,
                categories=[dict(id=i, name=str(i)) for i in range(3)])
    (folder / 'truth.json').write_text(json.dumps(book))
    (folder / 'found.json').write_text(json.dumps(detections))
    return folder / 'truth.json', folder / 'found.json'


def pycocotools_ap(truth, found):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(truth))
        evaluation = COCOeval(truth, truth.loadRes(str(found)), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0]


def test_each_image_once_is_pycocotools_ap(bootstrap, noisy):
    objects, detections, folder = noisy
    paths = save(objects, detections, range(6), folder)
    ap = bootstrap.resampled_ap(*paths, np.ones((1, 6), int))
    assert 0.1 < ap[0] < 0.6 and ap[0] == pytest.approx(pycocotools_ap(*paths), abs=1e-12)


@pytest.mark.parametrize('counts', [(2, 0, 1, 0, 3, 0), (0, 0, 6, 0, 0, 0), (0, 1, 1, 1, 1, 2)])
def test_a_draw_is_pycocotools_ap_of_copies_of_the_images(bootstrap, noisy, counts):
    objects, detections, folder = noisy
    copies = [image for image, count in enumerate(counts) for _ in range(count)]
    again = [dict(one, image_id=place) for place, image in enumerate(copies) for one in objects
             if one['image_id'] == image]
    again = [dict(one, id=i + 1) for i, one in enumerate(again)]
    found = [dict(one, image_id=place) for place, image in enumerate(copies) for one in detections
             if one['image_id'] == image]
    expected = pycocotools_ap(*save(again, found, range(6), folder))
    paths = save(objects, detections, range(6), folder)
    assert bootstrap.resampled_ap(*paths, np.array([counts]))[0] == pytest.approx(expected, abs=1e-12)


def test_without_detections_ap_is_0(bootstrap, noisy):
    objects, _, folder = noisy
    assert bootstrap.resampled_ap(*save(objects, [], range(6), folder)).tolist() == [0.0] * 500


def test_accuracy_on_draws(bootstrap, tmp_path):
    samples = [dict(pred_label=np.array([label]), gt_label=np.array([1])) for label in (1, 0, 1, 1)]
    (tmp_path / 'predictions.pkl').write_bytes(pickle.dumps(samples))
    counts = np.array([[1, 1, 1, 1], [0, 4, 0, 0], [1, 3, 0, 0]])
    found = bootstrap.resampled_accuracy(tmp_path / 'predictions.pkl', counts)
    assert found.tolist() == [75.0, 0.0, 25.0]


def test_draws_are_the_same_for_every_run(bootstrap):
    counts = bootstrap.draw(72)
    assert (counts == bootstrap.draw(72)).all() and counts.shape == (500, 72) and (counts.sum(1) == 72).all()
    assert np.mean(counts == 0) == pytest.approx((1 - 1 / 72)**72, abs=0.01)
