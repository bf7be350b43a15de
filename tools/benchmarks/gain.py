"""Benchmark of accuracy: trains the experiments of gain_tasks.py with several seeds, each run in its own process.

The processes are forked from one that has imported the libraries, because importing takes longer than a short training.

Every completed run is a line in docs/results/TASK.jsonl. A run that already has a line with the same config is not
repeated, so the same command continues an interrupted benchmark. With --tune, the candidates for each experiment's
weights run on the tuning split, with their own seed, into TASK_tuning.jsonl. The reported runs use the best candidates.
An experiment that has not been tuned runs with the first of its weights, and the report marks it.
tools/benchmarks/report_gain.py writes the results into docs/results.md.

Create the data first, with tools/dataset_converters/bccd.py and cifar10.py.
"""
import argparse
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import torch
from bootstrap import resampled_accuracy, resampled_ap
from gain_tasks import TASKS, TUNING_SEEDS, Experiment, Task, Weights
from mmengine.config import Config
from mmengine.runner import Runner, find_latest_checkpoint

from mmkd_plugin.checkpoints.reading import read_weights
from mmkd_plugin.checkpoints.resume import add_safety_hooks
from mmkd_plugin.deploy.environment import environment
from mmkd_plugin.utils import closest

RESULTS = Path('docs/results')
PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload([
    'mmdet.models', 'mmdet.datasets', 'mmdet.evaluation', 'mmdet.visualization', 'mmpretrain.models',
    'mmpretrain.datasets', 'mmpretrain.evaluation', 'mmpretrain.visualization', 'mmkd_plugin.models'])
POLICY = 'policy/'  # prefix of FreezePolicyHook's scalars
MEASURED = 'weight/'  # prefix of the scalars of weights that are measured in training
DIVERGED = 3  # exit status of a training whose loss became NaN or infinite
UNDECIDING = {'filename', 'data_command', 'randomness', 'default_hooks',
              'visualizer', 'vis_backends', 'log_level', 'log_processor'}


@dataclass(frozen=True)
class Run:
    """One training. The fingerprint of the config covers everything except the seed."""
    experiment: str
    seed: int
    weights: Weights
    config: Config
    fingerprint: str

    @property
    def key(self) -> tuple[str, int, str]:
        return self.experiment, self.seed, self.fingerprint

    @property
    def name(self) -> str:
        return '_'.join([self.experiment, *(f'{weight:g}' for weight in self.weights), str(self.seed)])


def main() -> None:
    args = parse_args()
    os.environ['OMP_NUM_THREADS'] = '1'  # for the training processes
    torch.set_num_threads(1)  # recorded in the results
    _surroundings()
    failed, name = 0, ''
    try:
        for name in args.task:  # missing data would otherwise end a run after many hours
            check_data(TASKS[name], args.data)
        for name in args.task:
            failed += run_task(name, args)
    except ValueError as error:
        sys.exit(f'{name}: {error}')
    if failed:
        sys.exit(f'{failed} runs failed. Run the same command to try them again')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--task', nargs='+', choices=TASKS, help='tasks to run', default=[*TASKS])
    parser.add_argument('--experiments', nargs='+', default=None, help='only these experiments')
    parser.add_argument('--seeds', type=int, nargs='+', default=None,
                        help='only these of the seeds of the experiments')
    parser.add_argument('--tune', action='store_true', help='tune the weights instead of running the reported seeds')
    parser.add_argument('--jobs', type=int, default=2, help='number of parallel runs, with one thread each')
    parser.add_argument('--data', type=Path, default=Path('data'), help='folder that contains the data sets')
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the results')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/gain'),
                        help='folder for teachers and logs of failed runs')
    return parser.parse_args()


def check_data(task: Task, data: Path) -> None:
    """Raises ``ValueError`` if data of a task are missing."""
    for needed, command in task.data.items():
        if not (data / needed).exists():
            raise ValueError(f'--data: {data / needed} not found. Run `{command} --out {data / needed}`')


