"""Composes a config, tries it, and writes it."""
import inspect
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import HOOKS

from ..checkpoints.guard import data_only
from .network import Network, same_classes, stride
from .text import Plan, config_text
from .trial import Trial, try_one_step
from .wiring import layers_of, propose_inherit, propose_layers


def compose(student: str,
            teacher: str,
            method: str,
            teacher_ckpt: str,
            out: str,
            base: str | None = None,
            layers: Sequence[str] = (),
            overwrite: bool = False,
            trust_checkpoint: bool = False) -> str:
    """Writes the config that distils ``teacher`` into ``student``, after trying it for one step.

    Args:
        student, teacher: a library's config (``mmdet::...``) or a file.
        method: one of ``METHODS``.
        teacher_ckpt: file or address of the teacher's weights. What is at an
            address is not loaded here: the step has a random teacher.
        out: the file to write, in a directory that is there. It appears whole or not at all.
        base: of SoKD, one of ``BASES``; by default fitnet for detectors, reviewkd for classifiers.
        layers: modules, ``NAME`` or ``STUDENT=TEACHER``; by default those whose strides match.
        overwrite: whether ``out`` may be there.
        trust_checkpoint: as in :class:`.TeacherStudentDistill`, which gets it.

    Returns:
        What was wired, as text to print.

    Raises:
        ValueError: an argument is wrong, nothing fits, or the step fails.
    """
    path = Path(out)
    if path.exists() and not overwrite:
        raise ValueError(f'out: {out!r} exists; choose another name, or overwrite it with --overwrite')
    if path.suffix != '.py' or not path.parent.is_dir():
        raise ValueError(f'out: expected a .py file in a directory that is there, got {out!r}')
    if base and method != 'sokd':
        raise ValueError(f'base: {base!r} is what SoKD builds on; method {method!r} takes none')
    remote = '://' in teacher_ckpt
    if not remote and not Path(teacher_ckpt).is_file():
        raise ValueError(f'teacher_ckpt: no file {teacher_ckpt!r} in {Path.cwd()}')
    unfinished = path.with_name(f'{path.stem}.unfinished.py')
    logging.disable(logging.WARNING)  # how each weight was initialised, and what training will say again
    try:
        with data_only(trust_checkpoint, download=False):
            plan = make_plan(Network(student, 'STUDENT'), Network(teacher, 'TEACHER'), method, teacher_ckpt, path, base,
                             layers, trust_checkpoint)
            unfinished.write_text(config_text(plan))
            cfg = _read(unfinished, student)
            trial = try_one_step(cfg, random_teacher=remote)
        _check_hooks(cfg, trial)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
        logging.disable(logging.NOTSET)
    return f'{_report(plan, trial)}\n\n{out}: written. Next: python tools/train.py {out}'


