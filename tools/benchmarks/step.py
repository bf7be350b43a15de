"""Cost of a distillation training step relative to the student's own step.

The lower bound is the student's own step and the forward pass of the teacher's backbone and neck, both in the student's
precision. All variants get the same synthetic batch and run whole steps: preprocessing, forward, losses, backward,
optimizer. Weights are random, and the learning rate is that of the first warm-up step. The variants run in turn, in
rounds. The results are ratios within a round.
"""
import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from benchmarking import (
    CLOCK,
    CLOCKS,
    PEAK_MEMORY,
    command,
    interleave,
    peak_memory,
    ratio,
)
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import Tensor, nn

import mmkd_plugin  # noqa: F401  makes MMRazor importable
from mmkd_plugin.config.cfg_path import read_cfg_path
from mmkd_plugin.deploy.environment import environment, markdown
from mmkd_plugin.engine.hooks.compile_student_hook import compile_student

ROOT = Path(__file__).parents[2]
OURS = {
    'amd': 'AMD with its config',
    'amd_float32': 'AMD with the teacher in float32',
    'amd_amp': 'AMD with --amp: float16 on a GPU, bfloat16 on a CPU',
    'amd_compiled': 'AMD with CompileStudentHook',
    'sokd_search': 'SoKD, during the search',
    'sokd_frozen': 'SoKD, after the search',
    'sokd_base': 'the base of SoKD alone',
}
RAZORS = {
    'cwd': 'MMRazor\'s CWD, FpnTeacherDistill',
    'cwd_single': 'MMRazor\'s CWD, SingleTeacherDistill',
    'pkd': 'MMRazor\'s PKD on the first 4 maps',
    'mgd': 'MMRazor\'s MGD',
    'fbkd': 'MMRazor\'s FBKD on the first 4 maps',
}
REFERENCES = {  # variants to compare with, and their names in tables
    'student': 'the student\'s own step',
    'lower_bound': 'the lower bound',
}
VARIANTS = {'student': 'the student\'s own step',
            'lower_bound': 'the student\'s own step, and the teacher up to its neck', **OURS, **RAZORS}
FBKD_LEVELS = [dict(reduction=4, maxpool_stride=8), dict(reduction=4, maxpool_stride=4), {}, {}]  # of MMRazor's config
SETTINGS = {'size': VARIANTS, 'layers': OURS, 'sub_policies': ('sokd_search', 'sokd_frozen'),
            'areas': ('sokd_search', 'sokd_frozen')}  # the variants that each option changes
LABELS = dict(size='side of the images (pixels)', layers='maps', sub_policies='sub-policies', areas='P')
MEMORY_STEPS = 3  # SoKD's steps differ by their draws; the largest peak counts
BOXES = 7  # per image, as in COCO


class Goal(NamedTuple):
    variant: str
    below: str
    time: float  # limit of the interval's upper end
    memory: float | None  # limit of the ratio of peaks


GOALS = [Goal('amd', 'lower_bound', 1.03, 1.05), Goal('sokd_search', 'lower_bound', 1.15, 1.20),
         Goal('sokd_frozen', 'lower_bound', 1.15, 1.20), Goal('sokd_search', 'sokd_frozen', 1.02, None)]


@dataclass(frozen=True)
class Pair:
    """A teacher and a student, and the maps for MMRazor's methods and ``--layers``, largest first."""
    title: str
    configs: dict[str, str]  # by the prefix of the variants
    base: str
    maps: dict[str, int]  # channels by module
    size: tuple[int, int]
    batch: int


RESNET = Pair('ResNet34 to ResNet18',
              dict(amd='configs/amd_resnet_imagenet.py', sokd='configs/sokd_resnet_imagenet.py'),
              'configs/_base_/pairs/resnet34_resnet18_8xb32_in1k.py',
              {'backbone.layer2': 128, 'backbone.layer3': 256, 'backbone.layer4': 512}, (224, 224), 16)
PAIRS = {
    'retinanet': Pair('RetinaNet R101 to R50',
                      dict(amd='configs/amd_retinanet_coco.py', sokd='configs/sokd_retinanet_coco.py'),
                      'configs/_base_/pairs/retinanet_r101_retinanet_r50_1x_coco.py',
                      {f'neck.fpn_convs.{i}': 256 for i in range(5)}, (384, 384), 2),
    'resnet': RESNET,
    'resnet-fitnet': replace(RESNET, title='ResNet34 to ResNet18, SoKD on FitNet', configs=dict(
        RESNET.configs, sokd='configs/sokd/imagenet/sokd-fitnet_backbone_resnet34_resnet18_8xb32_in1k.py')),
}


