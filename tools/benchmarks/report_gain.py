"""Writes the results of the benchmarks into docs/results.md, between two marks, and draws the plots.

Text outside the marks is not changed. Only runs of an experiment's current config count, one per seed.

The tables have two intervals: over seeds, by Student's t, and over the test images, by the bootstrap (bootstrap.py).
The first one covers the choice of the seeds, the second one the choice of the images.
"""
import argparse
import itertools
import statistics
import sys
from contextlib import suppress
from pathlib import Path

import matplotlib
import numpy as np
from amd_map_sizes import draw as draw_map_sizes
from gain import RESULTS, is_tuned, read, reported_runs, teacher_run
from gain_tasks import TASKS, TUNING_SEEDS, Experiment, Task
from report_cost import sections as cost_sections
from scipy.stats import t

from mmkd_plugin.deploy.environment import markdown

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / 'dev'))
from make_model_index import NOT_MEASURED, PAPER_RESULTS  # noqa: E402

BEGIN, END = (f'<!-- {word} of what tools/benchmarks/report_gain.py writes -->' for word in ('begin', 'end'))
PAGE, IMAGES = Path('docs/results.md'), Path('docs/images')
SURROUNDINGS = '# Results\n\n{}\n{}\n'

Found = dict[str, dict[int, dict]]  # lines by experiment and seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results')
    parser.add_argument('--page', type=Path, default=PAGE, help='page to write into')
    parser.add_argument('--images', type=Path, default=IMAGES, help='folder for the plots')
    args = parser.parse_args()
    parts = []
    for name, task in TASKS.items():
        lines, tuning = (read(args.results / f'{name}{end}.jsonl') for end in ('', '_tuning'))
        if not lines:
            continue
        found = current(task, lines, tuning)
        if 'teacher' not in found:
            continue
        args.images.mkdir(parents=True, exist_ok=True)
        drawn = {kind: args.images / f'results_{name}_{kind}.png' for kind in ('bars', 'policy')}
        bars(task, found, drawn['bars'])
        policy(task, found, drawn['policy'])
        if task.headlines:
            parts.insert(0, summary(task, found))
        parts.append(section(task, found, tuning, drawn))
    sizes = args.images / 'results_amd_sizes.png'
    draw_map_sizes(sizes)
    parts += [map_sizes(sizes), *cost_sections(args.results, args.images), papers()]
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(insert(args.page.read_text() if args.page.exists() else SURROUNDINGS.format(BEGIN, END),
                                '\n\n'.join(parts)))


