"""A COCO-format detection set of real handwriting that needs no download.

The 1,797 handwritten digits that scikit-learn carries (8x8, from the UCI set
of Alpaydin and Kaynak) are scaled, turned, coloured and pasted on crops of its
two photographs, among clutter: quarters of digits, pen strokes, scraps of
photograph. The splits share nothing: a digit instance belongs to one of them,
and validation sees the middle columns of each photograph, training both sides.

Letters: S image side, D digits of a split, (h, w) size of what is pasted.
"""
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from sklearn.datasets import load_digits, load_sample_images

CLASSES = tuple('0123456789')
RECORD = 'digits.json'
VERSION = 1  # raise it when the same settings come to make other files

TRAIN_SHARE = 0.8  # of the digit instances
VAL_COLUMNS = (3 / 8, 5 / 8)  # of each photograph, from and to
CROP = (64, 160)  # side of a background crop, photograph pixels
DIM = (0.25, 0.6)  # what is left of a photograph's brightness, so that ink stands out
MAX_DIGITS, MAX_CLUTTER, EMPTY_SHARE = 4, 2, 0.08
HEIGHT = (1 / 5, 1 / 2)  # of a digit, share of S
CONTRAST = (100, 180)  # distance of ink from what it covers, in RGB
MAX_HIDDEN = 0.25  # share of a digit's ink that later things may cover
PLACES = 20  # places tried for one thing before it is left out


@dataclass(frozen=True)
class Source:
    """All that one split is made of."""
    digits: np.ndarray  # (D, 8, 8) in [0, 1]
    labels: np.ndarray  # (D,)
    indices: np.ndarray  # (D,) places in load_digits()
    parts: list[np.ndarray]  # of the photographs, RGB, uint8
    origins: list[tuple[int, int]]  # photograph and first column of each part


def make_digits(root: str | Path, num_train: int = 1600, num_val: int = 200, image_size: int = 128,
                seed: int = 0, track: Callable[[list], Iterable] = iter) -> bool:
    """Writes ``annotations/{train,val}.json``, ``train/*.png``, ``val/*.png`` and a record under ``root``.

    The same settings give the same bytes. ``root`` appears complete or not at all. If the data are there
    already, as this function made them and with these settings, nothing is written and the result is
    ``False``; anything else in ``root`` is a ``FileExistsError``. ``track`` may show progress.
    """
    if num_train < 1 or num_val < 1:
        raise ValueError(f'num_train and num_val must be at least 1, got {num_train} and {num_val}')
    if image_size < 32:
        raise ValueError(f'image_size must be at least 32, got {image_size}')
    settings = dict(version=VERSION, num_train=num_train, num_val=num_val, image_size=image_size, seed=seed)
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        _check_same(root, settings)
        return False

    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f'.{root.name}-', dir=root.parent) as parent:
        made = Path(parent) / root.name
        sources = split_sources(seed)
        jobs = [(split, i) for split, n in (('train', num_train), ('val', num_val)) for i in range(n)]
        coco = {split: dict(images=[], annotations=[],
                            categories=[dict(id=i, name=name) for i, name in enumerate(CLASSES)])
                for split in sources}
        for split in sources:
            (made / split).mkdir(parents=True)
        for split, i in track(jobs):
            rng = np.random.default_rng([seed, list(sources).index(split), i])
            image, info, annotations = draw_scene(rng, sources[split], image_size)
            name = f'{i:05d}.png'
            cv2.imwrite(str(made / split / name), image[..., ::-1])
            book = coco[split]
            book['images'].append(dict(id=i, file_name=name, width=image_size, height=image_size, **info))
            for annotation in annotations:  # pycocotools takes an id of 0 for "no match"
                book['annotations'].append(dict(id=len(book['annotations']) + 1, image_id=i, **annotation))
        (made / 'annotations').mkdir()
        for split, book in coco.items():
            (made / 'annotations' / f'{split}.json').write_text(json.dumps(book))
        record = dict(settings=settings, sha256=_digest(made))
        (made / RECORD).write_text(json.dumps(record, indent=2) + '\n')
        os.replace(made, root)
    return True


