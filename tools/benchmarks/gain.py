"""Does distillation help: trains the rows of gain_tasks.py, seed after seed, each run a process of its own.

The processes are forked from one that has imported the libraries, which takes longer than a short training.

Every run that ends is a line in docs/results/TASK.jsonl; what is there already, with the same config, is not run
again, so that an interrupted benchmark goes on where it was. With --tune: the candidates for each row's weight, on the
tuning split and with seeds of their own, into TASK_tuning.jsonl, from where the runs that count take the best.
tools/benchmarks/report_gain.py turns the results into docs/results.md.
"""
import argparse
import copy
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from gain_tasks import TASKS, TUNING_SEEDS, Row, Task
from mmengine.config import Config
from mmengine.runner import Runner, find_latest_checkpoint

from mmkd_plugin.checkpoints.resume import add_safety_hooks
from mmkd_plugin.deploy.environment import environment
from mmkd_plugin.utils import closest

RESULTS = Path('docs/results')
PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload([
    'mmdet.models', 'mmdet.datasets', 'mmdet.evaluation', 'mmdet.visualization', 'mmpretrain.models',
    'mmpretrain.datasets', 'mmpretrain.evaluation', 'mmpretrain.visualization', 'mmkd_plugin.models'])
POLICY = 'policy/'  # how FreezePolicyHook's scalars begin
DIVERGED = 3  # exit status of a training whose loss became infinite or no number
UNDECIDING = {'filename', 'randomness', 'default_hooks', 'visualizer', 'vis_backends', 'log_level', 'log_processor'}


@dataclass(frozen=True)
class Run:
    """One training: the config's fingerprint covers all but the seed."""
    row: str
    seed: int
    weight: float | None
    config: Config
    fingerprint: str

    @property
    def key(self) -> tuple[str, int, str]:
        return self.row, self.seed, self.fingerprint


def main() -> None:
    args = parse_args()
    os.environ['OMP_NUM_THREADS'] = '1'  # of the processes that train
    torch.set_num_threads(1)  # as the results are to say
    _surroundings()
    subprocess.run([sys.executable, '-W', 'ignore', 'tools/dataset_converters/make_fashion.py'], check=True)
    failed = 0
    for name in args.task:
        try:
            failed += run_task(name, args)
        except ValueError as error:
            sys.exit(f'{name}: {error}')
    if failed:
        sys.exit(f'{failed} runs failed; the same command tries them again')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--task', nargs='+', choices=TASKS, help='what to run',
                        default=[name for name, task in TASKS.items() if _device() == 'cuda' or not task.needs_gpu])
    parser.add_argument('--rows', nargs='+', default=None, help='only these rows')
    parser.add_argument('--seeds', type=int, nargs='+', default=None,
                        help='only these seeds, of those that the rows have')
    parser.add_argument('--tune', action='store_true', help='try the weights instead of reporting the best')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, of one thread each')
    parser.add_argument('--results', type=Path, default=RESULTS, help='where the results are')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/gain'), help='teachers, and logs of failures')
    return parser.parse_args()


def run_task(name: str, args: argparse.Namespace) -> int:
    """Runs what is missing of a task; returns how many runs failed."""
    task, tuned = TASKS[name], args.results / f'{name}_tuning.jsonl'
    unknown = set(args.rows or ()) - set(task.rows)
    if unknown:
        raise ValueError(f'--rows: {min(unknown)!r} is no row; {closest(min(unknown), task.rows)}')
    folder, place = args.work_dir / name, args.work_dir / 'teachers' / task.teacher
    folder.mkdir(parents=True, exist_ok=True)
    with results_file(args.results / f'{name}.jsonl') as results:
        for left in folder.glob('*/'):  # by a benchmark that was killed
            shutil.rmtree(left)
        train_teacher(task, place, results)
        teacher = Path(find_latest_checkpoint(place))
        if not args.tune:
            runs = [run for run in reported_runs(task, read(tuned), args.rows or task.rows)
                    if args.seeds is None or run.seed in args.seeds]
            return run_all(name, task, runs, teacher, folder, results, args.jobs, tuning=False)
    failed = 0
    with results_file(tuned) as results:
        for built_on_others in (False, True):  # these need the best weights of those
            runs = list(tuning_runs(task, read(tuned), built_on_others, args.rows or task.rows))
            failed += run_all(name, task, runs, teacher, folder, results, args.jobs, tuning=True)
    return failed


def teacher_run(task: Task) -> Run:
    alone = replace(task, rows=dict(teacher=Row('teacher', task.teacher)))
    return _run(alone, 'teacher', 0, {}, None, 'test')


def tuning_runs(task: Task, tuning: list[dict], built_on_others: bool, names: Collection[str]) -> Iterator[Run]:
    """Yields the candidates of those of these rows that are tuned and have, or have not, weights of other rows too.

    Raises:
        ValueError: the tuning of another row is needed and not complete.
    """
    for name, row in task.rows.items():
        if name in names and row.weights and bool(row.weights_of) == built_on_others:
            for seed in TUNING_SEEDS:
                yield from _candidates(task, name, tuning, seed)


