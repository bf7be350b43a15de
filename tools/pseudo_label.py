"""Writes a teacher's predictions on unlabelled images as labels for training.

For a detector, it writes a COCO file with the categories of the config's validation set. For a classifier, it writes a
list of files and classes for MMPretrain's CustomDataset. Predictions with a score below --score-thr are left out.
"""
import argparse
import json
import sys
from pathlib import Path

from mmengine.config import DictAction
from mmengine.device import get_device
from mmengine.utils import track_iter_progress

import mmkd_plugin  # noqa: F401  makes MMRazor importable
from mmkd_plugin.config.loading import read_config
from mmkd_plugin.deploy.files import finished, refuse_existing
from mmkd_plugin.deploy.pseudo_labels import (
    IOU,
    class_list,
    coco_annotations,
    images_in,
    labelling_model,
    validation_threshold,
)
from mmkd_plugin.deploy.student import plain_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the distillation or of the teacher')
    parser.add_argument('teacher_ckpt', help='weights of the teacher')
    parser.add_argument('images', type=Path, help='folder of images, with its subfolders')
    parser.add_argument('-o', '--out', required=True, help='file to write')
    parser.add_argument('--score-thr', type=_threshold, default='auto', metavar='auto|SCORE',
                        help='smallest score of a label (default: %(default)s, which is the score with the largest F1 '
                             f"on the config's validation set; a detection is correct if its IoU is at least {IOU})")
    parser.add_argument('--overwrite', action='store_true', help='replace the file if it exists')
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='allow the weights to run code; use it only if you trust their source')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override fields of the config')
    args = parser.parse_args()
    try:
        label(args)
    except ValueError as error:
        sys.exit(str(error))


def _threshold(text: str) -> str | float:
    if text == 'auto':
        return text
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'expected auto or a number from 0 to 1, got {text}')
    return value


def label(args: argparse.Namespace) -> None:
    refuse_existing('--out', args.out, args.overwrite)
    count = len(images_in(args.images))
    cfg = read_config(args.config, args.cfg_options)
    model = labelling_model(cfg, args.teacher_ckpt, args.trust_checkpoint).to(get_device())
    plain, threshold = plain_config(cfg), args.score_thr
    if threshold == 'auto':
        threshold, f1 = validation_threshold(model, plain, track_iter_progress)
        print(f'\n--score-thr: {threshold:.4f}, with an F1 of {f1:.3f} on the validation set')
    if hasattr(model, 'head'):
        lines = class_list(model, plain, args.images, threshold, track_iter_progress)
        text, labels = ''.join(f'{line}\n' for line in lines), len(lines)
    else:
        annotations = coco_annotations(model, plain, args.images, threshold, track_iter_progress)
        annotations['info'] = dict(description=f'detections of {args.teacher_ckpt}, score at least {threshold:.4f}')
        text, labels = json.dumps(annotations), len(annotations['annotations'])
    with finished('--out', args.out, args.overwrite) as file:
        file.write_text(text)
    print(f'\n{args.out}: {labels} labels of {count} images')


if __name__ == '__main__':
    main()
