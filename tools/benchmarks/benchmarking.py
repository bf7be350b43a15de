"""Interleaved timing, intervals of medians, and peak memory for the benchmarks."""
import json
import math
import os
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # keeps the profiler quiet; torch reads it at import

import torch
from torch.profiler import ProfilerActivity, profile

WARMUP = 2  # rounds that do not count

PEAK_MEMORY = (
    'Peak memory is the largest total size of the variant\'s tensors within a call. It comes from the allocator: on a '
    'CPU from the allocations and releases in torch\'s profiler, on CUDA from max_memory_allocated. Memory that a '
    'library such as oneDNN allocates itself does not count.')


CLOCKS = dict(wall=time.perf_counter, cpu=time.process_time)
CLOCK = ('clock: wall is elapsed time; cpu is the CPU time of all threads, which other programs hardly affect. With '
         'one thread (OMP_NUM_THREADS=1) on an idle machine, both are the same; default %(default)s')


def interleave(calls: dict[str, Callable[[], object]], rounds: int, device: str = 'cpu', clock: str = 'wall',
               progress: bool = True) -> dict[str, list[float]]:
    """Returns the seconds of each call in each round.

    In a round, every call runs once, in random order. A temporary slowdown of the machine then affects all calls.
    Compare only ratios within a round.
    """
    now = CLOCKS[clock]
    rng, names, began = random.Random(0), list(calls), time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-WARMUP, rounds):
        rng.shuffle(names)
        for name in names:
            _synchronize(device)
            start = now()
            calls[name]()
            _synchronize(device)
            if index >= 0:
                seconds[name].append(now() - start)
        if progress:
            label = f'round {index + 1} of {rounds}' if index >= 0 else 'warm-up'
            print(f'{label}, {time.perf_counter() - began:.0f} s', file=sys.stderr, flush=True)
    return seconds


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Returns the median and an interval, between two order statistics, that covers the true median.

    The interval assumes no distribution. Fewer than 6 values cannot give 95%; their interval is the whole range.
    """
    values, n = sorted(values), len(values)
    outside = 0.0  # probability that the true median is below the value of this rank
    rank = 0
    for k in range(n // 2):
        outside += math.comb(n, k) / 2**n
        if 2 * outside > 0.05:
            break
        rank = k
    return statistics.median(values), values[rank], values[n - 1 - rank]


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Returns the median and the 95% interval of the ratios within rounds."""
    median, low, high = median_interval([a / b for a, b in zip(above, below, strict=True)])
    return dict(ratio=median, low=low, high=high)


def peak_memory(call: Callable[[], object], device: str = 'cpu') -> int:
    """Returns the peak memory of ``call`` in bytes, beyond the memory in use before; see :data:`PEAK_MEMORY`."""
    if torch.device(device).type == 'cuda':
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with TemporaryDirectory() as folder:
        path = Path(folder) / 'trace.json'
        profiler.export_chrome_trace(str(path))
        events = [event['args'] for event in json.loads(path.read_text())['traceEvents']
                  if event.get('name') == '[memory]' and event['args']['Device Type'] == 0]
    if not events:
        return 0
    before = events[0]['Total Allocated'] - events[0]['Bytes']
    return max(0, *(event['Total Allocated'] - before for event in events))


def command() -> str:
    """Returns the command line of this program."""
    threads = os.environ.get('OMP_NUM_THREADS')
    return ' '.join([*([f'OMP_NUM_THREADS={threads}'] if threads else []), 'python', shlex.join(sys.argv)])


def _synchronize(device: str) -> None:
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)
