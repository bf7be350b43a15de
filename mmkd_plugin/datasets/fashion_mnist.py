"""Fashion-MNIST from the files that Debian packages, laid out as MMPretrain's ``FashionMNIST`` reads it.

Xiao, Rasul, Vollgraf, *Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms*,
arXiv 1708.07747: 70,000 photographs of clothing, 28 x 28, of ten classes.
"""
import gzip
import os
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

PACKAGE = 'dataset-fashion-mnist'
CLASSES = ('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')
IMAGES, LABELS = '{}-images-idx3-ubyte', '{}-labels-idx1-ubyte'
FILES = [name.format(split) for split in ('train', 't10k') for name in (IMAGES, LABELS)]


def find_fashion_mnist() -> Path:
    """Returns the folder that holds the four ``*-ubyte.gz`` of the installed Debian package.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    try:
        listed = subprocess.run(['dpkg', '-L', PACKAGE], capture_output=True, text=True).stdout.splitlines()
    except OSError:  # not a Debian
        listed = []
    for line in listed:
        if line.endswith(f'/{FILES[0]}.gz') and Path(line).exists():
            return Path(line).parent
    raise FileNotFoundError(f'Fashion-MNIST is not there: install it with `apt-get install {PACKAGE}`, or name with '
                            f'--source a folder that holds {", ".join(f"{name}.gz" for name in FILES)}')


def unpack_fashion_mnist(root: str | Path, source: str | Path) -> bool:
    """Unpacks the four files of the folder ``source`` into ``root``, which appears complete or not at all.

    Returns:
        False if they are there already.

    Raises:
        FileNotFoundError: ``source`` lacks one of them.
        FileExistsError: ``root`` holds something else.
    """
    root, source = Path(root), Path(source)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        missing = [name for name in FILES if not (root / name).exists()]
        if missing:
            raise FileExistsError(f'{root} is not empty and lacks {missing[0]}: delete it, or choose another directory')
        return False
    for name in FILES:
        if not (source / f'{name}.gz').exists():
            raise FileNotFoundError(f'{source / name}.gz is not there: --source must hold '
                                    f'{", ".join(f"{name}.gz" for name in FILES)}')
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f'.{root.name}-', dir=root.parent) as parent:
        made = Path(parent) / root.name
        made.mkdir()
        for name in FILES:
            (made / name).write_bytes(gzip.decompress((source / f'{name}.gz').read_bytes()))
        os.replace(made, root)
    return True


def read_split(root: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images (N, 28, 28), uint8, and the labels (N,) of ``'train'`` or ``'t10k'`` unpacked in ``root``."""
    images = np.frombuffer((Path(root) / IMAGES.format(split)).read_bytes(), np.uint8, offset=16)
    labels = np.frombuffer((Path(root) / LABELS.format(split)).read_bytes(), np.uint8, offset=8)
    return images.reshape(len(labels), 28, 28), labels
