"""Composes every pair of compose_pairs.txt, and writes docs/compose.md: which pairs work, and why others are refused.

Results are saved as one JSON line per pair. Run the program again to continue where it stopped. The libraries are
imported once, and each pair is composed in its own process with a time limit.
"""
import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import mmkd_plugin  # noqa: F401  makes MMRazor importable
from mmkd_plugin.compose import METHODS, compose

ROOT = Path(__file__).resolve().parents[2]
PAIRS = Path(__file__).with_name('compose_pairs.txt')
ADDRESS = 'https://example.org/teacher.pth'  # never downloaded
BUG = 'cannot be composed:'  # part of compose's message for an unexpected error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--results', type=Path, default=ROOT / 'docs/results/compose_sweep.jsonl')
    parser.add_argument('--page', type=Path, default=ROOT / 'docs/compose.md')
    parser.add_argument('--method', choices=METHODS, default='amd')
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--limit', type=int, default=300, metavar='SECONDS',
                        help='CPU time for one pair; default %(default)s')
    parser.add_argument('--only', default='', metavar='TEXT', help='only pairs whose names contain TEXT')
    parser.add_argument('--again', nargs='*', default=(), choices=('refused', 'bug'), help='results to try again')
    args = parser.parse_args()
    done = read(args.results)
    todo = [pair for pair in pairs() if args.only in ' '.join(pair)
            and (pair not in done or done[pair]['status'] in args.again)]
    for i, result in enumerate(sweep(todo, args), 1):
        done[result['student'], result['teacher']] = result
        args.results.write_text(''.join(f'{json.dumps(done[pair])}\n' for pair in pairs() if pair in done))
        print(f'{i}/{len(todo)}', *(result[key] for key in ('status', 'seconds', 'student', 'teacher', 'text')),
              flush=True)
    args.page.write_text(page([done[pair] for pair in pairs() if pair in done]))


def pairs() -> list[tuple[str, str]]:
    """Returns the names of student and teacher of every pair in the list."""
    found, library = [], ''
    for line in PAIRS.read_text().splitlines():
        names = [] if line.startswith('#') else line.split()
        if len(names) == 1:
            library = names[0]
        elif names:
            found.append((_full(names[0], library, names[0]), _full(names[1], library, names[0])))
    return found


def _full(name: str, library: str, student: str) -> str:
    own, _, path = name.rpartition('::')
    if '/' not in path:
        path = f'{student.rpartition("/")[0]}/{path}'
    return f'{own or library}::{path}.py'


def read(path: Path) -> dict[tuple[str, str], dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {(result['student'], result['teacher']): result for result in map(json.loads, lines)}


def sweep(todo: list[tuple[str, str]], args: argparse.Namespace) -> Iterator[dict]:
    """Yields the result of each pair, with at most ``args.jobs`` at a time."""
    import mmdet.models  # noqa: F401  otherwise every process would import it
    import mmpretrain.models  # noqa: F401
    from mmdet.utils import register_all_modules as register_mmdet
    from mmpretrain.utils import register_all_modules as register_mmpretrain
    register_mmdet(init_default_scope=False)
    register_mmpretrain(init_default_scope=False)
    fork, running, waiting = multiprocessing.get_context('fork'), [], list(todo)
    while waiting or running:
        while waiting and len(running) < args.jobs:
            receiver, sender = fork.Pipe(False)
            pair = waiting.pop(0)
            process = fork.Process(target=try_pair, args=(*pair, args.method, args.limit, sender))
            process.start()
            sender.close()
            running.append((pair, process, receiver, time.time()))
        for job in list(running):
            pair, process, receiver, start = job
            seconds = time.time() - start
            if not receiver.poll(0.2 / len(running)):
                continue
            try:
                status, text = receiver.recv()
            except EOFError:
                process.join()
                status, text = 'bug', f'the process ended with code {process.exitcode}, {-signal.SIGXCPU} at the limit'
            process.join()
            running.remove(job)
            yield dict(student=pair[0], teacher=pair[1], method=args.method, status=status, seconds=round(seconds),
                       text=text)


def try_pair(student: str, teacher: str, method: str, limit: int, sender) -> None:
    """Sends the status of a pair, and its layers or the reason why it is refused."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + limit, resource.RLIM_INFINITY))
    warnings.simplefilter('ignore')
    sys.stdout = sys.stderr = open(os.devnull, 'w')  # noqa: SIM115  hides the output of the libraries
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = compose(student, teacher, method, ADDRESS, f'{folder}/config.py')
            rows = [line.split() for line in report.splitlines() if line.startswith('loss_')]
            layers = dict.fromkeys('='.join(dict.fromkeys(row[1:3])) for row in rows if 'kd' not in row[0])
            remarks = [line for line in report.splitlines() if line.startswith(('The maps of', 'With random'))]
            sender.send(('works', '; '.join([*layers, *remarks])))
        except ValueError as error:
            text = ' '.join(str(error).split()).replace(f'{sysconfig.get_path("purelib")}/', '')
            sender.send(('bug' if BUG in text else 'refused', text))
        except BaseException as error:  # the user would get a traceback
            sender.send(('bug', f'{type(error).__name__}: {error}'))


def page(results: list[dict]) -> str:
    """Returns the text of docs/compose.md."""
    count = {status: [each for each in results if each['status'] == status] for status in ('works', 'refused', 'bug')}
    lines = ['# Pairs of models that were tried', '',
             f'`tools/compose_config.py --method amd` on {len(results)} pairs of configs of MMDetection and '
             f'MMPretrain, without optional packages: {len(count["works"])} work, {len(count["refused"])} are '
             f'refused with an error message, {len(count["bug"])} fail otherwise. *Works* means: the config is written '
             'and trained for one step, its layers depend on the image, and the deepest of them lies in the deeper '
             'half of the backbone or in the neck. The page is written by `python tools/dev/compose_sweep.py`, from '
             'the list in `tools/dev/compose_pairs.txt`.', '']
    for status, title, last in (('bug', 'Fail', 'how'), ('refused', 'Refused', 'reason'),
                                ('works', 'Work', 'layers (`STUDENT=TEACHER` where the names differ) and remarks')):
        if count[status]:
            lines += [f'## {title}', '', f'| student | teacher | {last} |', '|---|---|---|']
            lines += [f'| {_short(each["student"])} | {_short(each["teacher"])} | {each["text"].replace("|", " ")} |'
                      for each in count[status]] + ['']
    return '\n'.join(lines)


def _short(name: str) -> str:
    return name.removesuffix('.py')


if __name__ == '__main__':
    main()
