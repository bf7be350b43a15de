"""Writes the student of a distillation checkpoint as a checkpoint of plain MMDetection or MMPretrain.

The written file is loaded strictly, and its outputs must be bit-identical to those of the distilled student. The report
student.json beside student.pth has the cost of student and teacher. --onnx and --int8 also write the student for
deployment, and --report a page with pictures.
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path

from mmengine.config import Config, DictAction

from mmkd_plugin.checkpoints.reading import read_checkpoint
from mmkd_plugin.compat import StackError
from mmkd_plugin.config.loading import read_config
from mmkd_plugin.deploy.calibration import calibration_batches
from mmkd_plugin.deploy.environment import environment, markdown
from mmkd_plugin.deploy.evaluation import evaluate
from mmkd_plugin.deploy.files import finished, refuse_existing
from mmkd_plugin.deploy.html import page
from mmkd_plugin.deploy.int8 import quantize
from mmkd_plugin.deploy.onnx_export import check_onnx, export_onnx, graph_of
from mmkd_plugin.deploy.pictures import draw
from mmkd_plugin.deploy.report import COLUMNS, Report
from mmkd_plugin.deploy.sample_batch import sample_batch, test_pipeline
from mmkd_plugin.deploy.student import build_student, export_student, plain_config
from mmkd_plugin.models.dummy_input import input_channels
from mmkd_plugin.utils import type_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the distillation')
    parser.add_argument('checkpoint', help='any checkpoint of the distillation')
    parser.add_argument('out', help='file to write')
    parser.add_argument('--overwrite', action='store_true', help='replace files that exist')
    parser.add_argument('--onnx', metavar='FILE', nargs='?', const='',
                        help='also write ONNX, from pixels to detections or scores, checked with ONNX Runtime; '
                        'default FILE: OUT with the suffix .onnx')
    parser.add_argument('--onnx-raw', action='store_true',
                        help='end the ONNX graph of a detector at the outputs of its head')
    parser.add_argument('--int8', action='store_true',
                        help='also write the ONNX graph in eight bits, with the suffix .int8.onnx')
    parser.add_argument('--calibrate', type=int, default=64, metavar='N',
                        help='number of training images to calibrate --int8 with (default: %(default)s)')
    parser.add_argument('--max-drop', type=float, default=1.0, metavar='POINTS',
                        help='largest drop of accuracy for --int8, in points (default: %(default)s)')
    parser.add_argument('--report', action='store_true', help='also write the report as a page, with the suffix .html')
    parser.add_argument('--baseline', metavar='FILE',
                        help='checkpoint of the same student trained without a teacher, for comparison in the report')
    parser.add_argument('--evaluate', action='store_true',
                        help='evaluate all models on the test set, the teacher if its weights are available')
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='allow the checkpoint to run code; use it only if you trust its source')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override fields of the config')
    args = parser.parse_args()
    try:
        export(args)
    except (ValueError, StackError, OSError) as error:
        sys.exit(str(error))


def export(args: argparse.Namespace) -> None:
    cfg = read_config(args.config, args.cfg_options)
    files = files_of(args)
    plain = plain_config(cfg)
    # reports missing data before the export starts
    images = calibration_batches(plain, args.calibrate) if args.int8 else []
    if args.onnx is not None:
        graph_of(build_student(cfg, args.checkpoint, args.trust_checkpoint), args.onnx_raw)
        check_pixels(test_pipeline(plain))
    say_exported(args, export_student(cfg, args.checkpoint, args.out, args.overwrite, args.trust_checkpoint))
    model = build_student(cfg, args.out, args.trust_checkpoint).eval()
    batch, source = sample_batch(plain, input_channels(model))
    print(f'Checked with {source}: its outputs are bit-identical to those of the distilled student.')

    run_test = partial(evaluate, plain, option='--onnx', trust_checkpoint=args.trust_checkpoint)
    report = Report(cfg, args.out, batch, args.baseline, args.trust_checkpoint)
    failure = None
    if args.evaluate:
        report.evaluate_all()
    if args.onnx is not None:
        accuracy = report.evaluate('student') if args.evaluate or args.int8 else None
        found = export_onnx(model, batch, files['onnx'], args.overwrite, args.onnx_raw, about(args, plain),
                            None if accuracy is None or args.onnx_raw else run_test, accuracy)
        if not args.onnx_raw:
            report.add_onnx('onnx', files['onnx'], found)
        say_onnx(files['onnx'], found)
    if args.int8:
        try:
            found = quantize(files['onnx'], files['int8'], images, run_test, report.found['onnx']['accuracy'],
                             args.max_drop, args.overwrite)
            report.add_onnx('int8', files['int8'], found)
            say_int8(files['int8'], found)
        except ValueError as error:  # raised after the other results are reported
            failure = error
    report.time()

    text = dict(config=args.config, checkpoint=args.checkpoint, file=args.out, checked_with=source,
                data=plain.get('test_dataloader', {}).get('dataset', {}).get('data_root') or source,
                environment=environment('cpu'), input=report.input, **report.found)
    with finished('out', files['json'], args.overwrite) as unfinished:
        unfinished.write_text(json.dumps(text, indent=2) + '\n')
    print(markdown(COLUMNS, report.rows()))
    for name, found in report.found.items():
        if (found or {}).get('missing'):
            print(f'The table has no {name}: {found["missing"]}')
    size, threads = ' x '.join(map(str, report.input[2:])), text['environment']['threads']
    print(f'Latency is measured on one image of {size}, from pixels to detections or scores, on this CPU, threads: '
          f'{threads}. Report: {files["json"]}')
    if args.report:
        shown = {name: found for name, found in report.models.items() if name not in report.without_weights}
        with finished('--report', files['html'], args.overwrite) as unfinished:
            unfinished.write_text(page(text, report.rows(), draw(plain, shown)))
        print(f'{files["html"]}: the report with pictures.')
    if failure:
        raise failure


def files_of(args: argparse.Namespace) -> dict[str, str]:
    """Returns the files to write besides OUT. Raises ``ValueError`` if one exists, or if options do not fit."""
    for option, given in (('--int8', args.int8), ('--onnx-raw', args.onnx_raw)):
        if given and args.onnx is None:
            raise ValueError(f'{option}: needs the ONNX file. Add --onnx')
    if args.int8 and args.onnx_raw:
        raise ValueError('--int8: raw outputs cannot be evaluated, so --max-drop cannot be checked. Leave out '
                         '--onnx-raw')
    out = Path(args.out)
    files = dict(json=str(out.with_suffix('.json')))
    if args.onnx is not None:
        files['onnx'] = args.onnx or str(out.with_suffix('.onnx'))
        check_onnx(files['onnx'], args.overwrite)
    if args.int8:
        files['int8'] = str(Path(files['onnx']).with_suffix('.int8.onnx'))
    if args.report:
        files['html'] = str(out.with_suffix('.html'))
    for name, option in (('json', 'out'), ('int8', '--int8'), ('html', '--report')):
        if name in files:
            refuse_existing(option, files[name], args.overwrite)
    return files


def about(args: argparse.Namespace, plain: Config) -> dict:
    """Returns the metadata that serving needs besides the graph: the classes and the size of the images."""
    meta = read_checkpoint(args.out, 'out', args.trust_checkpoint)['meta'].get('dataset_meta') or {}
    found = dict(classes=list(meta['classes'])) if meta.get('classes') else {}
    return {**found, **preparation(test_pipeline(plain))}


def check_pixels(pipeline: list[dict]) -> None:
    """Checks that a test pipeline gives pixels, and that its channel order is known from ``img_path``.

    Raises:
        ValueError: the pipeline normalises images, or reads files and does not say so in ``meta_keys``.
    """
    kinds = [type_name(step['type']) for step in pipeline]
    if 'Normalize' in kinds:
        raise ValueError('--onnx: the test pipeline has Normalize, so the graph could not take pixels. Set mean, std '
                         'and bgr_to_rgb or to_rgb in data_preprocessor instead')
    for step in pipeline:
        if 'LoadImageFromFile' in kinds and 'img_path' not in step.get('meta_keys', ['img_path']):
            raise ValueError(f'--onnx: meta_keys of {step["type"]} in the test pipeline lacks img_path, from which the '
                             'channel order of the images is known. Add it')


def preparation(pipeline: list[dict]) -> dict:
    """Returns the limits of the longer and shorter side (``scale``) and the padding of a detector's test pipeline.

    ``pad`` is the width and height to which images are padded on the right and at the bottom, ``pad_with`` the value of
    red, green and blue. Both are left out if the pipeline does not pad, or to sizes that differ between images.
    """
    found: dict = {}
    for step in pipeline:
        kind = type_name(step['type'])
        if kind == 'Resize' and step.get('keep_ratio'):
            found['scale'] = list(step['scale'])
        if kind == 'Pad':
            size = step.get('size')
            if step.get('pad_to_square') and len({*found.get('scale', ())}) == 1:
                size = found['scale']  # the longer side of the resized image
            if size:
                value = step.get('pad_val', 0)
                value = value.get('img', 0) if isinstance(value, dict) else value
                value = [value] * 3 if isinstance(value, (int, float)) else value
                found.update(pad=list(size), pad_with=[*reversed(value)])  # the pipeline's images are BGR
    return found


def say_exported(args: argparse.Namespace, foreign: list[str]) -> None:
    if foreign:
        print(f'{args.out}: the complete student. MMDetection and MMPretrain do not have its {", ".join(foreign)}: '
              'load it with the student\'s own config after `import mmkd_plugin`.')
    else:
        print(f'{args.out}: the complete student. You can load it with the student\'s own config and neither '
              'mmkd_plugin nor mmrazor.')


def say_onnx(file: str, found: dict) -> None:
    agreement = ', '.join(f'{key.replace("_", " ")} {value:.2g}' for key, value in found['agreement'].items())
    print(f'{file}: ONNX Runtime agrees with PyTorch ({agreement}). Outputs: {", ".join(found["outputs"])}. Inputs:')
    print(*(f'  {key}: {value}' for key, value in found['input'].items()), sep='\n')


def say_int8(file: str, found: dict) -> None:
    print(f'{file}: {found["metric"]} {found["float"]:.2f} in float, {found["int8"]:.2f} in eight bits. Layers left in '
          f'float, of {found["layers"]}: {", ".join(found["left_in_float"]) or "none"}.')


if __name__ == '__main__':
    main()
