"""Cost of the AMD loss, forward and backward, relative to a lower bound and to a plain implementation.

The lower bound reads both feature maps once (two sums), then reads one and writes its gradient once (one product).
"plain" implements the paper's steps one by one. Everything is in float32; the teacher's map gets no gradient.
"""
import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarking import (
    CLOCK,
    CLOCKS,
    PEAK_MEMORY,
    command,
    interleave,
    peak_memory,
    ratio,
)
from torch import Tensor

from mmkd_plugin.deploy.environment import environment, markdown
from mmkd_plugin.models.losses import AMDLoss

MAPS = ['256x100x168', '256x50x84', '256x25x42', '256x13x21', '64x100x168', '1024x100x168']
LARGE = 16 * 2**20  # smallest size of a map, in bytes, for which the goals hold
HEADER = ['map', 'variant', 'ms', 'to the lower bound', 'times faster than plain', 'peak (MiB)', 'goals reached']
TIMES_LOWER_BOUND, TIMES_FASTER = 1.5, 3.0  # goals: at most the first, at least the second


def plain(s_feature: Tensor, t_feature: Tensor, margin: float = 1.35, scale: float = 64.0) -> Tensor:
    """The paper's loss of one layer, step by step."""

    def hats(feature: Tensor) -> list[Tensor]:
        attention = feature.pow(2).sum(1).flatten(1)  # (N, HW)
        q = attention / (attention.norm(dim=1, keepdim=True) + 1e-6)
        positive = scale * torch.cos(margin * torch.acos(q.clamp(-1 + 1e-7, 1 - 1e-7)))
        negative = scale * (1 - q)
        combined = positive - torch.log(positive.exp() + negative.exp())
        return [F.normalize(x, dim=1) for x in (combined, positive, negative)]

    return sum(F.mse_loss(s, t) for s, t in zip(hats(s_feature), hats(t_feature))) / 3


def lower_bound(s_feature: Tensor, t_feature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        return s_feature.sum(), t_feature.sum(), s_feature * 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f'{__doc__} {PEAK_MEMORY}')
    parser.add_argument('--maps', nargs='+', type=shape, default=[shape(text) for text in MAPS], metavar='CxHxW',
                        help=f'feature maps to measure; default {" ".join(MAPS)}')
    parser.add_argument('--batch', type=int, default=2, help='images; default %(default)s')
    parser.add_argument('--rounds', type=int, default=30,
                        help='number of rounds; each runs every variant once; default %(default)s')
    parser.add_argument('--compile', action='store_true', help='also measure AMD with torch.compile')
    parser.add_argument('--device', default='cpu', help='cpu or cuda; default %(default)s')
    parser.add_argument('--clock', choices=CLOCKS, default='wall', help=CLOCK)
    parser.add_argument('--out', type=Path, help='JSON file for all times')
    parser.add_argument('--plot', type=Path, help='file for a plot of time and memory against the size of the map')
    return parser.parse_args()


def shape(text: str) -> tuple[int, int, int]:
    """Parses the channels, height and width of a map."""
    try:
        channels, height, width = map(int, text.split('x'))
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected CxHxW such as 256x100x168, got {text!r}') from None
    if min(channels, height, width) < 1:
        raise argparse.ArgumentTypeError(f'expected positive numbers, got {text!r}')
    return channels, height, width


def measure(size: tuple[int, int, int], args: argparse.Namespace) -> dict:
    """Returns times, ratios and peak memory of every variant on maps (N, C, H, W) of ``size``."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(args.batch, *size, generator=generator).relu().to(args.device) for _ in range(2))
    student.requires_grad_()

    def gradient(loss):
        return lambda: torch.autograd.grad(loss(student, teacher), student)

    losses = {'amd': AMDLoss(), 'amd scale-free': AMDLoss(scale_free=True)}
    if args.compile:
        losses |= {f'{name}, compiled': torch.compile(loss) for name, loss in losses.items()}
    calls = {'lower bound': lambda: lower_bound(student, teacher)}
    calls |= {name: gradient(loss) for name, loss in (*losses.items(), ('plain', plain))}
    seconds = interleave(calls, args.rounds, args.device, args.clock, progress=False)
    large = student.numel() * 4 >= LARGE
    variants = {}
    for name, call in calls.items():
        variants[name] = found = dict(seconds=seconds[name], peak_bytes=peak_memory(call, args.device),
                                      to_lower_bound=ratio(seconds[name], seconds['lower bound']),
                                      faster_than_plain=ratio(seconds['plain'], seconds[name]))
        if large and name.startswith('amd'):
            found['reached'] = (found['to_lower_bound']['high'] <= TIMES_LOWER_BOUND
                                and found['faster_than_plain']['low'] >= TIMES_FASTER)
    return dict(shape=[args.batch, *size], map_bytes=student.numel() * 4, variants=variants)


def milliseconds(variant: dict) -> float:
    return 1e3 * statistics.median(variant['seconds'])


def row(result: dict, name: str) -> list[str]:
    found = result['variants'][name]
    to_lower_bound, faster = found['to_lower_bound'], found['faster_than_plain']
    return [
        ' x '.join(map(str, result['shape'])), name, f'{milliseconds(found):.2f}',
        f'{to_lower_bound["ratio"]:.2f} ({to_lower_bound["low"]:.2f} to {to_lower_bound["high"]:.2f})',
        f'{faster["ratio"]:.2f} ({faster["low"]:.2f} to {faster["high"]:.2f})', f'{found["peak_bytes"] / 2**20:.1f}',
        {True: 'yes', False: 'no', None: ''}[found.get('reached')]]


def table(results: list[dict]) -> str:
    return markdown(HEADER, [row(result, name) for result in results for name in result['variants']])


def draw(results: list[dict], path: Path) -> None:
    """Draws time and peak memory of every variant against the size of one map."""
    from matplotlib import pyplot as plt
    results = sorted(results, key=lambda result: result['map_bytes'])
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    sizes = [result['map_bytes'] / 2**20 for result in results]
    for name in results[0]['variants']:
        mine = [result['variants'][name] for result in results]
        axes[0].loglog(sizes, [milliseconds(found) for found in mine], 'o-', label=name)
        axes[1].loglog(sizes, [max(found['peak_bytes'], 1) / 2**20 for found in mine], 'o-', label=name)
    for axis, label in zip(axes, ('time, forward and backward (ms)', 'peak memory beyond the maps (MiB)')):
        axis.set(xlabel='size of a feature map (MiB)', ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse_args()
    print(f'Ratios: median and 95% interval over {args.rounds} interleaved rounds. Goals, for maps of at least '
          f'{LARGE / 2**20:.0f} MiB: at most {TIMES_LOWER_BOUND} of the lower bound and at least {TIMES_FASTER:g} '
          'times faster than plain.\n')
    print(markdown(HEADER, []), flush=True)
    results = []
    for size in args.maps:
        results.append(measure(size, args))
        print(table(results[-1:]).split('\n', 2)[2], flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        found = dict(command=command(), environment=environment(args.device), clock=args.clock, rounds=args.rounds,
                     maps=results)
        args.out.write_text(json.dumps(found, indent=1))
    if args.plot:
        draw(results, args.plot)


if __name__ == '__main__':
    main()
