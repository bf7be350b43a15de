"""Writes the config that distils one model into another: proposes the layers, and tries them for one step."""
import argparse
import sys

import mmkd_plugin  # noqa: F401  makes MMRazor importable
from mmkd_plugin.compose import BASES, METHODS, compose


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='load the weights even if they could run code; only if you trust whoever made them')
    parser.add_argument('-o', '--out', required=True, help='file to write')
    parser.add_argument('--overwrite', action='store_true', help='replace the file if it exists')
    return parser.parse_args()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says which distillation to compose."""
    parser.add_argument('student', help='config of the plain student: a file, or mmdet::... or mmpretrain::...')
    parser.add_argument('teacher', help='config of the teacher, likewise')
    parser.add_argument('--method', choices=METHODS, required=True)
    parser.add_argument('--base', choices=BASES,
                        help='what sokd builds on, and feature is; default: reviewkd for classifiers, for detectors '
                             'pkd where channels agree, else fitnet')
    parser.add_argument('--layers', nargs='+', default=(), metavar='NAME',
                        help='modules to distil, NAME or STUDENT=TEACHER; default: those whose strides match')
    parser.add_argument('--teacher-ckpt', required=True, metavar='FILE', help='weights of the teacher, or an address')


def main() -> None:
    try:
        print(compose(**vars(parse_args())))
    except ValueError as error:
        sys.exit(f'compose_config: {error}')


if __name__ == '__main__':
    main()
