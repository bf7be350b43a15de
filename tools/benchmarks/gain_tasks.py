"""Tasks and experiments of the benchmark of accuracy."""
from collections.abc import Callable
from dataclasses import dataclass

TUNING_SEEDS = (100, )
CLAIM, OTHER = 10, 3  # seeds of an experiment that supports a claim, and of the others
Weights = tuple[float, ...]

BCCD = {'bccd': 'python tools/dataset_converters/bccd.py FOLDER'}
CIFAR10 = {'cifar10': 'python tools/dataset_converters/cifar10.py FOLDER'}
MOBILENET = {'mobilenet_v2.pth': 'python tools/model_converters/mobilenet_v2.py FILE'}


@dataclass(frozen=True)
class Experiment:
    """One way to train the student.

    Tuning tries each entry of ``weights`` on the tuning split with the tuning seeds; an entry has all weights of the
    experiment. An experiment that differs from another one in a single change uses its best weights (``weights_of``).
    Before tuning, an experiment uses the first entry.
    """
    label: str
    config: str  # file in the task's folder, without .py
    base: str | None = None  # the experiment to compare with
    seeds: int = OTHER
    options: Callable[..., dict] = dict  # from the weights to --cfg-options
    weights: tuple[Weights, ...] = ()  # candidates
    weights_of: str | None = None  # the experiment whose best weights it uses


@dataclass(frozen=True)
class Task:
    """A data set, a teacher and the experiments with its student, in the order of the tables."""
    title: str
    data: dict[str, str]  # data that it needs, and the commands that create them
    folder: str  # folder of the configs
    teacher: str  # config of the teacher
    metric: str  # its name in MMEngine's log
    unit: str  # its name and unit in tables
    scale: float  # from the metric to percent
    experiments: dict[str, Experiment]
    headlines: tuple[str, ...] = ()  # experiments whose differences are at the top of the page


def feature(layers: list[str], *bases: str | dict) -> Callable[..., dict]:
    """Returns a function from the weights of these bases, one each, to the options of the distillation."""
    several = len(bases) > 1
    return lambda *weights: {'model.distiller': dict(
        type='mmkd_plugin.FeatureDistiller', layers=layers, base=list(bases) if several else bases[0],
        loss_weight=list(weights) if several else weights[0])}


def measured(layers: list[str], base: str) -> Callable[[], dict]:
    """Returns a function to the options of a base whose weight is measured in the first iterations."""
    return lambda: feature(layers, base)('auto')


def sokd(layers: list[str], base: str | dict, anchor: str, search_epochs: int, dafa: dict | None = None,
         areas: bool = True, **dam) -> Callable[..., dict]:
    """Returns a function from the weights of base and DAM to the options of SoKD. Without a DAM weight, DAM is off.

    Args:
        layers, base: as in the distiller.
        anchor: anchor of DAM.
        search_epochs: epochs of the policy search.
        dafa: arguments of DAFA; None switches it off.
        areas: whether DAM compares areas; its head is trained in both cases.
        dam: further arguments of DAM.
    """
    def options(weight: float, dam_weight: float | None = None) -> dict:
        found = {'model.distiller': dict(
            type='mmkd_plugin.SoKDDistiller', layers=layers, base=base, loss_weight=weight, dafa=dafa,
            dam=None if dam_weight is None else dict(  # the ratio of its defaults
                anchor=anchor, detect_loss_weight=dam_weight, area_loss_weight=3 * dam_weight * areas, **dam))}
        if dafa is not None:
            found['optim_wrapper.constructor'] = 'mmkd_plugin.PolicyOptimWrapperConstructor'
            found['optim_wrapper.policy'] = dict(type='Adam', lr=1e-2, betas=(0.5, 0.999))
            found['custom_hooks'] = [dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=search_epochs)]
        return found
    return options


def decaying(options: Callable[..., dict], epochs: int, of: int) -> Callable[..., dict]:
    """Adds a cosine decay to 0 of all distillation losses, over the last ``of`` - ``epochs`` epochs."""
    schedule = {'*': dict(type='cosine', end_factor=0.0, begin=epochs, end=of, by_epoch=True)}
    return lambda *weights: {**options(*weights), 'model.loss_schedules': schedule}


def grid(first: tuple[float, ...], second: tuple[float, ...]) -> tuple[Weights, ...]:
    """Returns all pairs of two weights."""
    return tuple((a, b) for a in first for b in second)


def one(*weights: float) -> tuple[Weights, ...]:
    """Returns a grid of one weight."""
    return tuple((weight, ) for weight in weights)