def _candidates(task: Task, name: str, tuning: list[dict], seed: int) -> Iterator[Run]:
    row = task.rows[name]
    given = best_options(task, row.weights_of, tuning) if row.weights_of else {}
    for weight in row.weights:
        yield _run(task, name, seed, {**given, **_weighted(row, weight)}, weight, 'tuning')


def reported_runs(task: Task, tuning: list[dict], names: Collection[str]) -> Iterator[Run]:
    """Yields the runs that count of these rows, all of one seed before the next.

    Raises:
        ValueError: the tuning of a row is not complete.
    """
    rows = {name: row for name, row in task.rows.items() if name in names}
    runs = {name: _run(task, name, 0, best_options(task, name, tuning), best_weight(task, name, tuning), 'test')
            for name in rows}
    for seed in range(1, max(row.seeds for row in rows.values()) + 1):
        for name, row in rows.items():
            if seed <= row.seeds:
                yield _with_seed(runs[name], seed)


def best_weight(task: Task, name: str, tuning: list[dict]) -> float | None:
    """Returns the weight with the best mean over the tuning seeds, of those that never diverged; the first of equals.

    Raises:
        ValueError: the row's tuning is not complete, or it diverged with every weight.
    """
    means = {}
    for run in _candidates(task, name, tuning, TUNING_SEEDS[0]):
        found = {line['seed']: line['metric'] for line in tuning
                 if (line['row'], line['fingerprint']) == (name, run.fingerprint)}
        missing = set(TUNING_SEEDS) - set(found)
        if missing:
            raise ValueError(f'{name}: weight {run.weight:g} is not tuned with seed {min(missing)} yet; run '
                             'tools/benchmarks/gain.py --tune first')
        if None not in found.values():
            means[run.weight] = statistics.fmean(found.values())
    if task.rows[name].weights and not means:
        raise ValueError(f'{name}: the training diverged with every weight')
    return max(means, key=means.get) if means else None


def best_options(task: Task, name: str, tuning: list[dict]) -> dict[str, float]:
    """Returns the options of a row's best weights, those of the row that it is built on included.

    Raises:
        ValueError: the tuning of one of them is not complete.
    """
    row = task.rows[name]
    given = best_options(task, row.weights_of, tuning) if row.weights_of else {}
    return {**given, **(_weighted(row, best_weight(task, name, tuning)) if row.weights else {})}


def _weighted(row: Row, weight: float) -> dict[str, float]:
    return {option: factor * weight for option, factor in row.weight.items()}


def _run(task: Task, name: str, seed: int, weights: dict[str, float], weight: float | None, split: str) -> Run:
    """The run of a row with these options for weights, ``weight`` being the row's own."""
    row = task.rows[name]
    cfg = _load(Path(task.folder) / f'{row.config}.py').copy()
    cfg.merge_from_dict(weights)
    cfg.merge_from_dict(row.options)  # after the weights, of which an ablation may take the whole place
    if split == 'test':
        cfg.val_dataloader, cfg.val_evaluator = cfg.test_dataloader, cfg.test_evaluator
    return _with_seed(Run(name, seed, weight, cfg, fingerprint(cfg)), seed)


@functools.cache
def _load(path: Path) -> Config:
    return Config.fromfile(path)


def _with_seed(run: Run, seed: int) -> Run:
    cfg = run.config.copy()
    cfg.randomness = dict(seed=seed)
    return Run(run.row, seed, run.weight, cfg, run.fingerprint)


def _deciding(cfg: Config) -> dict:
    return {key: value for key, value in cfg.to_dict().items() if key not in UNDECIDING}


def fingerprint(cfg: Config) -> str:
    """Returns a hash of the config and the teacher's, without seed, logs and places of files.

    It knows nothing of the code: after a change of that which changes results, delete their lines.
    """
    told = _deciding(cfg)
    model = told['model']
    if 'teacher' in model:
        model.pop('teacher_ckpt')
        model['teacher'] = _deciding(_load(Path(model['teacher']['cfg_path'])))
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def train_teacher(task: Task, place: Path, results: 'Results') -> None:
    """Trains the task's teacher in ``place`` unless it is there, and sees to its line in the results."""
    run, mark = teacher_run(task), place / 'line.json'
    line = json.loads(mark.read_text()) if mark.exists() else {}
    if line.get('fingerprint') != run.fingerprint:
        print(f'{task.title}: training the teacher', flush=True)
        shutil.rmtree(place, ignore_errors=True)
        line = train(task, run, place, None)
        mark.write_text(json.dumps(line))  # last: what is marked is complete
    if run.key not in results.keys:
        results.append(line)