class Settings(NamedTuple):
    """Settings of a variant; None means the value in its config."""
    size: tuple[int, int]
    layers: int | None
    sub_policies: int | None
    areas: int | None


class Variant(NamedTuple):
    name: str
    settings: Settings
    step: Callable[[], dict[str, Tensor]]
    held: int  # bytes of weights, buffers and optimizer, with the teacher's


class LowerBound(BaseModel):
    """The student's own step, and the teacher's backbone and neck without gradients."""

    def __init__(self, student: BaseModel, teacher: BaseModel) -> None:
        super().__init__(student.data_preprocessor)
        self.student = student
        self.__dict__['teacher'] = teacher  # not a submodule

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'loss') -> dict[str, Tensor]:
        with torch.no_grad():
            self.teacher.extract_feat(inputs)
        return self.student(inputs, data_samples, mode=mode)


class Workshop:
    """Builds the variants of one pair on the CPU, as the Runner does, then moves them to the device."""

    def __init__(self, pair: Pair, batch: int, device: str) -> None:
        self.pair, self.batch, self.device = pair, batch, device
        self.base = Config.fromfile(ROOT / pair.base)
        init_default_scope(self.base.default_scope)
        self.teacher = _random(read_cfg_path(self.base.model.teacher.cfg_path).model).eval().requires_grad_(False)
        self.data: dict[tuple[int, int], dict] = {}
        torch.zeros(8, 8, device=device) @ torch.zeros(8, 8, device=device)  # allocates the workspaces of libraries

    def variant(self, name: str, settings: Settings) -> Variant:
        torch.manual_seed(0)
        config = self._config(name, settings)
        architecture = config.model.architecture
        if 'data_preprocessor' in config:  # the Runner passes it on
            architecture.setdefault('data_preprocessor', config.data_preprocessor)
        allocated = _allocated(self.device)
        student = _random(architecture)
        teacher = None if name == 'student' else copy.deepcopy(self.teacher)  # recorders add hooks to it
        if name == 'student':
            model = student
        elif name == 'lower_bound':
            model = LowerBound(student, teacher)
        elif name in OURS:
            model = MODELS.build(dict(config.model, architecture=student, teacher=teacher, teacher_ckpt=None))
        else:
            model = self._razor(name, student, teacher)
        if model is not student:
            model.init_weights()
            teacher.to(self.device)
        model.to(self.device).train()
        if name == 'sokd_frozen':
            model.distiller.dafa.freeze()
        config.optim_wrapper.optimizer.lr *= 1e-3
        if name == 'amd_amp':
            on_cpu = self.device == 'cpu'
            config.optim_wrapper.type = 'mmkd_plugin.AutocastOptimWrapper' if on_cpu else 'AmpOptimWrapper'
        elif name == 'amd_compiled':
            compile_student(model)
        optim_wrapper = build_optim_wrapper(model, config.optim_wrapper)
        data = self._data(settings.size)
        step = _step(name, model, optim_wrapper, data)
        try:
            step()  # creates the state of the optimizer
        except RuntimeError as error:  # MMRazor's FBKD pools small maps to nothing
            raise ValueError(f'{name} cannot take a step on images of {settings.size}: {error}') from error
        held = _allocated(self.device) - allocated or _held([model, *([teacher] if teacher else [])], optim_wrapper)
        return Variant(name, settings, step, held)

    def _config(self, name: str, settings: Settings) -> Config:
        if name not in OURS:
            return copy.deepcopy(self.base)
        config = Config.fromfile(ROOT / self.pair.configs[name.split('_')[0]])
        distiller = config.model.distiller
        if settings.layers:
            distiller.layers = list(self.pair.maps)[:settings.layers]
        if name == 'amd_float32':
            config.model.teacher_precision = 'float32'
        if name == 'sokd_base':
            distiller.type = 'mmkd_plugin.FeatureDistiller'
            distiller.pop('dafa', None), distiller.pop('dam', None)
            config.optim_wrapper.pop('constructor'), config.optim_wrapper.pop('policy', None)
        elif name.startswith('sokd'):
            if settings.sub_policies:
                distiller.dafa = dict(distiller.get('dafa', {}), num_sub_policies=settings.sub_policies)
            if settings.areas:
                distiller.dam = dict(distiller.get('dam', {}), num_areas=settings.areas)
        return config

    def _razor(self, name: str, student: BaseModel, teacher: BaseModel) -> BaseModel:
        kind = 'SingleTeacherDistill' if name == 'cwd_single' else 'FpnTeacherDistill'
        distiller = razor_distiller(name.removesuffix('_single'), self.pair.maps)
        with DefaultScope.overwrite_default_scope('mmrazor'):
            return MODELS.build(dict(type=kind, architecture=student, teacher=teacher, distiller=distiller))

    def _data(self, size: tuple[int, int]) -> dict:
        if size not in self.data:
            torch.manual_seed(0)
            make = _detection_batch if self.base.default_scope == 'mmdet' else _classification_batch
            self.data[size] = make(self.batch, size)
        return self.data[size]