def run_task(name: str, args: argparse.Namespace) -> int:
    """Runs the missing runs of a task; returns how many failed.

    Raises:
        ValueError: an experiment is unknown, data are missing, a tuning is not complete, or the results have students
            of another teacher.
    """
    task, tuned = TASKS[name], args.results / f'{name}_tuning.jsonl'
    names = args.experiments or task.experiments
    unknown = set(names) - set(task.experiments)
    if unknown:
        raise ValueError(f'--experiments: no experiment {min(unknown)!r}; {closest(min(unknown), task.experiments)}')
    check_data(task, args.data)
    folder, place = args.work_dir / name, args.work_dir / 'teachers' / task.teacher
    folder.mkdir(parents=True, exist_ok=True)
    with locked(args.work_dir / 'lock'):  # tasks share teachers, and this removes folders
        for left in folder.iterdir():  # left by a killed benchmark
            if left.is_dir():
                shutil.rmtree(left)
        with results_file(args.results / f'{name}.jsonl') as results:
            train_teacher(task, place, args.data, results)
            teacher = Path(find_latest_checkpoint(place))
            if not args.tune:
                runs = [run for run in reported_runs(task, read(tuned), names)
                        if args.seeds is None or run.seed in args.seeds]
                return run_all(name, task, runs, teacher, folder, results, args)
        with results_file(tuned) as results:
            return run_all(name, task, list(tuning_runs(task, names)), teacher, folder, results, args)


def teacher_run(task: Task) -> Run:
    return _run(task, Experiment('teacher', task.teacher), 'teacher', 0, (), 'test')


def tuning_runs(task: Task, names: Collection[str]) -> Iterator[Run]:
    """Yields the candidate runs of the experiments that have their own weights."""
    for seed in TUNING_SEEDS:
        for name in names:
            yield from _candidates(task, name, seed)


def _candidates(task: Task, name: str, seed: int) -> Iterator[Run]:
    for weights in task.experiments[name].weights:
        yield _run(task, task.experiments[name], name, seed, weights, 'tuning')


def reported_runs(task: Task, tuning: list[dict], names: Collection[str]) -> Iterator[Run]:
    """Yields the reported runs of these experiments, one seed after the other.

    Raises:
        ValueError: the tuning of an experiment is not complete.
    """
    chosen = {name: task.experiments[name] for name in names}
    runs = {name: _run(task, experiment, name, 0, best_weights(task, name, tuning), 'test')
            for name, experiment in chosen.items()}
    for seed in range(1, max(experiment.seeds for experiment in chosen.values()) + 1):
        for name, experiment in chosen.items():
            if seed <= experiment.seeds:
                yield _with_seed(runs[name], seed)


def is_tuned(task: Task, name: str, tuning: list[dict]) -> bool:
    """Whether the weights of an experiment were chosen by tuning, its own or those of another experiment."""
    name = task.experiments[name].weights_of or name
    prints = {run.fingerprint for run in _candidates(task, name, TUNING_SEEDS[0])}
    return any((line['experiment'], line['fingerprint']) in {(name, found) for found in prints} for line in tuning)


def best_weights(task: Task, name: str, tuning: list[dict]) -> Weights:
    """Returns the weights with the best mean over the tuning seeds that never diverged; the first if there is a tie.

    An experiment with ``weights_of`` gets the weights of that experiment. One without weights gets none. One that has
    not been tuned gets its first weights.

    Raises:
        ValueError: the tuning is not complete, or training diverged with all weights.
    """
    experiment = task.experiments[name]
    if experiment.weights_of:
        return best_weights(task, experiment.weights_of, tuning)
    if not experiment.weights:
        return ()
    if not is_tuned(task, name, tuning):
        return experiment.weights[0]
    means = {}
    for run in _candidates(task, name, TUNING_SEEDS[0]):
        found = {line['seed']: line['metric'] for line in tuning
                 if (line['experiment'], line['fingerprint']) == (name, run.fingerprint)}
        missing = set(TUNING_SEEDS) - set(found)
        if missing:
            raise ValueError(f'{name}: weights {run.weights} are not tuned with seed {min(missing)} yet. Run '
                             'tools/benchmarks/gain.py --tune first')
        if None not in found.values():
            means[run.weights] = statistics.fmean(found.values())
    if not means:
        raise ValueError(f'{name}: the training diverged with all weights')
    return max(means, key=means.get)


def _run(task: Task, experiment: Experiment, name: str, seed: int, weights: Weights, split: str) -> Run:
    cfg = _load(Path(task.folder) / f'{experiment.config}.py').copy()
    cfg.merge_from_dict(experiment.options(*weights))
    if split == 'test':
        cfg.val_dataloader, cfg.val_evaluator = cfg.test_dataloader, cfg.test_evaluator
    return _with_seed(Run(name, seed, weights, cfg, fingerprint(cfg)), seed)


@functools.cache
def _load(path: Path) -> Config:
    return Config.fromfile(path)