def run_all(name: str, task: Task, runs: list[Run], teacher: Path, folder: Path, results: 'Results',
            jobs: int, tuning: bool) -> int:
    """Runs what the results lack, ``jobs`` at a time; returns how many failed.

    In tuning, a training that diverges is no failure, but the result of a weight that is not to be taken.
    """
    todo = [run for run in runs if run.key not in results.keys]
    print(f'{name}: {len(runs) - len(todo)} of {len(runs)} runs are in {results.path}', flush=True)
    began, done, failed, lock = time.time(), 0, 0, threading.Lock()

    def one(run: Run) -> None:
        nonlocal done, failed
        weight = '' if run.weight is None else f'_{run.weight:g}'
        log = folder / f'failed_{run.row}{weight}_{run.seed}.log'
        with TemporaryDirectory(prefix=f'{run.row}-{run.seed}-', dir=folder) as place:
            try:
                line = train(task, run, Path(place), teacher)
                said = f'{task.scale * line["metric"]:.2f} in {line["seconds"]} s'
                log.unlink(missing_ok=True)
            except (RuntimeError, FloatingPointError) as error:
                diverged = isinstance(error, FloatingPointError)
                log.write_text(str(error))
                said = f'{"diverged" if diverged else "failed"}, see {log}'
                line = _line(run, metric=None) if diverged and tuning else None  # a weight that is not to be taken
        with lock:
            done += 1
            if line is None:
                failed += 1
            else:
                results.append(line)
            left = (time.time() - began) / done * (len(todo) - done)
            weight = '' if run.weight is None else f', weight {run.weight:g}'
            print(f'{name}: {run.row}{weight}, seed {run.seed}: {said}; {len(todo) - done} left, '
                  f'about {left / 3600:.1f} h', flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(one, todo))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def train(task: Task, run: Run, place: Path, teacher: Path | None) -> dict:
    """Trains in ``place`` and returns the run's line of the results.

    Raises:
        FloatingPointError: its loss became infinite or no number; the message is its log.
        RuntimeError: it failed otherwise; the same.
    """
    cfg = copy.deepcopy(run.config)
    cfg.work_dir = str(place)
    if teacher is not None:
        cfg.default_hooks.checkpoint = None
        cfg.default_hooks.best_student = None
        if 'teacher_ckpt' in cfg.model:
            cfg.model.teacher_ckpt = str(teacher.resolve())
    place.mkdir(parents=True, exist_ok=True)
    began, log = time.time(), place / 'stdout.log'
    process = PROCESSES.Process(target=fit, args=(cfg.to_dict(), str(log)))
    process.start()
    process.join()
    if process.exitcode:
        error = FloatingPointError if process.exitcode == DIVERGED else RuntimeError
        raise error(log.read_text() if log.exists() else f'ended with {process.exitcode} before it began')
    scalars = [json.loads(line) for file in sorted(place.glob('*/vis_data/scalars.json'))
               for line in file.read_text().splitlines()]
    curve = [line for line in scalars if task.metric in line]
    policy = [line for line in scalars if any(key.startswith(POLICY) for key in line)]
    told = dict(metrics={key: value for key, value in curve[-1].items() if key not in ('data_time', 'time', 'step')},
                curve=[(line['step'], line[task.metric]) for line in curve])
    if policy:
        told['policy'] = [{key.removeprefix(POLICY): round(value, 4) for key, value in line.items()}
                          for line in policy]
    return _line(run, curve[-1][task.metric], **told, seconds=round(time.time() - began))


def _line(run: Run, metric: float | None, **more) -> dict:
    return dict(row=run.row, seed=run.seed, weight=run.weight, metric=metric, fingerprint=run.fingerprint, **more,
                **_surroundings())


@functools.cache
def _surroundings() -> dict:
    """What was there when the benchmark began, and what it has imported."""
    return environment(_device())


def _device() -> str:
    """Where MMEngine's Runner trains."""
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def fit(config: dict, log: str) -> None:
    """Trains a config as tools/train.py does, in a process that is there for nothing else and ends with its parent."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    with open(log, 'wb') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    cfg = Config(config, format_python_code=False)  # formatting takes seconds
    add_safety_hooks(cfg)
    try:
        Runner.from_cfg(cfg).train()
    except FloatingPointError:
        traceback.print_exc()
        sys.exit(DIVERGED)


def _end_with_the_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


class Results:
    """A file of one JSON object a line, to which whole lines are added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys = {(line['row'], line['seed'], line['fingerprint']) for line in read(path)}

    def append(self, line: dict) -> None:
        """Adds a line by one write, which a killed process has done or not."""
        data = (json.dumps(line) + '\n').encode()
        with self.path.open('ab', buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
        self.keys.add((line['row'], line['seed'], line['fingerprint']))


@contextmanager
def results_file(path: Path) -> Iterator[Results]:
    """Opens the file for this process alone, and cuts off what a machine that went down left of a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('ab') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f'{path} is in use: another benchmark is running') from None
        data = path.read_bytes()
        lock.truncate(data.rfind(b'\n') + 1)
        yield Results(path)


def read(path: Path) -> list[dict]:
    """Returns the whole lines of a file of results, none if it is not there."""
    data = path.read_text() if path.exists() else ''
    return [json.loads(line) for line in data[:data.rfind('\n') + 1].splitlines()]


if __name__ == '__main__':
    main()
