"""Writes what the benchmarks found into docs/results.md, between two marks, and the plots beside it.

What stands outside the marks stays. Of every row only runs of its present config count, one a seed.
"""
import argparse
import statistics
import sys
from contextlib import suppress
from pathlib import Path

import matplotlib
from amd_map_sizes import draw as draw_map_sizes
from gain import RESULTS, read, reported_runs, teacher_run
from gain_tasks import TASKS, TUNING_SEEDS, Row, Task
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

Found = dict[str, dict[int, dict]]  # lines by row and seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--results', type=Path, default=RESULTS, help='where the results are')
    parser.add_argument('--page', type=Path, default=PAGE, help='the page to write into')
    parser.add_argument('--images', type=Path, default=IMAGES, help='where the plots go')
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
        drawn = {kind: args.images / f'results_{name}_{kind}.png' for kind in ('bars', 'curves', 'policy')}
        bars(task, found, drawn['bars'])
        curves(task, found, drawn['curves'])
        policy(task, found, drawn['policy'])
        parts.append(section(task, found, drawn))
    sizes = args.images / 'results_amd_sizes.png'
    draw_map_sizes(sizes)
    parts += [map_sizes(sizes), *cost_sections(args.results, args.images), papers()]
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(insert(args.page.read_text() if args.page.exists() else SURROUNDINGS.format(BEGIN, END),
                                '\n\n'.join(parts)))