def razor_distiller(method: str, maps: dict[str, int]) -> dict:
    """Returns the distiller of one of MMRazor's methods, with the settings of MMRazor's config.

    Args:
        method: cwd, pkd, mgd or fbkd.
        maps: channels of student and teacher by module, largest map first.
    """
    if method in ('pkd', 'fbkd'):
        maps = dict(list(maps.items())[:4])
    recorders = {source: dict(type='ModuleOutputs', source=source) for source in maps}
    connectors, losses, mappings = {}, {}, {}
    for i, (source, channels) in enumerate(maps.items()):
        student, teacher = (dict(recorder=source, from_student=side) for side in (True, False))
        if method == 'mgd':
            connectors[f's{i}'] = dict(type='MGDConnector', student_channels=channels, teacher_channels=channels)
            student['connector'] = f's{i}'
        if method == 'fbkd':
            for side, record in (('Student', student), ('Teacher', teacher)):
                record['connector'] = f'{side[0].lower()}{i}'
                connectors[record['connector']] = dict(type=f'FBKD{side}Connector', in_channels=channels,
                                                       mode='dot_product', sub_sample=True, **FBKD_LEVELS[i])
        losses[f'loss_{i}'] = dict(cwd=dict(type='ChannelWiseDivergence', loss_weight=10),
                                   pkd=dict(type='PKDLoss', loss_weight=10), mgd=dict(type='MGDLoss'),
                                   fbkd=dict(type='FBKDLoss'))[method]
        mappings[f'loss_{i}'] = (dict(s_input=student, t_input=teacher) if method == 'fbkd' else
                                 dict(preds_S=student, preds_T=teacher))
    return dict(type='ConfigurableDistiller', student_recorders=recorders, teacher_recorders=copy.deepcopy(recorders),
                connectors=connectors, distill_losses=losses, loss_forward_mappings=mappings)


def _random(config: dict) -> BaseModel:
    """Builds a model without downloading weights."""
    config = copy.deepcopy(config)
    config.backbone.init_cfg = None
    model = MODELS.build(config)
    model.init_weights()
    return model


def _step(name: str, model: BaseModel, optim_wrapper: OptimWrapper, data: dict) -> Callable[[], dict[str, Tensor]]:
    def step() -> dict[str, Tensor]:
        log = model.train_step(data, optim_wrapper)
        if not log['loss'].isfinite():
            raise RuntimeError(f'{name}: the loss is {log["loss"]}, which can change the time of a step')
        return log
    return step


def _allocated(device: str) -> int:
    """Returns the bytes of all tensors on a GPU, and 0 on a CPU, which has no counter."""
    return torch.cuda.memory_allocated(device) if torch.device(device).type == 'cuda' else 0


def _held(modules: list[nn.Module], optim_wrapper: OptimWrapper | OptimWrapperDict | None = None) -> int:
    wrappers = (optim_wrapper.optim_wrappers.values() if isinstance(optim_wrapper, OptimWrapperDict) else
                [optim_wrapper] if optim_wrapper else [])
    state = chain.from_iterable(values.values() for wrapper in wrappers
                                for values in wrapper.optimizer.state.values())
    tensors = chain(*(chain(module.parameters(), module.buffers()) for module in modules),
                    (value for value in state if torch.is_tensor(value)))
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _detection_batch(batch: int, size: tuple[int, int]) -> dict:
    from mmdet.testing import demo_mm_inputs
    return demo_mm_inputs(batch, image_shapes=[(3, *size)] * batch, num_items=[BOXES] * batch, num_classes=80,
                          use_box_type=True)


def _classification_batch(batch: int, size: tuple[int, int]) -> dict:
    from mmpretrain.structures import DataSample
    return dict(inputs=torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8),
                data_samples=[DataSample().set_gt_label(i) for i in range(batch)])


