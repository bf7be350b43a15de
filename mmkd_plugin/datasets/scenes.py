"""Detection data sets in COCO format, made of small patterns and clutter on crops of scikit-learn's two photographs.

A :class:`Source` provides the patterns and the clutter. Splits share nothing: a pattern belongs to one of them, and
each split has its own columns of the photographs.

Letters: S image side, D patterns of a split, (h, w) size of a pasted pattern.
"""
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np

CROP = (64, 160)  # side of a background crop, in pixels of the photograph
DIM = (0.25, 0.6)  # factor of the photograph's brightness, so that objects stand out
MAX_OBJECTS, MAX_CLUTTER, EMPTY_SHARE = 4, 2, 0.08
HEIGHT = (1 / 5, 1 / 2)  # height of an object, as a share of S
CONTRAST = (100, 180)  # RGB distance between ink and background
MAX_HIDDEN = 0.25  # share of an object that later objects and clutter may cover
PLACES = 20  # positions to try for an object before it is left out

Thing = tuple[np.ndarray, np.ndarray | None]  # opacity (h, w); RGB colours (h, w, 3), or None for ink of one colour


@dataclass(frozen=True)
class Source(ABC):
    """Patterns, clutter and backgrounds of one split."""
    patterns: np.ndarray  # (D, side, side) in [0, 1]
    labels: np.ndarray  # (D,)
    indices: np.ndarray  # (D,) indices in the original data set
    parts: list[np.ndarray]  # parts of the photographs, RGB, uint8
    origins: list[tuple[int, int]]  # photograph and first column of each part

    KIND = 'object'  # key of the pattern's index in an annotation

    @abstractmethod
    def draw(self, rng: np.random.Generator, pick: int, height: float) -> Thing:
        """Returns a pattern of about this height in pixels."""

    @abstractmethod
    def clutter(self, rng: np.random.Generator, height: float) -> Thing:
        """Returns clutter that is not an object."""


