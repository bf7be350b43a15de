"""Converts BCCD, microscope photographs of blood, from Pascal VOC to COCO at half its size, 320 x 240.

BCCD is Shenggan/BCCD_Dataset on GitHub, under the MIT licence: 364 images with boxes around red cells, white cells and
platelets. FOLDER is its folder BCCD, with Annotations, ImageSets/Main and JPEGImages. The splits are those of BCCD. The
training images are in a fixed random order, so that the first N of them are a random sample.
"""
import argparse
import json
import os
import random
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2

CLASSES = ('RBC', 'WBC', 'Platelets')
SPLITS = ('train', 'val', 'test')
SIZE = (320, 240)  # width and height of a converted image
SEED = 0  # seed of the order of the training images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('folder', type=Path, help='folder BCCD of the data set')
    parser.add_argument('--out', type=Path, default=Path('data/bccd'), help='folder to create')
    args = parser.parse_args()
    try:
        convert(args.folder, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f'bccd: {error}')


def convert(folder: Path, out: Path) -> None:
    """Writes ``annotations/SPLIT.json`` and ``SPLIT/*.png`` into ``out``, completely or not at all.

    Raises:
        FileNotFoundError: ``folder`` lacks a file.
        FileExistsError: ``out`` is not empty.
        ValueError: an object has an unknown class, or a file is damaged.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f'--out: {out} is not empty. Delete it, or choose another directory.')
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as parent:
        made = Path(parent) / out.name
        (made / 'annotations').mkdir(parents=True)
        for split in SPLITS:
            names = (folder / f'ImageSets/Main/{split}.txt').read_text().split()
            if split == 'train':
                random.Random(SEED).shuffle(names)
            (made / split).mkdir()
            book = dict(images=[], annotations=[], categories=[dict(id=i, name=c) for i, c in enumerate(CLASSES)])
            for name in names:
                add_image(folder, name, made / split, book)
            (made / f'annotations/{split}.json').write_text(json.dumps(book))
            print(f'{split}: {len(book["images"])} images, {len(book["annotations"])} boxes')
        os.replace(made, out)


def add_image(folder: Path, name: str, target: Path, book: dict) -> None:
    """Writes an image into ``target`` and adds it with its boxes to the COCO ``book``. Prints boxes without area."""
    path = folder / f'JPEGImages/{name}.jpg'
    image = cv2.imread(str(path))
    if image is None:
        raise ValueError(f'{path} is missing or not an image')
    annotation = folder / f'Annotations/{name}.xml'
    try:
        objects = list(ElementTree.parse(annotation).iter('object'))
    except ElementTree.ParseError as error:
        raise ValueError(f'{annotation} is not valid XML: {error}') from None
    scale_x, scale_y = SIZE[0] / image.shape[1], SIZE[1] / image.shape[0]
    image_id = len(book['images'])
    if not cv2.imwrite(str(target / f'{name}.png'), cv2.resize(image, SIZE, interpolation=cv2.INTER_AREA)):
        raise OSError(f'cannot write {str(target / name)!r}')
    book['images'].append(dict(id=image_id, file_name=f'{name}.png', width=SIZE[0], height=SIZE[1]))
    for item in objects:
        label = item.findtext('name')
        if label not in CLASSES:
            raise ValueError(f'{annotation}: unknown class {label!r}, expected one of {", ".join(CLASSES)}')
        left, top, right, bottom = (float(item.findtext(f'bndbox/{side}')) for side in ('xmin', 'ymin', 'xmax', 'ymax'))
        if right <= left or bottom <= top:
            print(f'{annotation}: skips a box of {label} without area, ({left:g}, {top:g}) to ({right:g}, {bottom:g})')
            continue
        width, height = (right - left) * scale_x, (bottom - top) * scale_y
        book['annotations'].append(dict(  # ids from 1, since pycocotools takes 0 for "no match"
            id=len(book['annotations']) + 1, image_id=image_id, category_id=CLASSES.index(label), iscrowd=0,
            bbox=[left * scale_x, top * scale_y, width, height], area=width * height))


if __name__ == '__main__':
    main()