def parse_args() -> argparse.Namespace:
    variants = '; '.join(f'{name}: {text}' for name, text in VARIANTS.items())
    parser = argparse.ArgumentParser(
        description=f'{__doc__} {PEAK_MEMORY} Weights, buffers and optimizer of student, distiller and teacher are '
                    'added.', epilog=f'Variants: {variants}.')
    parser.add_argument('--pair', choices=PAIRS, default='retinanet',
                        help='R101 to R50, or ResNet34 to ResNet18 with SoKD on ReviewKD or on FitNet')
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS),
                        help='variants to measure besides the student\'s own step and the lower bound; default: all')
    parser.add_argument('--rounds', type=int, default=15,
                        help='number of rounds; each runs every variant once; default %(default)s')
    parser.add_argument('--size', nargs='+', type=image_size, metavar='HxW',
                        help='size of the images, such as 800x1333; default 384x384 for retinanet, 224x224 otherwise')
    parser.add_argument('--batch', type=int, help='images per step; default 2 for retinanet, 16 otherwise')
    parser.add_argument('--layers', nargs='+', type=int,
                        help='number of maps for AMD and SoKD, the largest first; default: those of the configs')
    parser.add_argument('--sub-policies', nargs='+', type=int, help='sub-policies of SoKD; default 36, all')
    parser.add_argument('--areas', nargs='+', type=int, help='areas of SoKD, P; default 8')
    parser.add_argument('--device', default='cpu', help='cpu or cuda; default %(default)s')
    parser.add_argument('--clock', choices=CLOCKS, default='wall', help=CLOCK)
    parser.add_argument('--out', type=Path, help='JSON file for all times')
    parser.add_argument('--plot', type=Path, help='file for a plot of the cost against the option with several values')
    args = parser.parse_args()
    args.pair = PAIRS[args.pair]
    args.batch = args.batch or args.pair.batch
    args.size = args.size or [args.pair.size]
    several = [option for option in SETTINGS if len(getattr(args, option) or []) > 1]
    if len(several) > 1:
        parser.error(f'--{several[0]} and --{several[1]} have several values. Vary one of them at a time')
    if args.plot and not several:
        parser.error('--plot needs several values of one of --size, --layers, --sub-policies, --areas')
    if max(args.layers or [1]) > len(args.pair.maps):
        parser.error(f'--layers: at most {len(args.pair.maps)} for this pair, got {max(args.layers)}')
    args.varied = several[0] if several else None
    return args


def image_size(text: str) -> tuple[int, int]:
    """Parses the height and width of images."""
    try:
        height, width = map(int, text.split('x'))
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected HxW such as 800x1333, got {text!r}') from None
    if min(height, width) < 32:
        raise argparse.ArgumentTypeError(f'expected at least 32x32, got {text!r}')
    return height, width


def wanted(args: argparse.Namespace) -> Iterator[tuple[str, Settings]]:
    """Returns what to measure: every variant once, or once per value if the varied option changes it."""
    values = [getattr(args, option) or [None] for option in SETTINGS]
    plain = Settings(*(value[0] for value in values))
    for name in VARIANTS:
        if name in args.variants or name in REFERENCES:
            varied = getattr(args, args.varied) if args.varied and name in SETTINGS[args.varied] else [None]
            for value in varied:
                yield name, plain if value is None else plain._replace(**{args.varied: value})


def compare(variants: list[Variant], seconds: dict[int, list[float]],
            peaks: list[int]) -> tuple[list[dict], list[dict]]:
    """Returns the results of every variant, and of every goal whose two variants were measured."""
    references = {(variant.name, variant.settings.size): i for i, variant in enumerate(variants)
                  if variant.name in REFERENCES}
    figures, verdicts = [], []
    for i, variant in enumerate(variants):
        figure = dict(variant=variant.name, settings=variant.settings._asdict(), median=statistics.median(seconds[i]),
                      peak_bytes=peaks[i], seconds=seconds[i])
        for name in REFERENCES:
            below = references[name, variant.settings.size]
            figure[f'to_{name}'] = ratio(seconds[i], seconds[below])
            figure[f'memory_to_{name}'] = peaks[i] / peaks[below]
        figures.append(figure)
    for goal in GOALS:
        for i, variant in enumerate(variants):
            below = [j for j, other in enumerate(variants) if other.name == goal.below and (
                other.settings == variant.settings
                or goal.below in REFERENCES and other.settings.size == variant.settings.size)]
            if variant.name == goal.variant and below:
                time, memory = ratio(seconds[i], seconds[below[0]]), peaks[i] / peaks[below[0]]
                verdicts.append(dict(goal._asdict(), settings=variant.settings._asdict(), measured=time,
                                     time_reached=time['high'] <= goal.time, measured_memory=memory,
                                     memory_reached=goal.memory is None or memory <= goal.memory))
    return figures, verdicts


