"""Trains the model of a config: a distillation, or a plain model to compare it with."""
import argparse
import os
import sys
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.device import is_cuda_available
from mmengine.runner import Runner

import mmkd_plugin  # noqa: F401  makes MMRazor importable
from mmkd_plugin.checkpoints.guard import data_only
from mmkd_plugin.checkpoints.resume import add_safety_hooks, checkpoints_in, resume_from
from mmkd_plugin.config.classes import other_classes
from mmkd_plugin.config.distillation import check_distillation
from mmkd_plugin.config.input_size import fixed_input_size
from mmkd_plugin.config.iterations import check_counts_iterations
from mmkd_plugin.config.loading import read_config
from mmkd_plugin.config.preflight import missing_inputs
from mmkd_plugin.utils import type_name


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='train config file')
    add_options(parser)
    return parser.parse_args()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds all options of this program, without the config."""
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; default: work_dirs/CONFIG')
    parser.add_argument('--amp', action='store_true', help='mixed precision: float16 on a GPU, bfloat16 on a CPU')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='resume from CHECKPOINT; default: the last complete one in the work dir')
    parser.add_argument('--check-teacher', action='store_true',
                        help='evaluate the teacher on the validation set before the first step, and warn when the '
                             'student has caught up with the teacher')
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='allow weights files to run code; use it only if you trust their source')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override fields of the config, for example train_dataloader.batch_size=4')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def load_config(args: argparse.Namespace) -> Config:
    cfg = read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    if not (cfg.get('train_cfg') and cfg.get('train_dataloader') and cfg.get('optim_wrapper')):
        raise ValueError('config: cannot be trained, expected train_cfg, train_dataloader and optim_wrapper')
    wrapper = type_name(cfg.optim_wrapper.get('type', 'OptimWrapper'))
    if args.amp and wrapper != 'AmpOptimWrapper':
        if wrapper != 'OptimWrapper':
            raise ValueError(f'--amp needs optim_wrapper.type OptimWrapper, got {cfg.optim_wrapper.type!r}')
        if is_cuda_available():
            cfg.optim_wrapper.type = 'AmpOptimWrapper'
            cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
        else:
            cfg.optim_wrapper.type = 'mmkd_plugin.AutocastOptimWrapper'
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise ValueError('--auto-scale-lr needs auto_scale_lr.base_batch_size in the config')
        cfg.auto_scale_lr.enable = True
        counts = cfg.optim_wrapper.get('accumulative_counts', 1)
        if counts > 1:  # MMEngine compares base_batch_size with the images of one iteration
            cfg.auto_scale_lr.base_batch_size /= counts
            print(f'--auto-scale-lr: base_batch_size is {cfg.auto_scale_lr.base_batch_size:g} for one iteration, '
                  f'because the optimizer steps every {counts} iterations')
    if cfg.get('compile') and 'architecture' in cfg.model:
        raise ValueError('compile: would compile the whole step with its recorders. Remove it, and add '
                         "dict(type='mmkd_plugin.CompileStudentHook') to custom_hooks")
    if 'max_iters' in cfg.train_cfg:
        check_counts_iterations(cfg)
    if args.check_teacher:
        if 'teacher' not in cfg.model:
            raise ValueError(f'--check-teacher: model is a {cfg.model.get("type")}, which has no teacher')
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='mmkd_plugin.CheckTeacherHook')]
    if args.trust_checkpoint and 'architecture' in cfg.model:
        cfg.model.trust_checkpoint = True
    if type_name(cfg.model.get('type')).endswith('TeacherStudentDistill'):
        check_distillation(cfg)
        cfg.model.setdefault('input_size', fixed_input_size(cfg))
    if args.resume:
        cfg.resume = True
        if args.resume != 'auto':
            cfg.load_from = args.resume
    return cfg


def train(args: argparse.Namespace) -> None:
    """Trains ``args.config`` with the options of :func:`add_options`."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    try:
        cfg = load_config(args)
    except ValueError as error:
        sys.exit(str(error))
    if cfg.get('resume'):
        start = None
        if args.resume == 'auto':
            start, cfg.load_from = cfg.get('load_from'), None
        try:
            for sentence in resume_from(cfg, args.trust_checkpoint, start):
                print(sentence)
        except ValueError as error:
            sys.exit(str(error))
    else:
        earlier = checkpoints_in(Path(cfg.work_dir))
        if earlier:
            print(f'{earlier[0]} and other files of an earlier run will be overwritten. To continue it, use --resume')
    missing = missing_inputs(cfg, trust_checkpoint=args.trust_checkpoint)
    if missing:
        sys.exit('\n'.join(missing))
    if 'architecture' in cfg.model:
        for sentence in other_classes(cfg, args.trust_checkpoint):
            print(sentence)
    add_safety_hooks(cfg)
    with data_only(args.trust_checkpoint or cfg.model.get('trust_checkpoint', False)):
        Runner.from_cfg(cfg).train()


if __name__ == '__main__':
    train(parse_args())