def photo_parts(*columns: tuple[float, float]) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Returns these columns of both photographs, and the (photograph, first column) of each.

    Columns are given as shares of the width.
    """
    from sklearn.datasets import load_sample_images
    photos = load_sample_images().images
    width = photos[0].shape[1]
    bounds = [(round(start * width), round(end * width)) for start, end in columns]
    parts = {(i, a): photo[:, a:b] for i, photo in enumerate(photos) for a, b in bounds}
    return list(parts.values()), list(parts)


def make_scenes(root: str | Path, record: str, settings: dict, sources: Callable[[], dict[str, Source]],
                classes: Sequence[str], track: Callable[[list], Iterable] = iter) -> bool:
    """Writes ``annotations/SPLIT.json`` and ``SPLIT/*.png`` for every split, and a record, under ``root``.

    The same settings give the same bytes. ``root`` is written completely or not at all. If it already has the data of
    these settings, nothing is written and the function returns ``False``.

    Args:
        root: the directory to create.
        record: file name of the record; its stem is the name of the data set.
        settings: everything that determines the data: ``num_SPLIT`` for every split, ``image_size``, ``seed`` and more.
        sources: returns the splits, in the order of their random numbers.
        classes: names of the labels.
        track: wraps an iterable to show progress.

    Raises:
        ValueError: a split has no images, or the images are too small.
        FileExistsError: ``root`` contains anything else.
    """
    counts = {key: value for key, value in settings.items() if key.startswith('num_')}
    if min(counts.values()) < 1:
        raise ValueError(f'{" and ".join(counts)} must be at least 1, got {" and ".join(map(str, counts.values()))}')
    size, seed = settings['image_size'], settings['seed']
    if size < 32:
        raise ValueError(f'image_size must be at least 32, got {size}')
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        _check_same(root, record, settings)
        return False

    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f'.{root.name}-', dir=root.parent) as parent:
        made = Path(parent) / root.name
        splits = sources()
        jobs = [(split, i) for split in splits for i in range(settings[f'num_{split}'])]
        coco = {split: dict(images=[], annotations=[],
                            categories=[dict(id=i, name=name) for i, name in enumerate(classes)])
                for split in splits}
        for split in splits:
            (made / split).mkdir(parents=True)
        for split, i in track(jobs):
            rng = np.random.default_rng([seed, list(splits).index(split), i])
            image, info, annotations = draw_scene(rng, splits[split], size)
            name = f'{i:05d}.png'
            if not cv2.imwrite(str(made / split / name), image[..., ::-1]):
                raise OSError(f'cannot write {str(made / split / name)!r}')
            book = coco[split]
            book['images'].append(dict(id=i, file_name=name, width=size, height=size, **info))
            for annotation in annotations:  # pycocotools takes an id of 0 for "no match"
                book['annotations'].append(dict(id=len(book['annotations']) + 1, image_id=i, **annotation))
        (made / 'annotations').mkdir()
        for split, book in coco.items():
            (made / 'annotations' / f'{split}.json').write_text(json.dumps(book))
        said = dict(settings=settings, sha256=_digest(made, record))
        (made / record).write_text(json.dumps(said, indent=2) + '\n')
        os.replace(made, root)
    return True


def draw_scene(rng: np.random.Generator, source: Source, size: int) -> tuple[np.ndarray, dict, list[dict]]:
    """Returns an RGB image (S, S, 3), the position of its background, and its annotations without ids."""
    which = rng.integers(len(source.parts))
    crop, (x, y, side) = cut_square(rng, source.parts[which], *CROP)
    photo, left_column = source.origins[which]
    canvas = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)
    canvas *= rng.uniform(*DIM)
    owner = np.full((size, size), -1)  # the visible object at each pixel, -1 for none
    drawn = []  # (index in source, pixels) of the objects, in the order of drawing

    objects = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(1, MAX_OBJECTS + 1))
    clutter = int(rng.integers(MAX_CLUTTER + 1))
    for is_object in rng.permutation([True] * objects + [False] * clutter):
        for _ in range(PLACES):
            height = size * rng.uniform(*HEIGHT)
            if is_object:
                pick = int(rng.integers(len(source.labels)))
                alpha, colour = source.draw(rng, pick, height)
            else:
                alpha, colour = source.clutter(rng, height)
            h, w = alpha.shape
            ink = alpha > 0.5
            if h > size or w > size or not ink.any():
                continue
            top, left = rng.integers(size - h + 1), rng.integers(size - w + 1)
            view = np.s_[top:top + h, left:left + w]
            seen = owner.copy()
            seen[view][ink] = len(drawn) if is_object else -1
            if any((seen == k).sum() < (1 - MAX_HIDDEN) * area for k, (_, area) in enumerate(drawn)):
                continue
            if colour is None:
                colour = _ink_colour(rng, canvas[view][ink].mean(0))
            canvas[view] += alpha[..., None] * rng.uniform(0.75, 1) * (colour - canvas[view])
            owner = seen
            if is_object:
                drawn.append((pick, ink.sum()))
            break

    annotations = []
    for k, (pick, area) in enumerate(drawn):
        ink = owner == k
        left, top, width, height = cv2.boundingRect(ink.astype(np.uint8))
        annotations.append(dict(
            category_id=int(source.labels[pick]), bbox=[left, top, width, height], area=width * height,
            iscrowd=0, **{source.KIND: int(source.indices[pick])}, visible=round(float(ink.sum() / area), 3)))
    return canvas.round().clip(0, 255).astype(np.uint8), dict(
        photo=photo, crop=[x + left_column, y, side, side]), annotations


def cut_square(rng: np.random.Generator, photo: np.ndarray, low: int, high: int) -> tuple[np.ndarray, tuple]:
    """Returns a random square of a photograph and its ``(x, y, side)``."""
    side = int(rng.integers(low, min(high, *photo.shape[:2]) + 1))
    y, x = (int(rng.integers(n - side + 1)) for n in photo.shape[:2])
    return photo[y:y + side, x:x + side], (x, y, side)


def stroke(rng: np.random.Generator, height: float) -> Thing:
    """Returns a cross of two long strokes. Random strokes would look like a 1, 4 or 7 too often."""
    side = int(np.ceil(height))
    alpha = np.zeros((side, side), np.float32)
    angle = rng.uniform(0, np.pi / 2) + np.arange(2) * rng.uniform(0.3, 0.5) * np.pi
    arm = (side / 2 - 2) * np.c_[np.cos(angle), np.sin(angle)]
    ends = np.stack([side / 2 - arm, side / 2 + arm], 1).round().astype(np.int32)  # (2, 2, 2)
    cv2.polylines(alpha, list(ends), False, 1.0, max(1, side // 8))
    return cv2.GaussianBlur(alpha, (3, 3), 0), None


def scrap(rng: np.random.Generator, parts: list[np.ndarray], height: float) -> Thing:
    """Returns an ellipse of a photograph."""
    side = int(np.ceil(height))
    alpha = np.zeros((side, side), np.float32)
    square, _ = cut_square(rng, parts[rng.integers(len(parts))], 16, 48)
    axes = rng.integers(max(1, side // 4), side // 2 + 1, size=2).tolist()
    cv2.ellipse(alpha, (side // 2, side // 2), axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1)
    return alpha, cv2.resize(square, (side, side)) * rng.uniform(*DIM)


def random_turn(rng: np.random.Generator, pattern: np.ndarray, height: float) -> np.ndarray:
    """Scales, stretches and rotates a pattern (rows, columns[, layers]) to about this height, with a margin."""
    rows, columns = pattern.shape[:2]
    scale = height / rows
    angle, stretch = np.deg2rad(rng.uniform(-8, 8)), rng.uniform(0.8, 1.2)
    side = int(np.ceil(1.5 * height))
    turn = scale * np.array([[np.cos(angle) * stretch, -np.sin(angle)],
                             [np.sin(angle) * stretch, np.cos(angle)]])
    shift = side / 2 - turn @ [(columns - 1) / 2, (rows - 1) / 2]
    return cv2.warpAffine(pattern, np.c_[turn, shift], (side, side), flags=cv2.INTER_CUBIC)


def _ink_colour(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """Returns a random bright RGB colour with at least a random contrast to the mean background."""
    contrast = rng.uniform(*CONTRAST)
    while True:
        colour = rng.uniform(170, 255) * (1 - rng.uniform(0, 0.8) * rng.permutation([0, rng.random(), 1]))
        if np.linalg.norm(colour - background) >= contrast:
            return colour


def _digest(root: Path, record: str) -> str:
    """Returns one hash of the names and contents of all files except the record."""
    total = hashlib.sha256()
    for path in sorted(p for p in root.rglob('*') if p.is_file() and p.name != record):
        total.update(path.relative_to(root).as_posix().encode() + b'\0')
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _check_same(root: Path, record: str, settings: dict) -> None:
    """Raises ``FileExistsError`` unless ``root`` has the data of these settings, complete and unchanged."""
    name = Path(record).stem
    advice = f'delete {root} to create it again, or choose another directory'
    try:
        said = json.loads((root / record).read_text())
        found, digest = said['settings'], said['sha256']
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(f'{root} is not empty and was not created by make_{name}: {advice}') from None
    differing = [f'{key} {found.get(key)} instead of {value}'
                 for key, value in settings.items() if found.get(key) != value]
    if differing:
        raise FileExistsError(f'{root} has {name} with {", ".join(differing)}: {advice}')
    if _digest(root, record) != digest:
        raise FileExistsError(f'{root} has missing, changed or additional files: {advice}')
