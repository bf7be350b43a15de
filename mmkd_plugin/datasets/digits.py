"""A detection data set of real handwritten digits in COCO format that needs no download.

The 1,797 handwritten digits of scikit-learn (8x8, from the UCI set of Alpaydin
and Kaynak) are scaled, rotated, coloured and pasted on crops of scikit-learn's
two photographs, among clutter: quarters of digits, pen strokes and pieces of
photographs. The splits share nothing. Each digit belongs to one of them.
Validation uses the middle columns of each photograph, training both sides.
"""
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
from sklearn.datasets import load_digits

from .scenes import Source, Thing, make_scenes, photo_parts, random_turn, scrap, stroke

CLASSES = tuple('0123456789')
RECORD = 'digits.json'
VERSION = 1  # raise it when the same settings create other files

TRAIN_SHARE = 0.8  # of the digit instances
VAL_COLUMNS = (3 / 8, 5 / 8)  # first and last column of validation in each photograph, as shares of its width


class Digits(Source):
    """Digits in ink of one colour; the patterns are 8 x 8."""

    KIND = 'digit'

    def draw(self, rng: np.random.Generator, pick: int, height: float) -> Thing:
        return _write(rng, self.patterns[pick], height), None

    def clutter(self, rng: np.random.Generator, height: float) -> Thing:
        """Returns a quarter of a digit, two pen strokes or a piece of a photograph."""
        kind = rng.choice(['quarter', 'stroke', 'scrap'])
        if kind == 'stroke':
            return stroke(rng, height)
        if kind == 'scrap':
            return scrap(rng, self.parts, height)
        pick = rng.choice(np.flatnonzero(self.labels != 1))  # half a 1 is still a 1
        row, column = rng.integers(2, size=2) * 4
        quarter = self.patterns[pick][row:row + 4, column:column + 4]
        return _write(rng, np.pad(quarter, 1), height / 2), None


def make_digits(root: str | Path, num_train: int = 1600, num_val: int = 200, image_size: int = 128,
                seed: int = 0, track: Callable[[list], Iterable] = iter) -> bool:
    """Writes the splits ``train`` and ``val`` under ``root``; see :func:`make_scenes`."""
    settings = dict(version=VERSION, num_train=num_train, num_val=num_val, image_size=image_size, seed=seed)
    return make_scenes(root, RECORD, settings, lambda: split_sources(seed), CLASSES, track)


def split_sources(seed: int) -> dict[str, Digits]:
    """Returns the digits and the parts of the photographs for train and val."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    bound = round(TRAIN_SHARE * len(order))
    start, end = VAL_COLUMNS

    def source(indices: np.ndarray, *columns: tuple[float, float]) -> Digits:
        return Digits((digits.images[indices] / 16).astype(np.float32), digits.target[indices], indices,
                      *photo_parts(*columns))

    return dict(train=source(order[:bound], (0, start), (end, 1)), val=source(order[bound:], (start, end)))


def _write(rng: np.random.Generator, pattern: np.ndarray, height: float) -> np.ndarray:
    """Scales, stretches and rotates a pattern in [0, 1]; returns its opacity (h, w), cropped to the ink."""
    soft = random_turn(rng, pattern, height)
    alpha = np.clip((soft - 0.25) / 0.4, 0, 1)  # sharpens the edge to one or two pixels
    x, y, w, h = cv2.boundingRect((alpha > 0.5).astype(np.uint8))
    return alpha[y:y + h, x:x + w]