def make_plan(student: Network, teacher: Network, method: str, teacher_ckpt: str, out: Path, base: str | None,
              layers: Sequence[str], trust_checkpoint: bool) -> Plan:
    """Decides what :func:`compose` writes.

    Raises:
        ValueError: the student cannot be trained so, or no layers match.
    """
    lacking = [name for name in ('train_dataloader', 'train_cfg', 'optim_wrapper') if not student.cfg.get(name)]
    if lacking:
        raise ValueError(f'STUDENT: {student.name!r} cannot be trained, it has no {", ".join(lacking)}')
    length = {key: value for key, value in student.cfg.train_cfg.items() if key in ('max_epochs', 'max_iters')}
    if not length:
        raise ValueError(f'STUDENT: train_cfg of {student.name!r} has neither max_epochs nor max_iters')
    if method == 'sokd' and not base:
        base = 'fitnet' if student.is_detector else 'reviewkd'
    same, remarks, logits, task_loss = same_classes(student, teacher), [], None, None
    if not same:
        remarks.append(f'The teacher tells other classes apart ({_classes(teacher)}) than the student '
                       f'({_classes(student)}): only features are distilled, and no head is inherited.')
    elif method == 'amd' and not student.is_detector:
        unread = [network.name for network in (student, teacher) if not network.logits()]
        if unread:
            remarks.append('The logits are not distilled: not exactly one layer of the head feeds a softmax over the '
                           f'classes in {" and ".join(unread)}.')
        else:
            logits = student.logits(), teacher.logits()
            task_loss = None if 'loss' in student.cfg.model.head else type(student.model.head.loss_module).__name__
    if layers:
        pairs = [tuple(layer.split('=')) if '=' in layer else (layer, layer) for layer in layers]
    else:
        # AMD reads three stages; of SoKD's bases on classifiers FitNet the third of four, the others all four.
        stages = slice(-3, None) if student.is_detector or method == 'amd' else (
            slice(-2, -1) if base == 'fitnet' else slice(-4, None))
        pairs = propose_layers(student, teacher, stages, one_width=method == 'sokd')
    return Plan(
        method=method, base=base,
        student=student.name if '::' in student.name else Path(os.path.relpath(student.name, out.parent)).as_posix(),
        teacher=teacher.name, teacher_ckpt=teacher_ckpt, trust_checkpoint=trust_checkpoint, layers=pairs,
        strides=[stride(size[0]) for pair in pairs for size in student.sizes(pair[0])],
        inherit=propose_inherit(student, teacher) if student.is_detector else [],
        logits=logits, task_loss=task_loss, detector=student.is_detector,
        length=length, hooks=bool(student.cfg.get('custom_hooks')), remarks=remarks,
        constructor=student.cfg.optim_wrapper.get('constructor'))


def _classes(network: Network) -> str:
    return ', '.join(map(str, network.classes)) or 'unknown'


def _read(unfinished: Path, student: str) -> Config:
    try:
        return Config.fromfile(unfinished)
    except RuntimeError as error:  # a config in MMEngine's pure Python style
        raise ValueError(f'STUDENT: {student!r} cannot be inherited: {error}') from error


def _check_hooks(cfg: Config, trial: Trial) -> None:
    """Raises ``ValueError`` for a hook that reaches for a part of the plain model, which is now in ``.student``."""
    for hook in cfg.get('custom_hooks', []):
        with HOOKS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
            kind = registry.get(hook['type'])
        names = set(re.findall(r'\bmodel\.(\w+)', inspect.getsource(kind))) if kind else ()
        for name in names:
            if hasattr(trial.model.student, name) and not hasattr(trial.model, name):
                raise ValueError(f'STUDENT: custom_hooks: {hook["type"]} uses {name!r} of the model, which a '
                                 'distillation has in model.student: training would stop there. Use a student '
                                 'without this hook')


def _report(plan: Plan, trial: Trial) -> str:
    model = trial.model
    rows = [('loss', 'student', 'teacher', 'stride', 'channels', 'in one step')]
    for name, loss in trial.losses.items():
        reading = trial.readings.get(name)
        if reading is None:
            rows.append((name, '', '', '', '', f'{loss:.3g}'))
            continue
        s, t = reading.s_output, reading.t_output
        rows.append((name, reading.student, reading.teacher, str(stride(s.shape[2], trial.image)) if s.dim() == 4
                     else '', f'{s.shape[1]}, {t.shape[1]}', f'{loss:.3g}'))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [f'student: {plan.student} ({type(model.student).__name__})',
             f'teacher: {plan.teacher} ({type(model.teacher).__name__})', '',
             *('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows), '']
    for name in plan.inherit:
        s_layers, t_layers = (layers_of(network.get_submodule(name)) for network in (model.student, model.teacher))
        lines.append(f'inherit: {len(s_layers.items() & t_layers.items())} of {len(s_layers)} layers of {name}')
    if model.__dict__['_teacher_inputs']:
        lines.append('The teacher expects another normalisation or channel order, and gets its images in that form.')
    lines += plan.remarks
    if '://' in plan.teacher_ckpt:
        lines.append(f'The step had a random teacher: {plan.teacher_ckpt} is fetched when training starts.')
    return '\n'.join(lines).rstrip()
