"""Draws the losses and metrics of several runs in one figure, from MMEngine's logs in their work dirs.

A work dir has one log per start. If a resumed run repeats iterations, the later values are drawn.
"""
import argparse
import json
import os
import sys
from collections import defaultdict
from fnmatch import fnmatchcase
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmkd_plugin.utils import closest

NO_CURVES = ('step', 'iter', 'epoch', 'lr', 'base_lr', 'time', 'data_time', 'memory', 'grad_norm')
Curve = dict[int, float]  # value by step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='work dirs of the runs')
    parser.add_argument('--out', type=Path, default=Path('log.png'), help='file to write; default: %(default)s')
    parser.add_argument('--keys', nargs='+', default=['loss', 'distill.*', '*mAP', '*top1', 'policy/entropy'],
                        help='names or patterns of the values to draw, one panel each; default: %(default)s')
    args = parser.parse_args()
    try:
        curves = {run: read(run) for run in args.runs}
        panels = choose(curves, args.keys)
    except ValueError as error:
        sys.exit(str(error))
    draw(curves, panels, args.out)
    print(f'{args.out}: {", ".join(panels)}')


def read(run: Path) -> dict[str, Curve]:
    """Returns the curves of a run by name: losses by iteration and metrics by epoch, as MMEngine logs them.

    Raises:
        ValueError: there is no log.
    """
    curves: dict[str, Curve] = defaultdict(dict)
    logs = sorted(run.glob('*/vis_data/scalars.json'))  # folders are named by their start time
    for log in logs:
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith('}')]
        fresh = {key: {line['step']: line[key] for line in lines if key in line and 'step' in line}
                 for key in dict.fromkeys(key for line in lines for key in line) if key not in NO_CURVES}
        for key, curve in fresh.items():
            begin = min(curve, default=0)
            kept = {step: value for step, value in curves[key].items() if step < begin}
            curves[key] = kept | {step: value for step, value in curve.items() if isinstance(value, (int, float))}
    if not any(curves.values()):
        raise ValueError(f'{run}: no log of MMEngine found (looked for {run}/*/vis_data/scalars.json)')
    return {key: curve for key, curve in curves.items() if curve}


def choose(curves: dict[Path, dict[str, Curve]], patterns: list[str]) -> list[str]:
    """Returns the matching names, in the order of the patterns.

    Raises:
        ValueError: nothing matches. The message has the closest names.
    """
    names = list(dict.fromkeys(name for run in curves.values() for name in run))
    found = list(dict.fromkeys(name for pattern in patterns for name in names if fnmatchcase(name, pattern)))
    if not found:
        raise ValueError(f'--keys: no logged value is named {" or ".join(patterns)}; {closest(patterns[0], names)}')
    return found


def draw(curves: dict[Path, dict[str, Curve]], panels: list[str], out: Path) -> None:
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure((5 * columns, 3.2 * rows + 0.4), dpi=100, layout='constrained')
    labels = dict(zip(curves, shorten(list(curves))))
    for index, name in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        for place, (run, found) in enumerate(curves.items()):
            if name in found:
                steps = sorted(found[name])
                axes.plot(steps, [found[name][step] for step in steps], color=f'C{place}',
                          marker='.' if len(steps) < 50 else None, label=labels[run])
        axes.set_title(name, fontsize='medium')
        axes.set_xlabel('step')
        axes.grid(alpha=0.3)
    handles = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=min(4, len(handles)))
    out.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(out)


def shorten(runs: list[Path]) -> list[str]:
    """Returns the paths without their common folders."""
    paths = [run.resolve() for run in runs]
    shared = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(shared)) for path in paths]


if __name__ == '__main__':
    main()