def report(figures: list[dict], verdicts: list[dict], varied: str | None) -> str:
    def at(result: dict) -> str:
        value = result['settings'].get(varied)
        return '' if value is None else 'x'.join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)

    def interval(r: dict) -> str:
        return f'{r["ratio"]:.3f} ({r["low"]:.3f} to {r["high"]:.3f})'

    extra = [varied.replace('_', '-')] if varied else []
    references = compared_with(figures)
    header = ['variant', *extra, 'ms', *(f'time to {REFERENCES[name]}' for name in references), 'peak (MiB)',
              *(f'memory to {REFERENCES[name]}' for name in references)]
    rows = [[f['variant'], *([at(f)] if varied else []), f'{1e3 * f["median"]:.0f}',
             *(interval(f[f'to_{name}']) for name in references), f'{f["peak_bytes"] / 2**20:.0f}',
             *(f'{f[f"memory_to_{name}"]:.3f}' for name in references)] for f in figures]
    table = markdown(header, rows)
    rows = [[v['variant'], REFERENCES.get(v['below'], v['below']), *([at(v)] if varied else []),
             interval(v['measured']), f'{v["time"]:.2f}', 'reached' if v['time_reached'] else 'MISSED',
             *([f'{v["measured_memory"]:.3f}', f'{v["memory"]:.2f}', 'reached' if v['memory_reached'] else 'MISSED']
               if v['memory'] else ['', '', ''])] for v in verdicts]
    goals = markdown(['variant', 'to', *extra, 'time', 'at most', '', 'memory', 'at most', ''], rows)
    return f'{table}\n\nGoals, by the upper end of the interval:\n\n{goals}' if rows else table


def compared_with(figures: list[dict]) -> list[str]:
    """Returns the names of the references in all results; older results have the lower bound only."""
    return [name for name in REFERENCES if all(f'to_{name}' in figure for figure in figures)]


def draw(figures: list[dict], varied: str, path: Path) -> None:
    """Draws time and memory against the varied option, one line per variant, relative to the first reference."""
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    below = compared_with(figures)[0]
    names = [name for name in SETTINGS[varied]
             if name not in REFERENCES and any(f['variant'] == name for f in figures)]
    for name in names:
        mine = [f for f in figures if f['variant'] == name]
        values = [f['settings'][varied] for f in mine]
        if varied == 'size':
            values = [(height * width)**0.5 for height, width in values]
        ratios = [f[f'to_{below}'] for f in mine]
        line, = axes[0].plot(values, [r['ratio'] for r in ratios], 'o-', label=name)
        axes[0].fill_between(values, [r['low'] for r in ratios], [r['high'] for r in ratios],
                             color=line.get_color(), alpha=0.2)
        axes[1].plot(values, [f[f'memory_to_{below}'] for f in mine], 'o-', label=name)
    for axis, label in zip(axes, ('time', 'peak memory')):
        axis.set(xlabel=LABELS[varied], ylabel=f'{label} to {REFERENCES[below]}')
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse_args()
    MMLogger.get_current_instance().setLevel('ERROR')  # do not log the initialisation of weights
    workshop = Workshop(args.pair, args.batch, args.device)
    try:
        variants = [workshop.variant(*each) for each in wanted(args)]
    except ValueError as error:
        sys.exit(f'step: {error}')
    seconds = interleave({i: each.step for i, each in enumerate(variants)}, args.rounds, args.device, args.clock)
    peaks = [each.held + max(peak_memory(each.step, args.device) for _ in range(MEMORY_STEPS)) for each in variants]
    figures, verdicts = compare(variants, seconds, peaks)
    where = environment(args.device)
    print(f'{args.batch} images per step, {args.rounds} rounds; {args.clock} clock, median and 95% interval; '
          f'{", ".join(f"{key} {value}" for key, value in where.items())}\n')
    print(report(figures, verdicts, args.varied))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        found = dict(title=args.pair.title, command=command(), environment=where, batch=args.batch, clock=args.clock,
                     rounds=args.rounds, varied=args.varied, teacher_bytes=_held([workshop.teacher]),
                     variants=figures, goals=verdicts)
        args.out.write_text(json.dumps(found, indent=1))
    if args.plot:
        draw(figures, args.varied, args.plot)


if __name__ == '__main__':
    main()
