"""Distils a teacher into a student in one command: writes the config as compose_config.py and trains it as train.py.

The config is written to work_dirs/STUDENT_from_TEACHER_METHOD.py by default, and with --base to
work_dirs/STUDENT_from_TEACHER_METHOD_BASE.py. --resume uses the existing config.
"""
import argparse
import sys
from pathlib import Path

import compose_config
import train

from mmkd_plugin.compose import compose


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    compose_config.add_options(parser)
    parser.add_argument('-o', '--out', help='config to write; default: work_dirs/STUDENT_from_TEACHER_METHOD.py, with '
                        '--base work_dirs/STUDENT_from_TEACHER_METHOD_BASE.py')
    train.add_options(parser)
    args = parser.parse_args()
    loss = '_'.join(filter(None, (args.method, args.base)))
    args.config = args.out or f'work_dirs/{_stem(args.student)}_from_{_stem(args.teacher)}_{loss}.py'
    args.work_dir = args.work_dir or str(Path('work_dirs') / Path(args.config).stem)
    return args


def _stem(config: str) -> str:
    return Path(config.rpartition('::')[2]).stem


def main() -> None:
    args = parse_args()
    if args.resume and not Path(args.config).is_file():
        sys.exit(f'distill: --resume: no config {args.config!r}. Run the same command without --resume first')
    if not args.resume:
        Path(args.config).parent.mkdir(parents=True, exist_ok=True)
        try:  # all processes of a distributed training write the same file
            print(compose(args.student, args.teacher, args.method, args.teacher_ckpt, args.config, args.base,
                          args.layers, overwrite=True, trust_checkpoint=args.trust_checkpoint))
        except ValueError as error:
            sys.exit(f'distill: {error}')
    train.train(args)


if __name__ == '__main__':
    main()
