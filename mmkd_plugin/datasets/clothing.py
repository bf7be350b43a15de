"""A COCO-format detection set of real photographs of clothing: Fashion-MNIST's, pasted on crops of two others.

Each piece is cut out along its outline, tinted, scaled and turned, and lies among pen strokes and scraps of photograph.
The splits share nothing: ``train`` has the pieces of Fashion-MNIST's first 50,000 training images and the sides of the
photographs, ``tuning`` the last 10,000 and ``test`` the test images, each with half of the photographs' middle.
"""
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np

from .fashion_mnist import CLASSES, read_split
from .scenes import Source, Thing, make_scenes, photo_parts, random_turn, scrap, stroke

RECORD = 'clothing.json'
VERSION = 1  # raise it when the same settings come to make other files

TRAIN_IMAGES = 50000
COLUMNS = dict(train=((0, 3 / 8), (5 / 8, 1)), tuning=((3 / 8, 1 / 2), ), test=((1 / 2, 5 / 8), ))  # of each photograph
BRIGHT = (0.6, 1.0)  # of a piece, share of full brightness
TINT = 0.5  # at most this much of a colour channel is taken away


class Clothing(Source):
    """Pieces of clothing: their patterns are grey photographs of 28 x 28 on black."""

    KIND = 'piece'

    def draw(self, rng: np.random.Generator, pick: int, height: float) -> Thing:
        pattern = self.patterns[pick]
        outline = np.zeros(pattern.shape, np.uint8)
        contours, _ = cv2.findContours((pattern > 0.05).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(outline, contours, -1, 1, -1)
        turned = random_turn(rng, np.stack([outline.astype(np.float32), pattern], 2), height)
        alpha, grey = np.clip(turned, 0, 1).transpose(2, 0, 1)
        x, y, w, h = cv2.boundingRect((alpha > 0.5).astype(np.uint8))
        colour = 255 * rng.uniform(*BRIGHT) * (1 - rng.uniform(0, TINT) * rng.permutation([0, rng.random(), 1]))
        return alpha[y:y + h, x:x + w], grey[y:y + h, x:x + w, None] * colour

    def clutter(self, rng: np.random.Generator, height: float) -> Thing:
        """Two pen strokes or a scrap of photograph."""
        return stroke(rng, height) if rng.random() < 0.5 else scrap(rng, self.parts, height)


def make_clothing(root: str | Path, fashion: str | Path, num_train: int = 2000, num_tuning: int = 200,
                  num_test: int = 300, image_size: int = 64, seed: int = 0,
                  track: Callable[[list], Iterable] = iter) -> bool:
    """Writes the three splits under ``root`` from Fashion-MNIST unpacked in ``fashion``; see :func:`make_scenes`."""
    settings = dict(version=VERSION, num_train=num_train, num_tuning=num_tuning, num_test=num_test,
                    image_size=image_size, seed=seed)
    return make_scenes(root, RECORD, settings, lambda: split_sources(fashion), CLASSES, track)


def split_sources(fashion: str | Path) -> dict[str, Clothing]:
    """The pieces and the parts of the photographs that each split may use."""
    (train, train_labels), (test, test_labels) = (read_split(fashion, split) for split in ('train', 't10k'))
    bound = min(TRAIN_IMAGES, len(train) * 5 // 6)  # the same where there are fewer, as in a test
    pieces = dict(train=(train[:bound], train_labels[:bound], 0), tuning=(train[bound:], train_labels[bound:], bound),
                  test=(test, test_labels, len(train)))
    return {split: Clothing((images / 255).astype(np.float32), labels, np.arange(first, first + len(labels)),
                            *photo_parts(*COLUMNS[split]))
            for split, (images, labels, first) in pieces.items()}