def _with_seed(run: Run, seed: int) -> Run:
    cfg = run.config.copy()
    cfg.randomness = dict(seed=seed)
    return Run(run.experiment, seed, run.weights, cfg, run.fingerprint)


def _deciding(cfg: Config) -> dict:
    return {key: value for key, value in cfg.to_dict().items() if key not in UNDECIDING}


def fingerprint(cfg: Config) -> str:
    """Returns a hash of the config and the teacher's config, without seed, logs and paths.

    It does not cover code. If a change of code changes results, delete their lines.
    """
    deciding = _deciding(cfg)
    model = deciding['model']
    if 'teacher' in model:
        model.pop('teacher_ckpt')
        model['teacher'] = _deciding(_load(Path(model['teacher']['cfg_path'])))
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()[:16]


def train_teacher(task: Task, place: Path, data: Path, results: 'Results') -> None:
    """Trains the task's teacher in ``place`` if it does not exist, and adds its line to the results."""
    run, mark = teacher_run(task), place / 'line.json'
    line = json.loads(mark.read_text()) if mark.exists() else {}
    if line.get('fingerprint') != run.fingerprint:
        print(f'{task.title}: training the teacher', flush=True)
        shutil.rmtree(place, ignore_errors=True)
        line = train(task, run, place, data, None)
        mark.write_text(json.dumps(line))  # written last, so that a marked teacher is complete
    if run.key not in results.keys:
        results.append(line)


def weights_hash(checkpoint: Path) -> str:
    """Returns a hash of the weights of a checkpoint."""
    found = hashlib.sha256()
    for name, value in sorted(read_weights(str(checkpoint), 'teacher').items()):
        found.update(name.encode())
        found.update(value.numpy().tobytes())
    return found.hexdigest()[:16]


def run_all(name: str, task: Task, runs: list[Run], teacher: Path, folder: Path, results: 'Results',
            args: argparse.Namespace) -> int:
    """Runs the runs that are not in the results, ``args.jobs`` at a time; returns how many failed.

    A diverged training is a result, with the metric None. In tuning, it excludes these weights.

    Raises:
        ValueError: the results have students of another teacher.
    """
    weights = weights_hash(teacher)
    others = {line['teacher'] for line in read(results.path) if line.get('teacher', weights) != weights}
    if others:
        raise ValueError(f'{results.path} has students of another teacher ({min(others)}) than the one in '
                         f'{teacher.parent} ({weights}). Use another --results')
    todo = [run for run in runs if run.key not in results.keys]
    print(f'{name}: {len(runs) - len(todo)} of {len(runs)} runs are in {results.path}', flush=True)
    began, done, failed, lock = time.time(), 0, 0, threading.Lock()

    def perform(run: Run) -> None:
        nonlocal done, failed
        log = folder / f'failed_{run.name}.log'
        with TemporaryDirectory(prefix=f'{run.experiment}-{run.seed}-', dir=folder) as place:
            try:
                line = dict(train(task, run, Path(place), args.data, teacher), teacher=weights)
                outcome = f'{task.scale * line["metric"]:.2f} in {line["seconds"]} s'
                log.unlink(missing_ok=True)
            except (RuntimeError, FloatingPointError) as error:
                diverged = isinstance(error, FloatingPointError)
                log.write_text(str(error))
                outcome = f'{"diverged" if diverged else "failed"}, see {log}'
                line = _line(run, metric=None, teacher=weights, seconds=0) if diverged else None
        with lock:
            done += 1
            if line is None:
                failed += 1
            else:
                results.append(line)
            left = (time.time() - began) / done * (len(todo) - done)
            at = ', '.join(f'{weight:g}' for weight in run.weights)
            print(f'{name}: {run.experiment}{f" at {at}" if at else ""}, seed {run.seed}: {outcome}; '
                  f'{len(todo) - done} left, about {left / 3600:.1f} h', flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(perform, todo))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def train(task: Task, run: Run, place: Path, data: Path, teacher: Path | None) -> dict:
    """Trains in ``place`` and returns the run's line for the results.

    Raises:
        FloatingPointError: the loss became NaN or infinite. The message is the log.
        RuntimeError: training failed otherwise. The message is the log.
    """
    cfg = Config(_with_data(run.config.to_dict(), data.resolve()), format_python_code=False)  # formatting takes seconds
    cfg.work_dir = str(place)
    if teacher is not None:
        cfg.default_hooks.checkpoint = None
        cfg.default_hooks.best_student = None
        if 'teacher_ckpt' in cfg.model:
            cfg.model.teacher_ckpt = str(teacher.resolve())
    resampled = _keep_predictions(cfg, place)
    place.mkdir(parents=True, exist_ok=True)
    began, log = time.time(), place / 'stdout.log'
    process = PROCESSES.Process(target=fit, args=(cfg.to_dict(), str(log)))
    process.start()
    process.join()
    if process.exitcode:
        error = FloatingPointError if process.exitcode == DIVERGED else RuntimeError
        raise error(log.read_text() if log.exists() else f'ended with {process.exitcode} before it began')
    seconds = round(time.time() - began)
    scalars = [json.loads(line) for file in sorted(place.glob('*/vis_data/scalars.json'))
               for line in file.read_text().splitlines()]
    measured = [line for line in scalars if task.metric in line]
    detections = place / 'detections.bbox.json'
    if not measured and not (detections.exists() and not json.loads(detections.read_text())):
        raise RuntimeError(f'{task.metric} is not in the log\n{log.read_text()}')
    last = measured[-1] if measured else {task.metric: 0.0}  # CocoMetric has no AP without detections
    policy = [line for line in scalars if any(key.startswith(POLICY) for key in line)]
    more = dict(metrics={key: value for key, value in last.items() if key not in ('data_time', 'time', 'step')})
    if policy:
        more['policy'] = [{key.removeprefix(POLICY): round(value, 4) for key, value in line.items()}
                          for line in policy]
    measured_weights = {key.removeprefix(MEASURED): value for line in scalars for key, value in line.items()
                        if key.startswith(MEASURED)}
    if measured_weights:
        more['measured'] = measured_weights
    if run.seed not in TUNING_SEEDS:
        more['resampled'] = [round(value, 4) for value in resampled().tolist()]
    return _line(run, last[task.metric], **more, seconds=seconds)