def split_sources(seed: int) -> dict[str, Source]:
    """The digits and the parts of the photographs that train and val may use."""
    digits, photos = load_digits(), load_sample_images().images
    order = np.random.default_rng(seed).permutation(len(digits.target))
    bound = round(TRAIN_SHARE * len(order))
    width = photos[0].shape[1]
    start, end = (round(share * width) for share in VAL_COLUMNS)

    def source(indices, *columns: tuple[int, int]) -> Source:
        parts = {(i, a): photo[:, a:b] for i, photo in enumerate(photos) for a, b in columns}
        return Source((digits.images[indices] / 16).astype(np.float32), digits.target[indices], indices,
                      list(parts.values()), list(parts))

    return dict(train=source(order[:bound], (0, start), (end, width)), val=source(order[bound:], (start, end)))


def draw_scene(rng: np.random.Generator, source: Source, size: int) -> tuple[np.ndarray, dict, list[dict]]:
    """Returns an RGB image (S, S, 3), where its background was cut, and its annotations without ids."""
    which = rng.integers(len(source.parts))
    crop, (x, y, side) = _cut(rng, source.parts[which], *CROP)
    photo, left_column = source.origins[which]
    canvas = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)
    canvas *= rng.uniform(*DIM)
    owner = np.full((size, size), -1)  # the digit whose ink is seen at a pixel, -1 for none
    drawn = []  # (place in source, pixels of ink) of the digits, in the order of painting

    digits = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(1, MAX_DIGITS + 1))
    clutter = int(rng.integers(MAX_CLUTTER + 1))
    for is_digit in rng.permutation([True] * digits + [False] * clutter):
        for _ in range(PLACES):
            height = size * rng.uniform(*HEIGHT)
            if is_digit:
                pick = int(rng.integers(len(source.labels)))
                alpha, colour = _write(rng, source.digits[pick], height), None
            else:
                alpha, colour = _clutter(rng, source, height)
            h, w = alpha.shape
            ink = alpha > 0.5
            if h > size or w > size or not ink.any():
                continue
            top, left = rng.integers(size - h + 1), rng.integers(size - w + 1)
            view = np.s_[top:top + h, left:left + w]
            seen = owner.copy()
            seen[view][ink] = len(drawn) if is_digit else -1
            if any((seen == k).sum() < (1 - MAX_HIDDEN) * area for k, (_, area) in enumerate(drawn)):
                continue
            if colour is None:
                colour = _ink_colour(rng, canvas[view][ink].mean(0))
            canvas[view] += alpha[..., None] * rng.uniform(0.75, 1) * (colour - canvas[view])
            owner = seen
            if is_digit:
                drawn.append((pick, ink.sum()))
            break

    annotations = []
    for k, (pick, area) in enumerate(drawn):
        ink = owner == k
        left, top, width, height = cv2.boundingRect(ink.astype(np.uint8))
        annotations.append(dict(
            category_id=int(source.labels[pick]), bbox=[left, top, width, height], area=width * height,
            iscrowd=0, digit=int(source.indices[pick]), visible=round(float(ink.sum() / area), 3)))
    return canvas.round().clip(0, 255).astype(np.uint8), dict(
        photo=photo, crop=[x + left_column, y, side, side]), annotations


def _cut(rng: np.random.Generator, photo: np.ndarray, low: int, high: int) -> tuple[np.ndarray, tuple]:
    """A random square of a photograph with its ``(x, y, side)``."""
    side = int(rng.integers(low, min(high, *photo.shape[:2]) + 1))
    y, x = (int(rng.integers(n - side + 1)) for n in photo.shape[:2])
    return photo[y:y + side, x:x + side], (x, y, side)


