"""Composing, trying and writing the config of a distillation."""
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from ..checkpoints.guard import data_only
from ..models.distillers.presets import PRESETS
from ..models.tokens import to_map
from ..utils import in_words
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
        teacher_ckpt: file or URL of the teacher's weights. A URL is not
            downloaded here: the step uses a teacher with random weights.
        out: the file to write, in an existing directory. It is written completely or not at all.
        base: base of the methods sokd and feature, one of ``BASES``; by default reviewkd for classifiers, and for
            detectors pkd if the channels are equal, else fitnet.
        layers: modules, ``NAME`` or ``STUDENT=TEACHER``; by default those whose strides match.
        overwrite: whether to replace ``out`` if it exists.
        trust_checkpoint: as in :class:`.TeacherStudentDistill`; it is written to the config.

    Returns:
        A report of the layers, losses and inherited modules, as text to print.

    Raises:
        ValueError: an argument is wrong, no layers match, or the step fails.
    """
    path = Path(out)
    if path.exists() and not overwrite:
        raise ValueError(f'out: {out!r} exists; choose another name, or overwrite it with --overwrite')
    for field, given in (('STUDENT', student), ('TEACHER', teacher)):
        if '::' not in given and path.resolve() == Path(given).resolve():
            raise ValueError(f'out: {out!r} is the {field}. Choose another name')
    if path.suffix != '.py' or not path.parent.is_dir():
        raise ValueError(f'out: expected a .py file in an existing directory, got {out!r}')
    if base and method == 'amd':
        raise ValueError(f'base: method amd has no base, got {base!r}. Use --method sokd or --method feature')
    remote = '://' in teacher_ckpt
    if not remote and not Path(teacher_ckpt).is_file():
        raise ValueError(f'teacher_ckpt: no file {teacher_ckpt!r} in {Path.cwd()}')
    unfinished = path.with_name(f'{path.stem}.{os.getpid()}.unfinished.py')
    logging.disable(logging.WARNING)  # initialisation, and messages that training repeats
    try:
        with data_only(trust_checkpoint, download=False):
            s_network = Network(student, 'STUDENT')
            t_network = Network(teacher, 'TEACHER', s_network)
            plan = make_plan(s_network, t_network, method, teacher_ckpt, path, base, layers, trust_checkpoint)
            unfinished.write_text(config_text(plan))
            cfg = _read(unfinished, student)
            trial = try_one_step(cfg, s_network, t_network, random_teacher=remote)
        os.replace(unfinished, path)
    except ValueError:
        raise
    except Exception as error:  # the user gets one sentence; __cause__ is the original error
        raise ValueError(f'{student!r} and {teacher!r} cannot be composed: {in_words(error)}') from error
    finally:
        unfinished.unlink(missing_ok=True)
        logging.disable(logging.NOTSET)
    return f'{_report(plan, trial, s_network.image)}\n\n{out}: written. Next: python tools/train.py {out}'


def make_plan(student: Network, teacher: Network, method: str, teacher_ckpt: str, out: Path, base: str | None,
              layers: Sequence[str], trust_checkpoint: bool) -> Plan:
    """Returns the plan of the config that :func:`compose` writes.

    Raises:
        ValueError: the student's config lacks a field that training needs, or no layers match.
    """
    lacking = [name for name in ('train_dataloader', 'train_cfg', 'optim_wrapper') if not student.cfg.get(name)]
    if lacking:
        raise ValueError(f'STUDENT: {student.name!r} cannot be trained, it has no {", ".join(lacking)}')
    length = {key: value for key, value in student.cfg.train_cfg.items() if key in ('max_epochs', 'max_iters')}
    if not length:
        raise ValueError(f'STUDENT: train_cfg of {student.name!r} has neither max_epochs nor max_iters')
    same, remarks, logits, task_loss = same_classes(student, teacher), [], None, None
    if not same:
        remarks.append(f'The teacher has other classes ({_classes(teacher)}) than the student ({_classes(student)}). '
                       'Only features are distilled, and no head is inherited.')
    elif method == 'amd' and not student.is_detector:
        logits = student.logits(), teacher.logits()
        if None in logits:
            unread = [network.name for network, layer in zip((student, teacher), logits) if layer is None]
            remarks.append('The logits are not distilled, because no layer of the head outputs the logits of a softmax '
                           f'cross-entropy in {" and ".join(unread)}.')
            logits = None
        else:
            task_loss = None if 'loss' in student.cfg.model.head else type(student.model.head.loss_module).__name__
    if layers:
        pairs = [tuple(layer.split('=')) if '=' in layer else (layer, layer) for layer in layers]
    else:
        # FitNet uses the third of four stages, AMD the last three, the others all four.
        stages = dict(fitnet=slice(-2, -1)).get(base, slice(-3 if method == 'amd' or student.is_detector else -4, None))
        pairs = propose_layers(student, teacher, stages, one_width=method == 'sokd' or base == 'fitnet')
    given, base = base, _base_for(base, student, teacher, pairs) if method != 'amd' else None
    if base == 'fitnet' and not (given or layers):  # its connector needs one width per layer
        pairs = propose_layers(student, teacher, stages, one_width=True)
    remarks += _of_layers(student, teacher, pairs)
    own_run = tuple(name for name in ('work_dir', 'resume', 'load_from') if student.cfg.get(name)
                    and (name != 'load_from' or student.cfg.get('resume')))
    starts_from = student.cfg.get('load_from') if not student.cfg.get('resume') else None
    inherit = propose_inherit(student, teacher) if student.is_detector and not starts_from else []
    if starts_from:
        remarks.append(f'The student starts from its load_from, {starts_from!r}, so it inherits nothing.')
    resized = {pair[0] for pair in pairs if _strides(student, pair[0]) != _strides(teacher, pair[1])}
    return Plan(
        method=method, base=base,
        student=_from_folder(student.name, out.parent),
        teacher=teacher.name, teacher_ckpt=teacher_ckpt, trust_checkpoint=trust_checkpoint,
        layers=[pair[0] if pair[0] == pair[1] and pair[0] not in resized else pair for pair in pairs],
        strides=[each for pair in pairs for each in _strides(student, pair[0])],
        inherit=inherit,
        logits=logits, task_loss=task_loss, detector=student.is_detector,
        length=length, hooks=bool(student.cfg.get('custom_hooks')), remarks=remarks,
        constructor=student.cfg.optim_wrapper.get('constructor'), own_run=own_run)


def _from_folder(config: str, folder: Path) -> str:
    """Returns the path of a config as seen from a folder, absolute if a link in the folder leads elsewhere."""
    if '::' in config:
        return config
    relative = Path(os.path.relpath(config, folder))
    return (relative if (folder / relative).exists() else Path(config).resolve()).as_posix()


def _base_for(base: str | None, student: Network, teacher: Network, pairs: Sequence[tuple[str, ...]]) -> str:
    """Returns the base, by default one that fits the student's task and the channels.

    Raises:
        ValueError: ``base`` needs equal channels, and they differ.
    """
    s_widths, t_widths = ([sorted(network.widths(name)) for name in names]
                          for network, names in zip((student, teacher), zip(*pairs)))
    if base is None:
        return 'reviewkd' if not student.is_detector else 'pkd' if s_widths == t_widths else 'fitnet'
    if PRESETS.get(base, {}).get('same_channels') and s_widths != t_widths:
        raise ValueError(f'base: {base!r} compares channel with channel, but the maps of {_listed(dict(pairs))} have '
                         f'{_listed(s_widths)} channels in the student and {_listed(t_widths)} in the teacher. Use '
                         '--base fitnet')
    return base


def _classes(network: Network) -> str:
    return ', '.join(map(str, network.classes)) or 'unknown'


def _of_layers(student: Network, teacher: Network, pairs: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns remarks for the user on the layers that are compared."""
    remarks = []
    for pair in pairs:
        strides = [_strides(network, name) for network, name in zip((student, teacher), pair)]
        if all(strides) and strides[0] != strides[1]:
            remarks.append(f'The maps of {pair[0]!r} (stride {_listed(strides[0])}) and of the teacher\'s {pair[1]!r} '
                           f'(stride {_listed(strides[1])}) differ in size, so one of them is interpolated.')
    for network, names in zip((student, teacher), zip(*pairs)):
        flat = sorted({name for name in names if name in network.layers and network.layers[name].flat})
        if flat:
            remarks.append(f'With random weights, the maps of {_listed(flat)} in {network.name} have the same energy '
                           'at every position, as after a layer normalisation. AMD and AT compare energies and find '
                           'little there. Choose layers before the normalisation with --layers, or use --method sokd.')
    return remarks