def _with_data(config: Any, data: Path) -> Any:
    """Returns a config in which the folder ``data`` replaces data/ at the start of paths."""
    if isinstance(config, dict):
        return {key: _with_data(value, data) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(_with_data(value, data) for value in config)
    if isinstance(config, str) and config.startswith('data/'):
        return f'{data}/{config.removeprefix("data/")}'
    return config


def _keep_predictions(cfg: Config, place: Path) -> functools.partial:
    """Makes the last validation write its predictions; returns a function for the metric on bootstrap draws."""
    if cfg.val_evaluator.type == 'CocoMetric':
        cfg.val_evaluator.outfile_prefix = str(place / 'detections')
        return functools.partial(resampled_ap, cfg.val_evaluator.ann_file, place / 'detections.bbox.json')
    file = place / 'predictions.pkl'
    cfg.val_evaluator = [cfg.val_evaluator, dict(type='DumpResults', out_file_path=str(file))]
    return functools.partial(resampled_accuracy, file)


def _line(run: Run, metric: float | None, **more) -> dict:
    return dict(experiment=run.experiment, seed=run.seed, weights=run.weights, metric=metric,
                fingerprint=run.fingerprint, **more, **_surroundings())


@functools.cache
def _surroundings() -> dict:
    """The code that the benchmark started with and has imported."""
    return environment(_device())


def _device() -> str:
    """The device that MMEngine's Runner trains on."""
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def fit(config: dict, log: str) -> None:
    """Trains a config as tools/train.py does, in a separate process that ends with its parent."""
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
    """A file with one JSON object per line. Lines are added completely or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys = {(line['experiment'], line['seed'], line['fingerprint']) for line in read(path)}

    def append(self, line: dict) -> None:
        """Adds a line with a single write."""
        data = (json.dumps(line) + '\n').encode()
        with self.path.open('ab', buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
        self.keys.add((line['experiment'], line['seed'], line['fingerprint']))


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """Locks a file for this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('ab') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f'{path} is in use: another benchmark is running') from None
        yield file


@contextmanager
def results_file(path: Path) -> Iterator[Results]:
    """Locks the file for this process, and removes an incomplete last line."""
    with locked(path) as file:
        data = path.read_bytes()
        file.truncate(data.rfind(b'\n') + 1)
        yield Results(path)


def read(path: Path) -> list[dict]:
    """Returns the complete lines of a file of results; none if the file does not exist."""
    data = path.read_text() if path.exists() else ''
    return [json.loads(line) for line in data[:data.rfind('\n') + 1].splitlines()]


if __name__ == '__main__':
    main()
