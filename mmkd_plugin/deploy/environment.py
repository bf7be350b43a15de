"""Commit, versions and device of a measurement, and Markdown tables."""
import os
import platform
import subprocess
from pathlib import Path

import mmdet
import mmengine
import mmpretrain
import torch


def environment(device: str) -> dict:
    """Returns the commit, versions and device that a measurement depends on."""
    commit = _git('describe', '--always', '--abbrev=7')
    if _git('status', '--porcelain', '--untracked-files=no', '--', '.', ':!docs'):  # docs contain the results
        commit += '-dirty'
    return dict(
        device=torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else _cpu_name(),
        threads=torch.get_num_threads(), cores=os.cpu_count(), torch=torch.__version__, mmengine=mmengine.__version__,
        mmdet=mmdet.__version__, mmpretrain=mmpretrain.__version__, python=platform.python_version(),
        commit=commit or 'unknown')


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [header, ['---'] * len(header), *rows])


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(['git', *arguments], capture_output=True, text=True,
                              cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # git is not installed
        return ''


def _cpu_name() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor()
