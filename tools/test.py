"""Evaluates the student of a distillation, from a training checkpoint or an exported one. No teacher is needed."""
import argparse
import os
import sys
from pathlib import Path

from mmengine.config import DictAction
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict

import mmkd_plugin  # noqa: F401  makes MMRazor importable
from mmkd_plugin.checkpoints.guard import data_only
from mmkd_plugin.config.loading import read_config
from mmkd_plugin.config.preflight import missing_inputs
from mmkd_plugin.deploy.student import build_student, plain_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the distillation, or of the student without a teacher')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--work-dir', help='folder for the log; default: work_dirs/CONFIG')
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='allow the checkpoint to run code; use it only if you trust its source')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override fields of the config')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main() -> None:
    args = parse_args()
    try:
        cfg = read_config(args.config, args.cfg_options)
    except ValueError as error:
        sys.exit(str(error))
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    missing = missing_inputs(cfg, training=False)
    if missing:
        sys.exit('\n'.join(missing))
    try:
        student = build_student(cfg, args.checkpoint, args.trust_checkpoint)
    except ValueError as error:
        sys.exit(str(error))
    cfg = plain_config(cfg)
    cfg.load_from = None
    cfg.resume = False
    with data_only(args.trust_checkpoint):
        runner = Runner.from_cfg(cfg)
        load_state_dict(runner.model, student.state_dict(), strict=True)  # MMEngine's unwraps parallel wrappers
        runner.test()


if __name__ == '__main__':
    main()
