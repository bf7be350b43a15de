"""Writes the config that distils one model into another: chooses the layers, and tries one training step."""
import argparse
import sys

import mmkd_plugin  # noqa: F401  makes MMRazor importable
from mmkd_plugin.compose import BASES, METHODS, compose


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='allow the weights to run code; use it only if you trust their source')
    parser.add_argument('-o', '--out', required=True, help='file to write')
    parser.add_argument('--overwrite', action='store_true', help='replace the file if it exists')
    return parser.parse_args()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that describe the distillation."""
    parser.add_argument('student', help='config of the student alone: a file, mmdet::... or mmpretrain::...')
    parser.add_argument('teacher', help='config of the teacher: a file, mmdet::... or mmpretrain::...')
    parser.add_argument('--method', choices=METHODS, required=True)
    parser.add_argument('--base', choices=BASES,
                        help='base of the methods sokd and feature; default: reviewkd for classifiers; for detectors '
                             'pkd if the channels are equal, else fitnet')
    parser.add_argument('--layers', nargs='+', default=(), metavar='NAME',
                        help='modules to compare, NAME or STUDENT=TEACHER; default: those whose strides match')
    parser.add_argument('--teacher-ckpt', required=True, metavar='FILE', help='weights of the teacher: a file or a URL')


def main() -> None:
    try:
        print(compose(**vars(parse_args())))
    except ValueError as error:
        sys.exit(f'compose_config: {error}')


if __name__ == '__main__':
    main()
