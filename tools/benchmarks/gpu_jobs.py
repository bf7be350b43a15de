"""Runs a user's jobs on one device in one process: training, resuming, exporting and visualising.

The models are those of the demo, on a few images of its digits. Each job is a command of this project with a user's
options. A job that fails does not stop the next, unless the next needs its output.
"""
import argparse
import json
import math
import os
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import cv2
import mmcv
import numpy
import torch

from mmkd_plugin.datasets.digits import make_digits
from mmkd_plugin.deploy.environment import environment

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs/benchmarks/digits'
TEACHER = CONFIGS / 'retinanet_r18-c32_digits.py'
METHODS = {
    'amd': (CONFIGS / 'amd_fpn_retinanet_r18-c32_retinanet_r18-c16_digits-300.py', []),
    'sokd': (CONFIGS / 'sokd-fitnet_fpn_retinanet_r18-c32_retinanet_r18-c16_digits-300.py',
             ['custom_hooks.0.search_epochs=1', 'custom_hooks.1.interval=1']),
}
# jobs that --quick leaves out, because another method has the same job
REPEATED = {'amd: train --amp', 'sokd: train, check the teacher', 'sokd: resume', 'sokd: export', 'sokd: visualise'}


class Day:
    """The jobs, in order. Jobs in the same folder use its files."""

    def __init__(self, folder: Path, images: int, device: str) -> None:
        self.folder, self.images, self.device = folder, images, device
        self.data = folder / 'digits'

    def jobs(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Yields the names and functions of the jobs."""
        yield 'make the digits', lambda: make_digits(self.data, num_train=self.images, num_val=4)
        yield 'train the teacher', lambda: self.train(TEACHER, 'teacher')
        for method, (config, options) in METHODS.items():
            yield f'{method}: train, check the teacher', lambda c=config, m=method, o=options: self.train(
                c, m, '--check-teacher', options=o)
            yield f'{method}: train --amp', lambda c=config, m=method, o=options: self.train(
                c, f'{m}_amp', '--amp', options=o)
            yield f'{method}: resume', lambda c=config, m=method, o=options: self.train(
                c, m, '--resume', epochs=2, options=o)
            yield f'{method}: export', lambda c=config, m=method: self.export(c, m)
            yield f'{method}: visualise', lambda c=config, m=method: command(
                'visualize', c, self.folder / m / 'epoch_2.pth', next((self.data / 'val').iterdir()), '--out-dir',
                self.folder / f'{m}_sheets', '--cfg-options', *self.options())
        config, options = METHODS['amd']
        yield 'amd: compiled student', lambda: self.train(self.compiled(config), 'amd_compiled', options=options)
        config, options = METHODS['sokd']
        yield 'sokd: one process of DDP', lambda: self.parallel(config, options)

    def options(self) -> list[str]:
        """Returns the ``--cfg-options`` of every command."""
        found = [f'{loader}_dataloader.dataset.data_root={self.data}/' for loader in ('train', 'val', 'test')]
        found += [f'{evaluator}_evaluator.ann_file={self.data}/annotations/val.json' for evaluator in ('val', 'test')]
        teacher = self.folder / 'teacher/epoch_1.pth'
        return found + ([f'model.teacher_ckpt={teacher}'] if teacher.exists() else [])

    def train(self, config: Path, name: str, *arguments: str, epochs: int = 1,
              options: list[str] | None = None) -> None:
        work_dir = self.folder / name
        command('train', config, '--work-dir', work_dir, *arguments, '--cfg-options', *self.options(),
                f'train_cfg.max_epochs={epochs}', 'default_hooks.checkpoint.interval=1',
                'default_hooks.logger.interval=1', f'train_dataloader.dataset.indices={self.images}',
                f'experiment_name={name}_{epochs}', f'visualizer.name={name}_{epochs}', *(options or []))
        if not (work_dir / f'epoch_{epochs}.pth').exists():
            raise RuntimeError(f'no checkpoint of epoch {epochs}')
        logged = max(work_dir.glob('*/vis_data/scalars.json'), key=lambda path: path.stat().st_mtime)
        steps = [json.loads(line) for line in logged.read_text().splitlines()]
        steps = [step for step in steps if 'loss' in step]
        wrong = {key: value for step in steps for key, value in step.items()
                 if 'loss' in key and not math.isfinite(value)}
        if wrong or not steps:
            raise RuntimeError(f'losses that are not finite: {wrong}' if wrong else 'no step was logged')

    def export(self, config: Path, method: str) -> None:
        onnx = ['--onnx'] if find_spec('onnx') and find_spec('onnxruntime') else []
        command('export_student', config, self.folder / method / 'epoch_2.pth', self.folder / f'{method}.pth', *onnx,
                '--cfg-options', *self.options())

    def compiled(self, config: Path) -> Path:
        """Returns a config that compiles the student. On a CPU it uses a backend without a compiler, to save time."""
        path = self.folder / 'amd_compiled.py'
        backend = 'eager' if self.device == 'cpu' else 'inductor'
        path.write_text(f"_base_ = '{config}'\n"
                        f"custom_hooks = [dict(type='mmkd_plugin.CompileStudentHook', backend='{backend}')]\n")
        return path

    def parallel(self, config: Path, options: list[str]) -> None:
        """Trains in a process group of one process. The group remains, so this must be the last job."""
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        backend = 'gloo' if self.device == 'cpu' else 'nccl'
        options = [*options, f'env_cfg.dist_cfg.backend={backend}']
        if self.device == 'cpu':  # MMEngine's launcher and wrapper always use a GPU
            torch.cuda.set_device = lambda device: None
            options += ['model_wrapper_cfg.type=MMDistributedDataParallel', 'model_wrapper_cfg.device_ids=None']
        self.train(config, 'sokd_ddp', '--launcher', 'pytorch', epochs=2, options=options)
        if torch.distributed.get_backend() != backend:
            raise RuntimeError(f'the process group uses the backend {torch.distributed.get_backend()}')
        torch.distributed.destroy_process_group()


def command(tool: str, *arguments: object) -> None:
    """Runs a program of ``tools`` with a command line, but in this process, to save the imports."""
    sys.argv = [f'tools/{tool}.py', *map(str, arguments)]
    print(f'$ {" ".join(sys.argv)}', flush=True)
    try:
        runpy.run_path(str(ROOT / sys.argv[0]), run_name='__main__')
    except SystemExit as error:
        if error.code:
            raise RuntimeError(error.code) from error


def do(name: str, job: Callable[[], object], device: str) -> dict:
    """Runs a job and returns its outcome."""
    print(f'--- {name}', flush=True)
    began, on_gpu = time.monotonic(), device != 'cpu'
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    try:
        job()
        outcome = 'ok'
    except Exception as error:
        traceback.print_exc()
        outcome = f'FAILED: {type(error).__name__}: {(str(error).splitlines() or [""])[0][:200]}'
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    if on_gpu and outcome == 'ok' and 'train' in name and peak <= before:
        outcome = 'FAILED: the GPU was not used'
    return dict(name=name, outcome=outcome, seconds=round(time.monotonic() - began, 1), peak_bytes=peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--device', choices=['cuda', 'cpu'], default='cuda')
    parser.add_argument('--images', type=int, default=64, help='training images; default %(default)s')
    parser.add_argument('--quick', action='store_true', help='run each kind of job with one method only')
    parser.add_argument('--work-dir', type=Path, required=True, help='folder for checkpoints and logs')
    parser.add_argument('--out', type=Path, required=True, help='JSON file for how each job went')
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        sys.exit(f'gpu_jobs: torch {torch.__version__} finds no GPU')
    versions = dict(cuda=torch.version.cuda, mmcv=mmcv.__version__, numpy=numpy.__version__, opencv=cv2.__version__)
    found = dict(environment=dict(environment(args.device), **versions), jobs=[])
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for name, job in Day(args.work_dir, args.images, args.device).jobs():
        if not (args.quick and name in REPEATED):
            found['jobs'].append(do(name, job, args.device))
        args.out.write_text(json.dumps(found, indent=1))
    sys.exit(any(job['outcome'] != 'ok' for job in found['jobs']))


if __name__ == '__main__':
    main()