def insert(page: str, text: str) -> str:
    """Returns the page with this text between the marks.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ValueError(f'expected the line {BEGIN!r} and then {END!r} once each')
    return f'{before}{BEGIN}\n\n{text}\n\n{END}{after}'


def current(task: Task, lines: list[dict], tuning: list[dict]) -> Found:
    """Returns the lines whose fingerprint is that of the present configs and weights; none of a row not tuned yet."""
    runs = {teacher_run(task).key}
    for name in task.rows:
        with suppress(ValueError):
            runs.update(run.key for run in reported_runs(task, tuning, [name]))
    found: Found = {}
    for line in lines:
        if (line['row'], line['seed'], line['fingerprint']) in runs:
            found.setdefault(line['row'], {})[line['seed']] = line
    return found


def values(task: Task, found: Found, row: str) -> dict[int, float]:
    """The metric of a row by seed, in percent."""
    return {seed: task.scale * line['metric'] for seed, line in sorted(found.get(row, {}).items())}


def paired(above: dict[int, float], below: dict[int, float]) -> tuple[float, float, int, int] | None:
    """Returns mean and half the 95% t-interval of the differences within seeds, in how many of them ``above`` wins, n.

    None where fewer than two seeds are in both.
    """
    differences = [above[seed] - below[seed] for seed in sorted(set(above) & set(below))]
    n = len(differences)
    if n < 2:
        return None
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5
    return statistics.fmean(differences), half, sum(d > 0 for d in differences), n


def closed(row: dict[int, float], alone: dict[int, float], teacher: float) -> float | None:
    """Returns the share of the gap between student alone and teacher that a row closes, in percent, on common seeds."""
    seeds = sorted(set(row) & set(alone))
    if not seeds:
        return None
    low = statistics.fmean(alone[seed] for seed in seeds)
    return 100 * (statistics.fmean(row[seed] for seed in seeds) - low) / (teacher - low)


def table(task: Task, found: Found) -> str:
    teacher, alone = values(task, found, 'teacher')[0], values(task, found, 'student')
    rows = [['teacher', f'{teacher:.2f}', '1', '', '', '', '']]
    for name, row in task.rows.items():
        given = values(task, found, name)
        if not given:
            continue
        mean = f'{statistics.fmean(given.values()):.2f}'
        spread = f' ± {statistics.stdev(given.values()):.2f}' if len(given) > 1 else ''
        against = paired(given, values(task, found, row.base)) if row.base else None
        compared = [f'{against[0]:+.2f} ± {against[1]:.2f} to {task.rows[row.base].label}',
                    f'{against[2]} of {against[3]}'] if against else ['', '']
        share = closed(given, alone, teacher) if name != 'student' else None
        weight = next(iter(found[name].values()))['weight']
        rows.append([row.label, mean + spread, str(len(given)), *compared, '' if share is None else f'{share:.0f}%',
                     '' if weight is None else f'{weight:g}'])
    return markdown(['', task.unit, 'seeds', 'difference within seeds, 95%', 'better in', 'gap closed', 'weight'], rows)


def section(task: Task, found: Found, drawn: dict[str, Path]) -> str:
    """Returns the part of the page on a task."""
    lines = [line for row in found.values() for line in row.values()]
    told = '; '.join(f'{key} {", ".join(sorted({str(line[key]) for line in lines}))}'
                     for key in ('commit', 'torch', 'mmdet', 'mmpretrain', 'device', 'threads'))
    pictures = [f'![{words}](images/{drawn[kind].name})' for kind, words in (
        ('bars', 'Mean of every row with its spread, and every seed'),
        ('curves', 'Learning curves, mean over seeds'),
        ('policy', 'How often the policy applies each operation, over the search')) if drawn[kind].exists()]
    candidates = {len(row.weights) for row in task.rows.values() if row.weights}
    tuning_seeds = ', '.join(map(str, TUNING_SEEDS))
    return '\n\n'.join([
        f'## {task.title}',
        f'Mean and standard deviation of {task.unit}, over seeds; difference to the row\'s base within seeds with its '
        f'95% interval by Student\'s t. Every row with a weight of its own was tuned alike: '
        f'{", ".join(map(str, candidates))} weights with seed {tuning_seeds} on a split of its own. SoKD keeps its '
        'base\'s best weight, and its own is that of DAM; a row that is one change away from another has its '
        'weights. The reported seeds ran once, on test images that no weight was chosen by.',
        table(task, found),
        f'{len(lines)} runs, {sum(line["seconds"] for line in lines) / 3600:.1f} hours of one core; {told}.',
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
    """Draws the mean of every row, its standard deviation and its seeds."""
    names = [name for name in task.rows if name in found]
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(names) + 1.2))
    for place, name in enumerate(names):
        given = list(values(task, found, name).values())
        spread = statistics.stdev(given) if len(given) > 1 else 0
        colour = _colour(task.rows[name])
        axis.barh(place, statistics.fmean(given), xerr=spread, color=colour, alpha=0.6, ecolor='black', capsize=2)
        axis.plot(given, [place] * len(given), '.', color=colour, markersize=4)
    every = [value for name in names for value in values(task, found, name).values()]
    teacher = values(task, found, 'teacher')[0]
    axis.axvline(teacher, color='black', linestyle='--', linewidth=1)
    axis.set_xlim(min(every) - 0.1 * (teacher - min(every)), max(teacher, *every) + 0.05 * (teacher - min(every)))
    axis.set_yticks(range(len(names)), [task.rows[name].label for name in names], fontsize=8)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set_xlabel(f'{task.unit}; dashed: the teacher')
    _save(figure, path)


def curves(task: Task, found: Found, path: Path) -> None:
    """Draws the mean learning curve of the rows with the most seeds."""
    most = max(row.seeds for row in task.rows.values())
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for index, name in enumerate(name for name, row in task.rows.items() if name in found and row.seeds == most):
        drawn = [line['curve'] for line in found[name].values()]
        epochs = [epoch for epoch, _ in drawn[0]]
        mean = [task.scale * statistics.fmean(curve[i][1] for curve in drawn) for i in range(len(epochs))]
        axis.plot(epochs, mean, marker='.', color=plt.get_cmap('tab20')(index % 20), label=task.rows[name].label)
    axis.set_xlabel('epoch')
    axis.set_ylabel(task.unit)
    axis.legend(fontsize=7)
    _save(figure, path)


def policy(task: Task, found: Found, path: Path) -> None:
    """Draws, over the search, the chance that a batch gets each operation; nothing if there was no search."""
    most = max(row.seeds for row in task.rows.values())
    searched = {name: [line['policy'] for line in row.values()] for name, row in found.items()
                if all('policy' in line for line in row.values()) and task.rows[name].seeds == most}
    if not searched:
        return
    figure, axes = plt.subplots(1, len(searched), figsize=(3.6 * len(searched), 3.6), sharey=True, squeeze=False)
    for axis, (name, runs) in zip(axes[0], searched.items()):
        steps = [point['step'] for point in runs[0]]
        for key in (key for key in runs[0][0] if key.startswith('p/')):
            axis.plot(steps, [statistics.fmean(run[i][key] for run in runs) for i in range(len(steps))],
                      label=key.removeprefix('p/'))
        axis.set_title(task.rows[name].label, fontsize=9)
        axis.set_xlabel('iteration')
    axes[0][0].set_ylabel('chance that a batch gets it')
    axes[0][-1].legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _colour(row: Row) -> str:
    for beginning, colour in (('SoKD', 'tab:green'), ('AMD', 'tab:blue'), ('student', 'tab:gray')):
        if row.label.startswith(beginning):
            return colour
    return 'tab:orange'


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == '__main__':
    main()