def bccd() -> Task:
    """Detection with few labels, and boxes much smaller than the map."""
    student, config = 'retinanet_r18-c16_bccd-60', 'inherit_retinanet_r18-c32_retinanet_r18-c16_bccd-60'
    neck, epochs = ['neck'], 60
    dam = (0.3, 0.1)  # candidates for DAM, combined with two of the base
    adapter = dict(preset='fitnet', connector=dict(
        type='mmkd_plugin.ConvAdapter', in_channels='s_channels', out_channels='t_channels', signed=True))

    def by(label: str, options: Callable[..., dict], weights: tuple[Weights, ...] = (), base: str = 'inherited',
           **kwargs) -> Experiment:
        return Experiment(label, config, base, options=options, weights=weights, **kwargs)

    def on(base: str, **kwargs) -> Callable[..., dict]:
        """SoKD on a base, with the search in the first quarter of the epochs."""
        return sokd(neck, base, 'boxes', epochs // 4, **{'dafa': {}, **kwargs})

    experiments = dict(
        student=Experiment('student alone', student),
        inherited=Experiment('inherited start', config, 'student'),
        fitnet=by('FitNet', feature(neck, 'fitnet'), one(2.0, 0.7, 6.0, 20.0), seeds=CLAIM),
        at=by('AT', feature(neck, 'at'), one(100.0, 30.0, 300.0, 1000.0)),
        pkd=by('PKD', feature(neck, 'pkd'), one(30.0, 10.0, 60.0, 120.0), seeds=CLAIM),
        cwd=by('CWD', feature(neck, 'cwd'), one(10.0, 3.0, 30.0, 100.0)),
        mgd=by('MGD', feature(neck, 'mgd'), one(3e-4, 1e-4, 1e-3, 3e-3)),
        reviewkd=by('ReviewKD', feature(neck, 'reviewkd'), one(10.0, 3.0, 30.0, 100.0)),
        crosskd=by('CrossKD', feature([], 'crosskd'), one(1.0, 0.3, 3.0, 10.0)),
        pkd_crosskd=by('PKD + CrossKD', feature(neck, 'pkd', 'crosskd'), grid((30.0, 60.0), (1.0, 0.3)), 'pkd',
                       seeds=CLAIM),
        amd_paper=by('AMD, paper form', feature(neck, 'amd'), one(10.0, 1.0, 100.0, 1000.0), 'at'),
        amd_global=by('AMD, scale-free', feature(neck, dict(
            preset='amd-scale-free', loss=dict(local_grid=1))), base='at', weights_of='amd'),
        amd=by('AMD, scale-free, global + local', feature(neck, 'amd-scale-free'), one(1.0, 0.3, 3.0, 10.0), 'at'),
        pkd_amd=by('PKD + AMD', feature(neck, 'pkd', 'amd-scale-free'), grid((30.0, 60.0), (1.0, 0.3)), 'pkd',
                   seeds=CLAIM),
        # FitNet was tuned first: 6 and 20 are its best two weights
        fitnet_amd=by('FitNet + AMD', feature(neck, 'fitnet', 'amd-scale-free'), grid((6.0, 20.0), (1.0, 0.3)),
                      'fitnet', seeds=CLAIM),
        sokd_pkd=by('SoKD on PKD', on('pkd'), grid((30.0, 60.0), dam), 'pkd', seeds=CLAIM),
        sokd_mgd=by('SoKD on MGD', on('mgd'), grid((3e-4, 1e-3), dam), 'mgd'),
        sokd_fitnet=by('SoKD on FitNet', on('fitnet'), grid((6.0, 20.0), dam), 'fitnet', seeds=CLAIM),
        sokd_reviewkd=by('SoKD on ReviewKD', on('reviewkd'), grid((10.0, 30.0), dam), 'reviewkd'),
        sokd_at=by('SoKD on AT', on('at'), grid((100.0, 300.0), dam), 'at'),
        at_fitnet=by('AT + FitNet', feature(neck, 'at', 'fitnet'), base='sokd_at', weights_of='sokd_at'),
        pkd_adapter=by('PKD + a second adapter', feature(neck, 'pkd', adapter), base='sokd_pkd',
                       weights_of='sokd_pkd'),
        no_dafa=by('SoKD on PKD, without DAFA', on('pkd', dafa=None), base='sokd_pkd', weights_of='sokd_pkd'),
        map_areas=by('SoKD on PKD, areas over the map', on('pkd', area_reduction='map'),
                     grid((30.0, 60.0), (1.5, 0.5)), 'pkd'),
        no_areas=by('SoKD on PKD, without areas', on('pkd', areas=False), base='sokd_pkd', weights_of='sokd_pkd'),
        dafa_similarity=by('PKD + DAFA by similarity', on('pkd'), base='pkd', weights_of='pkd'),
        dafa_agreement=by('PKD + DAFA by agreement', on('pkd', dafa=dict(objective='agreement')), base='pkd',
                          weights_of='pkd'),
        pkd_decay=by('PKD, falling to 0', decaying(feature(neck, 'pkd'), epochs // 2, epochs),
                     one(60.0, 30.0, 120.0, 240.0), 'pkd'),
        fitnet_decay=by('FitNet, falling to 0', decaying(feature(neck, 'fitnet'), epochs // 2, epochs),
                        one(6.0, 2.0, 20.0, 60.0), 'fitnet'),
        fitnet_auto=by("FitNet, weight 'auto'", measured(neck, 'fitnet'), base='fitnet'),
        at_auto=by("AT, weight 'auto'", measured(neck, 'at'), base='at'),
        pkd_auto=by("PKD, weight 'auto'", measured(neck, 'pkd'), base='pkd'),
        mgd_auto=by("MGD, weight 'auto'", measured(neck, 'mgd'), base='mgd'))
    return Task('BCCD, RetinaNet R18 of width 32 to width 16', BCCD, 'configs/benchmarks/bccd',
                'retinanet_r18-c32_bccd', 'coco/bbox_mAP', 'AP (%)', 100.0, experiments,
                ('pkd_crosskd', 'sokd_pkd', 'sokd_fitnet', 'pkd_amd', 'fitnet_amd'))


def bccd_mobilenet() -> Task:
    """The teacher and labels of ``bccd``, with a student of another architecture and ImageNet weights."""
    config, neck = 'inherit_retinanet_r18-c32_retinanet_mobilenetv2_bccd-60', ['neck']

    def by(label: str, options: Callable[..., dict], weights: tuple[Weights, ...], base: str = 'student') -> Experiment:
        return Experiment(label, config, base, options=options, weights=weights)

    return Task(
        'BCCD, RetinaNet R18 of width 32 to MobileNetV2', {**BCCD, **MOBILENET}, 'configs/benchmarks/bccd',
        'retinanet_r18-c32_bccd', 'coco/bbox_mAP', 'AP (%)', 100.0, dict(
            student=Experiment('student alone', 'retinanet_mobilenetv2_bccd-60'),
            inherited=Experiment('inherited start', config, 'student'),
            pkd=by('PKD', feature(neck, 'pkd'), one(30.0, 10.0, 60.0, 120.0)),
            at=by('AT', feature(neck, 'at'), one(100.0, 30.0, 300.0, 1000.0)),
            amd=by('AMD, scale-free, global + local', feature(neck, 'amd-scale-free'), one(1.0, 0.3, 3.0, 10.0), 'at'),
            pkd_auto=by("PKD, weight 'auto'", measured(neck, 'pkd'), (), 'pkd'),
            sokd_pkd=by('SoKD on PKD', sokd(neck, 'pkd', 'boxes', 15, {}), grid((30.0, 60.0), (0.3, 0.1)), 'pkd')))


def cifar10() -> Task:
    """Classification with a student that has a ninth of the teacher's labels."""
    student, config = 'resnet8_cifar10-5000', 'distill_resnet20_resnet8_cifar10-5000'
    stages, stage = [f'backbone.layer{i}' for i in (1, 2, 3)], ['backbone.layer2']

    def by(label: str, options: Callable[..., dict], weights: tuple[Weights, ...], base: str = 'student') -> Experiment:
        return Experiment(label, config, base, options=options, weights=weights)

    return Task(
        'CIFAR-10, ResNet-20 to ResNet-8', CIFAR10, 'configs/benchmarks/cifar10', 'resnet20_cifar10',
        'accuracy/top1', 'top-1 accuracy (%)', 1.0, dict(
            student=Experiment('student alone', student),
            fitnet=by('FitNet', feature(stage, 'fitnet'), one(30.0, 10.0, 100.0, 300.0)),
            fitnet_auto=by("FitNet, weight 'auto'", measured(stage, 'fitnet'), (), 'fitnet'),
            at=by('AT', feature(stages, 'at'), one(500.0, 100.0, 2500.0, 12500.0)),
            amd=by('AMD, scale-free', feature(stages, dict(preset='amd-scale-free', loss=dict(local_grid=1))),
                   one(6.4, 1.6, 25.6, 100.0), 'at'),
            sokd_fitnet=by('SoKD on FitNet', sokd(stage, 'fitnet', 'attention', 8, {}), grid((30.0, 100.0), (4.0, 1.0)),
                           'fitnet')))


TASKS = {'bccd': bccd(), 'bccd_mobilenet': bccd_mobilenet(), 'cifar10': cifar10()}
