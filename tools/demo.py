"""Distils a small detector of real handwritten digits on a CPU, and reports the gain of the student.

It trains a teacher, a student alone, the same student started from the teacher's weights ("inherited"), and that
student with distillation. It exports each student and evaluates the exported file with plain MMDetection.
"""
import argparse
import hashlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import mmdet
import torch
from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

import mmkd_plugin
from mmkd_plugin.deploy.cost import measure
from mmkd_plugin.deploy.student import build_student, export_student, plain_config

CORES = os.cpu_count() or 1
ONE_AT_A_TIME = threading.Lock()  # reading configs and the default scope of MMEngine are not thread-safe
PLAIN_TEST = Path(mmdet.__file__).parent / '.mim/tools/test.py'
VARIANTS = {
    'teacher': 'configs/benchmarks/digits/retinanet_r18-c32_digits.py',
    'student': 'configs/benchmarks/digits/retinanet_r18-c16_digits-300.py',
    'inherited': 'configs/benchmarks/digits/inherit_retinanet_r18-c32_retinanet_r18-c16_digits-300.py',
    'amd': 'configs/benchmarks/digits/amd_fpn_retinanet_r18-c32_retinanet_r18-c16_digits-300.py',
    'fitnet': 'configs/benchmarks/digits/fitnet_fpn_retinanet_r18-c32_retinanet_r18-c16_digits-300.py',
    'unlabelled': 'configs/benchmarks/digits/fitnet-unlabelled_fpn_retinanet_r18-c32_retinanet_r18-c16_digits-300.py',
    'sokd': 'configs/benchmarks/digits/sokd-fitnet_fpn_retinanet_r18-c32_retinanet_r18-c16_digits-300.py',
}
LABELS = {
    'teacher': 'teacher',
    'student': 'student alone',
    'inherited': 'student alone, inherited start',
    'amd': 'distilled: AMD, inherited start',
    'fitnet': 'distilled: FitNet, inherited start',
    'unlabelled': 'distilled: FitNet and 1,300 unlabelled images, inherited start',
    'sokd': 'distilled: SoKD on FitNet, inherited start',
}
COLUMNS = {
    'bbox_mAP': ('AP', '{:.3f}'),
    'bbox_mAP_50': ('AP50', '{:.3f}'),
    'params': ('parameters', '{:,.0f}'),
    'flops': ('FLOPs', '{:,.0f}'),
    'latency_ms': ('CPU latency (ms)', '{:.1f}'),
    'file_bytes': ('file (bytes)', '{:,.0f}'),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seeds', type=int, nargs='+', default=[1],
                        help='seeds of the students; the teacher has seed 0, on which the weights were tuned')
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, help='variants to train',
                        default=['teacher', 'student', 'inherited', 'amd', 'sokd'])
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'))
    args = parser.parse_args()
    began = time.time()
    subprocess.run([sys.executable, 'tools/dataset_converters/make_digits.py'], check=True)
    chosen = [variant for variant in VARIANTS if variant in args.variants]
    runs = {'teacher': [run_variant('teacher', 0, args.work_dir, CORES)]} if 'teacher' in chosen else {}
    jobs = min(2, CORES)  # students at a time
    with ThreadPoolExecutor(jobs) as pool:
        students = {variant: [pool.submit(run_variant, variant, seed, args.work_dir, CORES // jobs)
                              for seed in args.seeds] for variant in chosen if variant != 'teacher'}
        runs.update({variant: [each.result() for each in started] for variant, started in students.items()})
    measure_together(runs)

    report = {variant: summary(found) for variant, found in runs.items()}
    report['meta'] = dict(seeds=args.seeds, torch=torch.__version__, mmdet=mmdet.__version__,
                          mmkd_plugin=mmkd_plugin.__version__, cpus=os.cpu_count(), seconds=round(time.time() - began))
    path = args.work_dir / 'report.json'
    path.write_text(json.dumps(report, indent=2))
    print('\n' + table(report))
    print(f'\nSeeds {args.seeds}, {report["meta"]["seconds"]} s. Table: {path}')
    picture = args.work_dir / 'detections.png'
    draw(runs, picture)
    print(f'Ground truth and detections: {picture}')


def run_variant(variant: str, seed: int, root: Path, threads: int) -> dict:
    """Trains, exports and evaluates one variant, or returns the result of an earlier call with the same config."""
    work_dir = root / (variant if variant == 'teacher' else f'{variant}_seed{seed}')
    with ONE_AT_A_TIME:
        options = dict(work_dir=str(work_dir), randomness=dict(seed=seed))
        cfg = Config.fromfile(VARIANTS[variant])
        if 'teacher_ckpt' in cfg.model:
            options['model.teacher_ckpt'] = str(find_latest_checkpoint(root / 'teacher'))
        cfg.merge_from_dict(options)
        work_dir.mkdir(parents=True, exist_ok=True)
        config, done, state = work_dir / 'config.py', work_dir / 'result.json', work_dir / 'state.sha256'
        same = state.exists() and state.read_text() == fingerprint(cfg)
        if same and done.exists():
            print(f'{LABELS[variant]}, seed {seed}: already done, in {work_dir}')
            return json.loads(done.read_text())
        config.write_text(cfg.pretty_text)
        state.write_text(fingerprint(cfg))
    train(f'{LABELS[variant]}, seed {seed}', [sys.executable, '-W', 'ignore', 'tools/train.py', config]
          + (['--resume'] if same else []), work_dir / 'train.log', threads)

    with ONE_AT_A_TIME:
        exported, plain = work_dir / 'student.pth', work_dir / 'plain_config.py'
        export_student(cfg, str(find_latest_checkpoint(work_dir)), str(exported), overwrite=True)
        plain_config(cfg).dump(plain)
        tested = work_dir / 'test'
        run([sys.executable, '-W', 'ignore', PLAIN_TEST, plain, exported, '--work-dir', tested], work_dir / 'test.log')
        metrics = json.loads(max(tested.glob('*/*.json')).read_text())
        result = dict(seed=seed, config=str(plain), exported=str(exported), file_bytes=exported.stat().st_size,
                      **{key.removeprefix('coco/'): value for key, value in metrics.items() if 'bbox' in key})
        done.write_text(json.dumps(result, indent=2))
        return result


def fingerprint(cfg: Config) -> str:
    """Returns a hash of everything that determines a result: the config, this package's code, the data, the teacher."""
    files = [*Path(mmkd_plugin.__file__).parent.rglob('*.py'), Path(cfg.data_root) / 'digits.json']
    if 'teacher_ckpt' in cfg.model:
        files.append(Path(cfg.model.teacher_ckpt))
    total = hashlib.sha256(cfg.pretty_text.encode())
    for file in sorted(files):
        total.update(file.read_bytes())
    return total.hexdigest()


def train(label: str, command: list, log: Path, threads: int) -> None:
    """Runs a training, prints its progress, and writes its log to a file."""
    began = time.time()
    pattern = re.compile(r'Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\].*? eta: (\S+).*? loss: ([\d.]+)')
    with log.open('w') as file, subprocess.Popen(
            [*map(str, command)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=dict(os.environ, OMP_NUM_THREADS=str(threads))) as process:
        for line in process.stdout:
            file.write(line)
            found = pattern.search(line)
            if found:
                epoch, step, steps, eta, loss = found.groups()
                print(f'{label}: epoch {epoch}, step {step}/{steps}, loss {loss}, {eta} left', flush=True)
    check(process.returncode, command, log)
    print(f'{label}: trained in {time.time() - began:.0f} s. Log: {log}' + ' ' * 20, flush=True)


def run(command: list, log: Path) -> None:
    with log.open('w') as file:
        check(subprocess.run([*map(str, command)], stdout=file, stderr=subprocess.STDOUT).returncode, command, log)


def check(code: int, command: list, log: Path) -> None:
    if code:
        sys.exit(f'{" ".join(map(str, command))} failed. The end of {log}:\n' + log.read_text()[-3000:])


def measure_together(runs: dict[str, list[dict]]) -> None:
    """Adds parameters, FLOPs and latency of one image of 128 x 128."""
    image = dict(inputs=torch.zeros(1, 3, 128, 128))
    costs = measure({variant: (build_student(Config.fromfile(found[0]['config']), found[0]['exported']).eval(), image)
                     for variant, found in runs.items()})
    for variant, found in runs.items():
        for result in found:
            result.update(costs[variant])


def summary(found: list[dict]) -> dict:
    """Returns the mean over seeds, with the standard deviation of AP if there are several."""
    out = {}
    for key in COLUMNS:
        values = [result[key] for result in found]
        out[key] = values[0] if len(set(values)) == 1 else statistics.fmean(values)
    out['seeds'] = {str(result['seed']): result['bbox_mAP'] for result in found}
    if len(found) > 1:
        out.update({f'{key}_std': statistics.stdev(result[key] for result in found)
                    for key in ('bbox_mAP', 'bbox_mAP_50')})
    return out


def table(report: dict) -> str:
    """Returns the report as a Markdown table."""
    lines = ['| | ' + ' | '.join(title for title, _ in COLUMNS.values()) + ' |', '|---' * (len(COLUMNS) + 1) + '|']
    for variant in (variant for variant in VARIANTS if variant in report):
        cells = [form.format(report[variant][key]) + (f' ± {report[variant][f"{key}_std"]:.3f}'
                                                  if f'{key}_std' in report[variant] else '')
                 for key, (_, form) in COLUMNS.items()]
        lines.append(f'| {LABELS[variant]} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def draw(runs: dict[str, list[dict]], out: Path) -> None:
    """Draws the ground truth and each model's detections on the first crowded validation images."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    import mmcv
    from mmdet.apis import inference_detector, init_detector
    cfg = Config.fromfile(runs['teacher'][0]['config'] if 'teacher' in runs else next(iter(runs.values()))[0]['config'])
    data = cfg.val_dataloader.dataset
    truth = json.loads((Path(data.data_root) / data.ann_file).read_text())
    boxes = {image['id']: [a for a in truth['annotations'] if a['image_id'] == image['id']]
             for image in truth['images']}
    images = [image for image in truth['images'] if len(boxes[image['id']]) >= 4][:5]
    figure, axes = plt.subplots(len(images), len(runs) + 1, figsize=(2.6 * (len(runs) + 1), 2.6 * len(images)),
                                squeeze=False)
    with redirect_stdout(io.StringIO()):  # it prints what it loads
        models = {variant: init_detector(found[0]['config'], found[0]['exported'], device='cpu')
                  for variant, found in runs.items()}
    for row, image in zip(axes, images):
        path = str(Path(data.data_root) / data.data_prefix.img / image['file_name'])
        pixels = mmcv.imread(path, channel_order='rgb')
        for axis, name in zip(row, ['truth', *models]):
            axis.imshow(pixels)
            axis.axis('off')
            if image is images[0]:
                axis.set_title(LABELS.get(name, name).replace(', ', ',\n'), fontsize=9)
            if name == 'truth':
                shown = [(a['bbox'], a['category_id'] - truth['categories'][0]['id'], None)
                         for a in boxes[image['id']]]
            else:
                found = inference_detector(models[name], path).pred_instances
                found = found[found.scores > 0.4]
                shown = [((x1, y1, x2 - x1, y2 - y1), label, score) for (x1, y1, x2, y2), label, score in zip(
                    found.bboxes.tolist(), found.labels.tolist(), found.scores.tolist())]
            for (x, y, w, h), label, score in shown:
                color = 'lime' if score is None else 'yellow'
                axis.add_patch(plt.Rectangle((x, y), w, h, fill=False, color=color))
                axis.text(x, y, truth['categories'][label]['name'] + ('' if score is None else f' {score:.2f}'),
                          fontsize=7, color='black', backgroundcolor=color, va='bottom',
                          bbox=dict(facecolor=color, pad=0.5, linewidth=0))
    figure.tight_layout()
    figure.savefig(out, dpi=90)


if __name__ == '__main__':
    main()
