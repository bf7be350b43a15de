"""Checks this package on a GPU and measures its cost, within eight minutes.

It first runs the tests that need a GPU and a user's jobs (``gpu_jobs.py``) in parallel. Then it runs the benchmarks of
the training step and of the loss, alone on the machine. A stage that fails or takes too long does not stop the next.
With ``--device cpu`` everything runs in miniature, and its times and memory are meaningless.

It writes five files: summary.md, results.json and the logs tests.log, jobs.log and benchmarks.log.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LIMIT = 475  # seconds in all
VARIANTS = ['amd', 'amd_float32', 'sokd_search', 'sokd_frozen', 'cwd', 'pkd', 'mgd']
# Upper limits on an H100, RetinaNet R101 to R50, 8 images of 800 x 1344: time relative to the student's own step, and
# memory relative to the student's own step and the teacher's weights
GOALS = dict(amd=1.20, sokd_search=1.30, sokd_frozen=1.30)
MEMORY_GOAL = 1.10
GOALS_STAGE = 'retinanet-8'


class Stage(NamedTuple):
    """A program to run.

    Attributes:
        limit: time limit in seconds.
        command: arguments of ``python``.
        log: file in the output folder for its output.
        found: file that it writes its results to, if any.
    """
    name: str
    limit: int
    command: list[str]
    log: str
    found: Path | None = None


def gpu_test_files() -> list[str]:
    """Returns the test files with the marker ``gpu``. Importing the others would take time."""
    return [str(path) for path in sorted((ROOT / 'tests').rglob('test_*.py')) if 'mark.gpu' in path.read_text()]


def stages(device: str, folder: Path) -> list[Stage]:
    """Returns the stages: first tests and jobs, then the benchmarks. ``folder`` is for temporary files."""
    def benchmark(name: str, limit: int, tool: str, *arguments: str) -> Stage:
        found = folder / f'{name}.json'
        command = [f'tools/benchmarks/{tool}.py', *map(str, arguments), '--device', device, '--out', str(found)]
        return Stage(name, limit, command, 'benchmarks.log', found)

    jobs = folder / 'jobs.json'
    tests = Stage('tests', 170, ['-m', 'pytest', '-q', '-rfEs', '-p', 'no:cacheprovider', '-m', 'gpu',
                                 *gpu_test_files()], 'tests.log')
    work = Stage('jobs', 170, ['tools/benchmarks/gpu_jobs.py', '--device', device, '--work-dir',
                               str(folder / 'jobs'), '--out', str(jobs)], 'jobs.log', jobs)
    if device == 'cpu':
        work = work._replace(limit=900, command=[*work.command, '--quick', '--images', '4'])
        return [tests._replace(limit=900), work,
                benchmark('retinanet-1', 900, 'step', '--batch', 1, '--size', '64x64', '--rounds', 1, '--variants',
                          'amd'),
                benchmark('resnet-2', 900, 'step', '--pair', 'resnet', '--batch', 2, '--size', '32x32', '--rounds', 1,
                          '--variants', 'sokd_search', 'pkd'),
                benchmark('loss', 900, 'loss', '--maps', '4x16x16', '--rounds', 1)]
    images = ['--size', '800x1344', '--variants', *VARIANTS]
    return [tests, work,
            benchmark('retinanet-8', 120, 'step', '--batch', 8, '--rounds', 20, *images),
            benchmark('retinanet-2', 90, 'step', '--batch', 2, '--rounds', 40, *images),
            benchmark('resnet-64', 80, 'step', '--pair', 'resnet', '--batch', 64, '--rounds', 40, '--variants',
                      *VARIANTS),
            benchmark('loss', 50, 'loss', '--batch', 8)]


class Run:
    """A running stage. Its standard output goes to a separate file, for the summary."""

    def __init__(self, stage: Stage, out: Path, folder: Path, device: str, left: float) -> None:
        self.stage, self.out = stage, out
        self.printed = folder / f'{stage.name}.txt'
        self.limit = min(stage.limit, left)
        self.began = time.monotonic()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
        env = dict(os.environ, PYTHONPATH=path)
        if device == 'cpu':
            env['CUDA_VISIBLE_DEVICES'] = ''
        with open(out / stage.log, 'a') as log, open(self.printed, 'w') as printed:
            self.process = subprocess.Popen([sys.executable, '-W', 'ignore', *stage.command], cwd=ROOT, env=env,
                                            stdout=printed, stderr=log, start_new_session=True)

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def result(self) -> dict:
        """Waits for the stage, or stops it at its time limit; returns its outcome and results."""
        try:
            code = self.process.wait(max(0, self.limit - (time.monotonic() - self.began)))
            outcome = 'ok' if code == 0 else f'FAILED with code {code}'
        except subprocess.TimeoutExpired:
            outcome = f'FAILED: stopped after {self.limit:.0f} s'
        finally:  # also if this program is interrupted
            self.end()
        printed = self.printed.read_text(errors='replace')
        with open(self.out / self.stage.log, 'a') as log:
            log.write(f'\n--- {self.stage.name}: python {" ".join(self.stage.command)}\n{printed}\n')
        found = self.stage.found
        return dict(outcome=outcome, seconds=round(time.monotonic() - self.began), printed=printed,
                    found=json.loads(found.read_text()) if found and found.exists() else None)


def checked(name: str, result: dict, device: str) -> dict:
    """Returns the result, marked as failed if the stage succeeded without doing its work."""
    lines = [line for line in result['printed'].splitlines() if line.strip()]
    result['detail'] = ''
    if name == 'tests':
        result['detail'] = lines[-1].strip('= ') if lines else ''
        if device != 'cpu' and result['outcome'] == 'ok' and ('passed' not in result['detail']
                                                              or 'skipped' in result['detail']):
            result['outcome'] = 'FAILED: not all tests ran'
    elif name == 'jobs' and result['found']:
        done = result['found']['jobs']
        result['detail'] = f'{sum(job["outcome"] == "ok" for job in done)} of {len(done)} jobs'
    return result


def goals(results: dict) -> list[str]:
    """Returns the section with the goals on an H100, if they were measured."""
    found = (results.get(GOALS_STAGE) or {}).get('found')
    if not found:
        return []
    figures = {figure['variant']: figure for figure in found['variants']}
    alone = figures['student']['peak_bytes'] + found['teacher_bytes']
    rows = []
    for name, most in GOALS.items():
        time_, memory = figures[name]['to_student']['ratio'], figures[name]['peak_bytes'] / alone
        rows.append(f'| {name} | {time_:.3f} | {most:.2f} | {"reached" if time_ <= most else "MISSED"} | {memory:.3f} '
                    f'| {MEMORY_GOAL:.2f} | {"reached" if memory <= MEMORY_GOAL else "MISSED"} |')
    return ['## Goals on an H100', 'RetinaNet R101 to R50, 8 images of 800 x 1344. Time is that of the distillation '
            'step to the student\'s own step. Memory is the peak to that of the student\'s own step and the teacher\'s '
            'weights.',
            '\n'.join(['| variant | time | at most | | memory | at most | |', '|---|---|---|---|---|---|---|', *rows])]


def summary(results: dict, device: str, seconds: float) -> str:
    """Returns the text of summary.md."""
    environments = [result['found']['environment'] for result in results.values() if result['found']]
    where = max(environments, key=len, default={})
    parts = [f'# This package on {where.get("device", device)}',
             ', '.join(f'{key} {value}' for key, value in where.items()) + f'. All in {seconds:.0f} s.']
    if device == 'cpu':
        parts.append('A miniature run on a CPU. It checks that everything runs; times and memory are meaningless.')
    rows = [f'| {name} | {result["outcome"]} | {result["seconds"]} | {result["detail"]} |'
            for name, result in results.items()]
    parts.append('\n'.join(['| stage | outcome | seconds | |', '|---|---|---|---|', *rows]))
    jobs = (results.get('jobs') or {}).get('found')
    if jobs:
        rows = [f'| {job["name"]} | {job["outcome"]} | {job["seconds"]} | {job["peak_bytes"] / 2**20:.0f} |'
                for job in jobs['jobs']]
        parts += ['## Jobs', '\n'.join(['| job | outcome | seconds | peak on the GPU (MiB) |', '|---|---|---|---|',
                                        *rows])]
    parts += goals(results)
    parts += [f'## {name}\n\n{result["printed"].strip()}' for name, result in results.items()
              if name not in ('tests', 'jobs') and result['printed'].strip()]
    return '\n\n'.join(parts) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=['cuda', 'cpu'], default='cuda')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/gpu'), help='folder to write; default %(default)s')
    parser.add_argument('--stages', nargs='+', metavar='NAME', help='stages to run, such as tests; default: all')
    parser.add_argument('--limit', type=float, default=LIMIT, help='total time limit in seconds; default %(default)s')
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # stops the running stages, as an interrupt does
    began, out = time.monotonic(), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        planned = stages(args.device, Path(folder))
        names = [stage.name for stage in planned]
        unknown = set(args.stages or []) - set(names)
        if unknown:
            parser.error(f'--stages: unknown stage {", ".join(sorted(unknown))}, expected one of {", ".join(names)}')
        planned = [stage for stage in planned if stage.name in (args.stages or names)]
        for log in {stage.log for stage in planned}:
            (out / log).write_text('')
        results: dict[str, dict] = {}

        def left() -> float:
            return args.limit - (time.monotonic() - began)

        def finish(run: Run) -> None:
            name = run.stage.name
            results[name] = checked(name, run.result(), args.device)
            print(f'{name}: {results[name]["outcome"]}, {results[name]["seconds"]} s. {results[name]["detail"]}',
                  flush=True)
            ordered = {each: results[each] for each in names if each in results}
            (out / 'results.json').write_text(json.dumps(ordered, indent=1))
            (out / 'summary.md').write_text(summary(ordered, args.device, time.monotonic() - began))

        together = [stage for stage in planned if stage.name in ('tests', 'jobs')]
        runs = [Run(stage, out, Path(folder), args.device, left()) for stage in together]
        try:
            for run in runs:
                finish(run)
        finally:
            for run in runs:
                run.end()
        for stage in planned:
            if stage not in together:
                finish(Run(stage, out, Path(folder), args.device, left()))
    print(f'{out / "summary.md"}: summary of the results')
    sys.exit(any(result['outcome'] != 'ok' for result in results.values()))


if __name__ == '__main__':
    main()
