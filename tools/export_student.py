"""Writes the student of a distillation checkpoint as a checkpoint of plain MMDetection or MMPretrain.

What was written is loaded strictly and must put out, to the bit, what the distilled student does. A report beside it,
student.json for student.pth, says what student and teacher cost.
"""
import argparse
import json
import sys
from pathlib import Path

from mmengine.config import Config, DictAction

from mmkd_plugin.compat import StackError
from mmkd_plugin.deploy.environment import environment, markdown
from mmkd_plugin.deploy.onnx_export import check_onnx, export_onnx
from mmkd_plugin.deploy.report import COLUMNS, report_student, rows
from mmkd_plugin.deploy.sample_batch import sample_batch
from mmkd_plugin.deploy.student import build_student, export_student, image_channels, plain_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the distillation')
    parser.add_argument('checkpoint', help='any checkpoint of it')
    parser.add_argument('out', help='file to write')
    parser.add_argument('--overwrite', action='store_true', help='replace files that exist')
    parser.add_argument('--onnx', metavar='FILE', help='also write the network as ONNX, checked with ONNX Runtime')
    parser.add_argument('--evaluate', action='store_true',
                        help='run the config\'s test with the student, and with the teacher if its weights are here')
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='load the checkpoint even if it could run code; only if you trust whoever made it')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override fields of the config')
    args = parser.parse_args()
    try:
        export(args)
    except (ValueError, StackError) as error:
        sys.exit(str(error))


def export(args: argparse.Namespace) -> None:
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    if args.onnx:
        check_onnx(args.onnx, args.overwrite)
    path = Path(args.out).with_suffix('.json')
    if path.exists() and not args.overwrite:
        raise ValueError(f'out: the report {str(path)!r} exists; choose another name, or overwrite it with --overwrite')
    foreign = export_student(cfg, args.checkpoint, args.out, args.overwrite, args.trust_checkpoint)
    if foreign:
        print(f'{args.out}: the student, complete; but MMDetection and MMPretrain do not have its '
              f'{", ".join(foreign)}: load it with the student\'s own config after `import mmkd_plugin`.')
    else:
        print(f'{args.out}: the student, complete; load it with the student\'s own config and neither mmkd_plugin '
              'nor mmrazor.')
    model = build_student(cfg, args.out, args.trust_checkpoint).eval()
    batch, images = sample_batch(plain_config(cfg), image_channels(model))
    print(f'Checked with {images}: its outputs are those of the distilled student, to the bit.')
    report = dict(checkpoint=args.checkpoint, file=args.out, checked_with=images, environment=environment('cpu'),
                  **report_student(cfg, args.out, args.evaluate, args.trust_checkpoint))
    write(path, report)
    print(markdown(COLUMNS, rows(report)))
    if (report['teacher'] or {}).get('missing'):
        print(f'The teacher is not in it: {report["teacher"]["missing"]}')
    size, threads = ' x '.join(map(str, report['input'][2:])), report['environment']['threads']
    print(f'Of one image of {size}, without post-processing, on this CPU, threads: {threads}. Report: {path}')
    if args.onnx:
        found = export_onnx(model, batch, args.onnx, args.overwrite)
        write(path, dict(report, onnx=dict(found, file=args.onnx)))
        print(f'{args.onnx}: ONNX Runtime differs from PyTorch by at most {found["largest_difference"]:.0e} of the '
              f'largest output. Outputs: {", ".join(found["outputs"])}. Input:')
        print(*(f'  {key}: {value}' for key, value in found['input'].items()), sep='\n')


def write(path: Path, report: dict) -> None:
    path.write_text(json.dumps(report, indent=2) + '\n')


if __name__ == '__main__':
    main()
