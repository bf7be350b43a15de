"""Creates the demo's detection data set: real handwritten digits on photographs, in COCO format."""
import argparse
import sys

from mmengine import track_iter_progress

from mmkd_plugin.datasets.digits import make_digits


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--root', default='data/digits', help='folder to create')
    parser.add_argument('--num-train', type=int, default=1600, help='number of training images')
    parser.add_argument('--num-val', type=int, default=200, help='number of validation images')
    parser.add_argument('--image-size', type=int, default=128, help='height and width of an image in pixels')
    parser.add_argument('--seed', type=int, default=0, help='seed of the data set')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        bar = track_iter_progress if sys.stdout.isatty() else iter  # a bar would add 100 kB to a log
        made = make_digits(**vars(args), track=bar)
    except (FileExistsError, ValueError) as error:
        sys.exit(f'make_digits: {error}')
    print(f'{args.root}: created' if made else f'{args.root}: exists already, nothing to do')


if __name__ == '__main__':
    main()
