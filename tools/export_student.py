"""Writes the student of a distillation checkpoint as a checkpoint of plain MMDetection or MMPretrain."""
import argparse

from mmengine.config import Config, DictAction

import mmkd_plugin  # noqa: F401  makes MMRazor importable
from mmkd_plugin.student import export_student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the distillation')
    parser.add_argument('checkpoint', help='any checkpoint of it')
    parser.add_argument('out', help='file to write')
    parser.add_argument('--overwrite', action='store_true', help='replace the file if it exists')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override fields of the config')
    args = parser.parse_args()
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    foreign = export_student(cfg, args.checkpoint, args.out, args.overwrite)
    if foreign:
        print(f'{args.out}: the student, complete; but MMDetection and MMPretrain do not have its '
              f'{", ".join(foreign)}: load it with the student\'s own config after `import mmkd_plugin`.')
    else:
        print(f'{args.out}: the student, complete; load it with the student\'s own config and neither mmkd_plugin '
              'nor mmrazor.')


if __name__ == '__main__':
    main()