def _write(rng: np.random.Generator, pattern: np.ndarray, height: float) -> np.ndarray:
    """Scales, stretches and turns a pattern in [0, 1]; returns its opacity (h, w), cut to the ink."""
    rows, columns = pattern.shape
    scale = height / rows
    angle, stretch = np.deg2rad(rng.uniform(-8, 8)), rng.uniform(0.8, 1.2)
    side = int(np.ceil(1.5 * height))
    turn = scale * np.array([[np.cos(angle) * stretch, -np.sin(angle)],
                             [np.sin(angle) * stretch, np.cos(angle)]])
    shift = side / 2 - turn @ [(columns - 1) / 2, (rows - 1) / 2]
    soft = cv2.warpAffine(pattern, np.c_[turn, shift], (side, side), flags=cv2.INTER_CUBIC)
    alpha = np.clip((soft - 0.25) / 0.4, 0, 1)  # an edge of a pixel or two instead of a blur
    x, y, w, h = cv2.boundingRect((alpha > 0.5).astype(np.uint8))
    return alpha[y:y + h, x:x + w]


def _clutter(rng: np.random.Generator, source: Source, height: float) -> tuple[np.ndarray, np.ndarray | None]:
    """Something that is no digit: its opacity (h, w) and, if it is a scrap of photograph, its colours."""
    kind = rng.choice(['quarter', 'stroke', 'scrap'])
    if kind == 'quarter':
        pick = rng.choice(np.flatnonzero(source.labels != 1))  # half a 1 is still a 1
        row, column = rng.integers(2, size=2) * 4
        quarter = source.digits[pick][row:row + 4, column:column + 4]
        return _write(rng, np.pad(quarter, 1), height / 2), None
    side = int(np.ceil(height))
    alpha = np.zeros((side, side), np.float32)
    if kind == 'stroke':
        # A cross of two long strokes: random strokes make a 1, a 7 or a 4 too often.
        angle = rng.uniform(0, np.pi / 2) + np.arange(2) * rng.uniform(0.3, 0.5) * np.pi
        arm = (side / 2 - 2) * np.c_[np.cos(angle), np.sin(angle)]
        ends = np.stack([side / 2 - arm, side / 2 + arm], 1).round().astype(np.int32)  # (2, 2, 2)
        cv2.polylines(alpha, list(ends), False, 1.0, max(1, side // 8))
        return cv2.GaussianBlur(alpha, (3, 3), 0), None
    scrap, _ = _cut(rng, source.parts[rng.integers(len(source.parts))], 16, 48)
    axes = rng.integers(max(1, side // 4), side // 2 + 1, size=2).tolist()
    cv2.ellipse(alpha, (side // 2, side // 2), axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1)
    return alpha, cv2.resize(scrap, (side, side)) * rng.uniform(*DIM)


def _ink_colour(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """A random bright RGB colour, at least a random contrast away from the mean background."""
    contrast = rng.uniform(*CONTRAST)
    while True:
        colour = rng.uniform(170, 255) * (1 - rng.uniform(0, 0.8) * rng.permutation([0, rng.random(), 1]))
        if np.linalg.norm(colour - background) >= contrast:
            return colour


def _digest(root: Path) -> str:
    """One hash over the names and contents of all files but the record."""
    total = hashlib.sha256()
    for path in sorted(p for p in root.rglob('*') if p.is_file() and p.name != RECORD):
        total.update(path.relative_to(root).as_posix().encode() + b'\0')
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _check_same(root: Path, settings: dict) -> None:
    """Raises ``FileExistsError`` unless ``root`` holds the data of these settings, complete and unchanged."""
    advice = f'delete {root} to have it made anew, or choose another directory'
    try:
        record = json.loads((root / RECORD).read_text())
        found, digest = record['settings'], record['sha256']
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(f'{root} is not empty and was not made by make_digits: {advice}') from None
    differing = [f'{key} {found.get(key)} instead of {value}'
                 for key, value in settings.items() if found.get(key) != value]
    if differing:
        raise FileExistsError(f'{root} holds digits made with {", ".join(differing)}: {advice}')
    if _digest(root) != digest:
        raise FileExistsError(f'{root} has missing, changed or additional files: {advice}')
