"""The part of docs/results.md on the cost of distillation, from the results of the benchmarks of time and memory.

``docs/results/step_*.json`` is the ``--out`` of tools/benchmarks/step.py, ``loss_*.json`` that of
tools/benchmarks/loss.py.
"""
import json
from pathlib import Path

import loss
import step

STEP = """The lower bound is the student's own training step and the teacher as far as its neck. Ratios are medians over
interleaved rounds with their 95% interval; peak memory is that of all tensors, weights and optimiser included."""
LOSS = """The lower bound is the time to read both maps once, then read one of them and write its gradient once. "Plain"
is a direct implementation of the paper's equations with autograd. Ratios are medians over interleaved rounds with their
95% interval."""


def sections(results: Path, images: Path) -> list[str]:
    """Returns the parts of the page in the order of the file names, and draws their plots into ``images``."""
    steps = [_step(path, images) for path in sorted(results.glob('step_*.json'))]
    losses = [_loss(path, images) for path in sorted(results.glob('loss_*.json'))]
    return [*([f'## What a step costs\n\n{STEP}', *steps] if steps else []),
            *([f'## What the loss of AMD costs\n\n{LOSS}', *losses] if losses else [])]


def _step(path: Path, images: Path) -> str:
    found = json.loads(path.read_text())
    varied, title = found['varied'], found['title']
    if varied:
        title += f' against {step.LABELS[varied]}'
    title += f', torch {found["environment"]["torch"].split("+")[0]}'
    goals = [] if varied else found['goals']  # a sweep shows the growth of the cost
    parts = [f'### {title}', _measured(found), step.report(found['variants'], goals, varied)]
    if varied:
        picture = images / f'results_{path.stem}.png'
        step.draw(found['variants'], varied, picture)
        parts.append(f'![Time and memory against {step.LABELS[varied]}](images/{picture.name})')
    return '\n\n'.join(parts)


def _loss(path: Path, images: Path) -> str:
    found = json.loads(path.read_text())
    picture = images / f'results_{path.stem}.png'
    loss.draw(found['maps'], picture)
    return '\n\n'.join([_measured(found), loss.table(found['maps']),
                        f'![Time and memory against the size of the map](images/{picture.name})'])


def _measured(found: dict) -> str:
    where = ', '.join(f'{key} {value}' for key, value in found['environment'].items())
    return f'`{found["command"]}`\n\n{found["rounds"]} rounds, {found["clock"]} clock; {where}.'