def _strides(network: Network, name: str) -> list[int | float]:
    return [stride(size[0], network.image) for size in network.sizes(name)]


def _listed(values: Sequence) -> str:
    return ', '.join(map(str, values))


def _read(unfinished: Path, student: str) -> Config:
    try:
        return Config.fromfile(unfinished)
    except RuntimeError as error:  # a config in MMEngine's pure Python style
        raise ValueError(f'STUDENT: {student!r} cannot be inherited: {error}') from error


def _report(plan: Plan, trial: Trial, image: int) -> str:
    model = trial.model
    rows = [('loss', 'student', 'teacher', 'stride', 'channels', 'in one step')]
    for name, loss in trial.losses.items():
        reading = trial.readings.get(name)
        if reading is None:
            rows.append((name, '', '', '', '', f'{loss:.3g}'))
            continue
        s, t = reading.s_output, reading.t_output
        channels = ', '.join(str(x.shape[2 if x.dim() == 3 else 1]) for x in (s, t))
        size = (to_map(s, (image, image)) if s.dim() == 3 else s).shape[2:]
        rows.append((name, reading.student, reading.teacher, str(stride(size[0], image)) if size else '', channels,
                     f'{loss:.3g}'))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [f'student: {plan.student} ({type(model.student).__name__})',
             f'teacher: {plan.teacher} ({type(model.teacher).__name__})', '',
             *('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows), '']
    for name in plan.inherit:
        s_layers, t_layers = (layers_of(network.get_submodule(name)) for network in (model.student, model.teacher))
        lines.append(f'inherit: {len(s_layers.items() & t_layers.items())} of {len(s_layers)} layers of {name}')
    if model.teachers[''].inputs:
        lines.append('The teacher expects another normalisation or channel order and gets its images in that form.')
    lines += plan.remarks
    if '://' in plan.teacher_ckpt:
        lines.append(f'The step used a teacher with random weights. {plan.teacher_ckpt} is downloaded when training '
                     'starts.')
    return '\n'.join(lines).rstrip()
