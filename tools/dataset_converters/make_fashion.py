"""Makes the data of the accuracy benchmark from Debian's package dataset-fashion-mnist.

data/fashion_mnist are Fashion-MNIST's files, as MMPretrain reads them; data/clothing is a detection set of the same
photographs, in COCO format.
"""
import argparse
import sys
from pathlib import Path

from mmengine import track_iter_progress

from mmkd_plugin.datasets.clothing import make_clothing
from mmkd_plugin.datasets.fashion_mnist import find_fashion_mnist, unpack_fashion_mnist


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--source', type=Path, help='folder with the four *-ubyte.gz; by default the Debian package\'s')
    parser.add_argument('--root', type=Path, default=Path('data'), help='directory to make both in')
    parser.add_argument('--num-train', type=int, default=2000, help='training images for detection')
    parser.add_argument('--num-tuning', type=int, default=200, help='images to tune on')
    parser.add_argument('--num-test', type=int, default=300, help='test images')
    parser.add_argument('--image-size', type=int, default=64, help='side of an image in pixels')
    parser.add_argument('--seed', type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    fashion, clothing = args.root / 'fashion_mnist', args.root / 'clothing'
    bar = track_iter_progress if sys.stdout.isatty() else iter  # in a log it would be a line of 100 kB
    settings = {key: value for key, value in vars(args).items() if key not in ('source', 'root')}
    try:
        if fashion.exists() and args.source is None:
            say(fashion, unpack_fashion_mnist(fashion, fashion))
        else:
            say(fashion, unpack_fashion_mnist(fashion, args.source or find_fashion_mnist()))
        say(clothing, make_clothing(clothing, fashion, track=bar, **settings))
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        sys.exit(f'make_fashion: {error}')


def say(root: Path, made: bool) -> None:
    print(f'{root}: made' if made else f'{root}: there already, nothing to do')


if __name__ == '__main__':
    main()