def insert(page: str, text: str) -> str:
    """Returns the page with this text between the marks.

    Raises:
        ValueError: the page does not have both marks once, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ValueError(f'expected the line {BEGIN!r} and then {END!r} once each')
    return f'{before}{BEGIN}\n\n{text}\n\n{END}{after}'


def current(task: Task, lines: list[dict], tuning: list[dict]) -> Found:
    """Returns the lines whose fingerprint fits the current configs and weights; none if a tuning is incomplete."""
    runs = {teacher_run(task).key}
    for name in task.experiments:
        with suppress(ValueError):
            runs.update(run.key for run in reported_runs(task, tuning, [name]))
    found: Found = {}
    for line in lines:
        if (line['experiment'], line['seed'], line['fingerprint']) in runs:
            found.setdefault(line['experiment'], {})[line['seed']] = line
    return found


def values(task: Task, found: Found, name: str) -> dict[int, float]:
    """Returns the metric of an experiment by seed, in percent. Seeds that diverged are left out."""
    return {seed: task.scale * line['metric'] for seed, line in sorted(found.get(name, {}).items())
            if line['metric'] is not None}


def resampled(task: Task, found: Found, name: str) -> dict[int, np.ndarray]:
    """Returns the metric of an experiment by seed on each draw of the test images, in percent.

    The draws are shifted, so that their mean is the metric on the test images. AP is higher on draws, which have
    images twice.
    """
    draws = {seed: task.scale * np.array(found[name][seed]['resampled']) for seed in values(task, found, name)}
    return {seed: draws[seed] - draws[seed].mean() + metric for seed, metric in values(task, found, name).items()}


def paired(above: dict[int, float], below: dict[int, float]) -> tuple[float, float, str] | None:
    """Returns mean and half the 95% t-interval of the differences within seeds, and in how many ``above`` is better.

    Returns None if fewer than two seeds are in both.
    """
    differences = [above[seed] - below[seed] for seed in sorted(set(above) & set(below))]
    n = len(differences)
    if n < 2:
        return None
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5
    equal = sum(abs(d) < 1e-9 for d in differences)
    better = f'{sum(d > 1e-9 for d in differences)} of {n}' + (f', {equal} equal' if equal else '')
    return statistics.fmean(differences), half, better


def permutation_test(above: dict[int, float], below: dict[int, float]) -> float:
    """Returns the p-value of Fisher's paired permutation test of the mean difference within seeds, two-sided and exact.

    Under the null hypothesis, each difference is equally likely to have the opposite sign. p is the share of all sign
    combinations whose mean is at least as far from 0. It is at least 2 / 2^n: 0.25 with 3 seeds, 0.002 with 10.
    """
    differences = np.array([above[seed] - below[seed] for seed in sorted(set(above) & set(below))])
    signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    return float(np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9))


def over_images(above: dict[int, np.ndarray], below: dict[int, np.ndarray] | None = None) -> tuple[float, float]:
    """Returns the 95% bootstrap interval over test images of a mean over seeds, or of a difference within seeds."""
    if below is None:
        draws = np.mean(list(above.values()), axis=0)
    else:
        draws = np.mean([above[seed] - below[seed] for seed in set(above) & set(below)], axis=0)
    return tuple(np.percentile(draws, [2.5, 97.5]).tolist())


def closed(given: dict[int, float], alone: dict[int, float], teacher: float) -> float | None:
    """Returns the closed share of the gap between student alone and teacher, in percent, from the means over seeds."""
    if not alone:
        return None
    low = statistics.fmean(alone.values())
    return 100 * (statistics.fmean(given.values()) - low) / (teacher - low)


def table(task: Task, found: Found, tuning: list[dict]) -> str:
    teacher, alone = values(task, found, 'teacher')[0], values(task, found, 'student')
    rows = [['teacher', f'{teacher:.1f}', _interval(over_images(resampled(task, found, 'teacher'))), '1',
             *[''] * 6]]
    for name, experiment in task.experiments.items():
        given = values(task, found, name)
        if name not in found:
            continue
        diverged = len(found[name]) - len(given)
        seeds = f'{len(given)}, {diverged} diverged' if diverged else str(len(given))
        if not given:
            rows.append([experiment.label, '', '', seeds, *[''] * 6])
            continue
        mean = f'{statistics.fmean(given.values()):.1f}'
        spread = f' ± {statistics.stdev(given.values()):.1f}' if len(given) > 1 else ''
        base = experiment.base
        against = paired(given, values(task, found, base)) if base else None
        compared = [''] * 4
        if against:
            compared = [
                f'{against[0]:+.2f} ± {against[1]:.2f} to {task.experiments[base].label}',
                _interval(over_images(resampled(task, found, name), resampled(task, found, base)), '+.2f'),
                against[2], f'{permutation_test(given, values(task, found, base)):.3f}']
        share = closed(given, alone, teacher) if name != 'student' else None
        lines = found[name].values()
        weights = ', '.join(f'{weight:g}' for weight in next(iter(lines))['weights'])
        measured = [weight for line in lines for weight in line.get('measured', {}).values()]
        if measured:
            weights = f'{min(measured):.3g} to {max(measured):.3g} (measured)'
        elif weights and not is_tuned(task, name, tuning):
            weights += ' (not tuned)'
        rows.append([experiment.label, mean + spread, _interval(over_images(resampled(task, found, name))),
                     seeds, *compared, '' if share is None else f'{share:.0f}%', weights])
    return markdown(['', task.unit, 'over images', 'seeds', 'difference within seeds', 'over images', 'better in', 'p',
                     'gap closed', 'weights'], rows)


def _interval(bounds: tuple[float, float], spec: str = '.1f') -> str:
    return ' to '.join(f'{bound:{spec}}' for bound in bounds)


def summary(task: Task, found: Found) -> str:
    """Returns the summary of a task: the gap, the best experiment, and its headline differences."""
    teacher, alone = values(task, found, 'teacher')[0], values(task, found, 'student')
    means = {name: statistics.fmean(values(task, found, name).values())
             for name in task.experiments if name != 'student' and values(task, found, name)}
    seeds = {name: len(values(task, found, name)) for name in means}
    most = max(seeds.values(), default=0)
    sentences = []
    if alone and means:
        best = max((name for name in means if seeds[name] == most), key=means.get)  # of those with most seeds
        sentences.append(
            f'{task.title}: the teacher has {teacher:.1f} {task.unit}, the student alone '
            f'{statistics.fmean(alone.values()):.1f}, and with {task.experiments[best].label} {means[best]:.1f}, which '
            f'closes {closed(values(task, found, best), alone, teacher):.0f}% of the gap.')
    for name in task.headlines:
        base = task.experiments[name].base
        given, other = values(task, found, name), values(task, found, base)
        against = paired(given, other)
        if against:
            low, high = over_images(resampled(task, found, name), resampled(task, found, base))
            sentences.append(
                f'{task.experiments[name].label} differs from {task.experiments[base].label} by {against[0]:+.2f} ± '
                f'{against[1]:.2f} points over seeds (better in {against[2]}, p = '
                f'{permutation_test(given, other):.3f}; over images {low:+.2f} to {high:+.2f}).')
    return ' '.join(sentences)


def section(task: Task, found: Found, tuning: list[dict], drawn: dict[str, Path]) -> str:
    """Returns the part of the page on a task."""
    lines = [line for of in found.values() for line in of.values()]
    surroundings = '; '.join(f'{key} {", ".join(sorted({str(line[key]) for line in lines}))}'
                             for key in ('commit', 'torch', 'mmdet', 'mmpretrain', 'device', 'threads'))
    pictures = [f'![{words}](images/{drawn[kind].name})' for kind, words in (
        ('bars', 'Mean of every experiment with its spread, and every seed'),
        ('policy', 'How often the policy applies each operation, over the search')) if drawn[kind].exists()]
    candidates = {len(experiment.weights) for experiment in task.experiments.values() if experiment.weights}
    tuning_seeds = ', '.join(map(str, TUNING_SEEDS))
    return '\n\n'.join([
        f'## {task.title}',
        f'The table has the mean and standard deviation of {task.unit} over seeds, and the mean difference to another '
        'experiment within seeds with its 95% interval by Student\'s t; p is from the exact paired permutation test. '
        'The columns "over images" are 95% bootstrap intervals over test images. Every experiment with its own weights '
        f'has the same budget: {", ".join(map(str, candidates))} candidates with seed {tuning_seeds} on the tuning '
        'split. The second weight of SoKD is that of DAM. "Gap closed" is the share of the difference between teacher '
        'and student alone; "inherited start" is the student alone, started from weights of the teacher. An '
        'experiment that differs from another one in a single change has the weights of that one. Each reported seed '
        'ran once with these weights, on test images that were not used to choose them. '
        '[Methodology](methodology.md#experiments) says how the candidates were chosen.',
        table(task, found, tuning),
        f'{len(lines)} runs, {sum(line["seconds"] for line in lines) / 3600:.1f} hours of one core; {surroundings}; '
        f'tuning: commit {", ".join(sorted({line["commit"] for line in tuning})) or "none"}.',
        *pictures])


def map_sizes(picture: Path) -> str:
    return (f'## AMD against the size of the map\n\n![Value and gradient of both forms](images/{picture.name})\n\n'
            'ReLU of Gaussian noise, N = 2, C = 64; the figures are in [amd.md](amd.md), and '
            '`python tools/benchmarks/amd_map_sizes.py` prints them.')


def papers() -> str:
    rows = [[f'`{name}`', ', '.join(f'{what} {value}' for what, value in results.items())]
            for name, results in PAPER_RESULTS.items()]
    return f'## What the papers report\n\n{NOT_MEASURED}; other data and networks than above.\n\n' + markdown(
        ['config', 'result'], rows)


def bars(task: Task, found: Found, path: Path) -> None:
    """Draws the mean, the standard deviation and the seeds of every experiment."""
    names = [name for name in task.experiments if values(task, found, name)]
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(names) + 1.2))
    for place, name in enumerate(names):
        given = list(values(task, found, name).values())
        spread = statistics.stdev(given) if len(given) > 1 else 0
        colour = _colour(task.experiments[name])
        axis.barh(place, statistics.fmean(given), xerr=spread, color=colour, alpha=0.6, ecolor='black', capsize=2)
        axis.plot(given, [place] * len(given), '.', color=colour, markersize=4)
    every = [value for name in names for value in values(task, found, name).values()]
    teacher = values(task, found, 'teacher')[0]
    axis.axvline(teacher, color='black', linestyle='--', linewidth=1)
    axis.set_xlim(min(every) - 0.1 * (teacher - min(every)), max(teacher, *every) + 0.05 * (teacher - min(every)))
    axis.set_yticks(range(len(names)), [task.experiments[name].label for name in names], fontsize=8)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set_xlabel(f'{task.unit}; dashed: the teacher')
    _save(figure, path)


def policy(task: Task, found: Found, path: Path) -> None:
    """Draws the probability of each operation during the search; draws nothing if there was no search."""
    searched = {name: [line['policy'] for line in lines.values() if 'policy' in line] for name, lines in found.items()
                if any('policy' in line for line in lines.values())}
    if not searched:
        return
    figure, axes = plt.subplots(1, len(searched), figsize=(3.6 * len(searched), 3.6), sharey=True, squeeze=False)
    for axis, (name, runs) in zip(axes[0], searched.items()):
        steps = [point['step'] for point in runs[0]]
        for key in (key for key in runs[0][0] if key.startswith('p/')):
            axis.plot(steps, [statistics.fmean(run[i][key] for run in runs) for i in range(len(steps))],
                      label=key.removeprefix('p/'))
        axis.set_title(task.experiments[name].label, fontsize=9)
        axis.set_xlabel('iteration')
    axes[0][0].set_ylabel('probability of the operation')
    axes[0][-1].legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _colour(experiment: Experiment) -> str:
    for beginning, colour in (('SoKD', 'tab:green'), ('AMD', 'tab:blue'), ('student', 'tab:gray')):
        if experiment.label.startswith(beginning):
            return colour
    return 'tab:orange'


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == '__main__':
    main()
