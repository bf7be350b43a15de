"""What the benchmark of accuracy runs: tasks, and the rows of each."""
from dataclasses import dataclass, field, replace

TUNING_SEEDS = (100, )
CLAIM, OTHER = 10, 3  # seeds of a row that carries a claim, and of one that explains it


@dataclass(frozen=True)
class Row:
    """One way to train the student.

    A distillation row is tuned by trying each of ``weights`` on the tuning split with the tuning seeds, unless it is
    one change away from another, whose weight it then takes.
    """
    label: str
    config: str  # file in the task's folder, without .py
    base: str | None = None  # the row that it is compared with
    seeds: int = CLAIM
    options: dict = field(default_factory=dict)  # as --cfg-options
    weight: tuple[str, ...] = ()  # options that hold the weight of the distillation
    weights: tuple[float, ...] = ()  # to try
    weight_of: str | None = None  # the row whose weight it takes


@dataclass(frozen=True)
class Task:
    """A data set, a teacher and the rows of its student, in the order of the tables."""
    title: str
    folder: str  # of the configs
    teacher: str  # config
    metric: str  # as MMEngine logs it
    unit: str  # of the metric, for people
    scale: float  # from the metric to percent
    rows: dict[str, Row]


def sokd(search_epochs: int, anchor: str | None, dafa: dict | None = None, **dam) -> dict:
    """The options that put SoKD around a row's base."""
    return {
        'model.distiller.dafa': dafa or {},
        'model.distiller.dam': dict(anchor=anchor, **dam),
        'optim_wrapper.constructor': 'mmkd_plugin.PolicyOptimWrapperConstructor',
        'optim_wrapper.policy': dict(type='Adam', lr=1e-2, betas=(0.5, 0.999)),
        'custom_hooks': [dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=search_epochs)],
    }


BASE = ('model.distiller.base.loss_weight', )
KD = ('model.distiller.distill_losses.loss_kd.loss_weight', )
FREE = {'model.distiller.base.scale_free': True}


def fashion() -> Task:
    end = '_resnet8_fashion_mnist-500'
    around = sokd(12, 'attention')
    feature, attention = (3.0, 10.0, 30.0, 100.0, 300.0), (100.0, 300.0, 1e3, 3e3, 1e4)
    review = (1.0, 3.0, 10.0, 30.0, 100.0)
    paper, free = (100.0, 300.0, 1e3, 3e3, 1e4), (0.1, 0.3, 1.0, 3.0, 10.0)

    def row(label: str, config: str, base: str = 'student', weight: tuple[str, ...] = BASE, **kwargs) -> Row:
        return Row(label, config + end, base, weight=weight, **kwargs)

    def part(label: str, of: str = 'sokd_fitnet', config: str = 'fitnet', **kwargs) -> Row:
        return row(label, config, of, seeds=OTHER, weight_of=of, **kwargs)

    rows = dict(
        student=Row('student alone', end[1:]),
        longer=Row('student alone, twice as long', end[1:], 'student', OTHER, {'train_cfg.max_epochs': 160}),
        inherited=row('student alone, inherited head', 'inherit', weight=()),
        kd=row('KD', 'kd', weight=KD, weights=(0.3, 1.0, 3.0, 10.0, 30.0)),
        fitnet=row('FitNet', 'fitnet', weights=feature),
        at=row('AT', 'at', weights=attention),
        reviewkd=row('ReviewKD', 'reviewkd', weights=review),
        amd=row('AMD, paper form', 'amd', 'at', weights=paper),
        amd_free=row('AMD, scale-free', 'amd', 'at', weights=free, options=FREE),
        amd_kd=row('AMD + KD', 'amd-kd', 'kd', weight=('model.distiller.amd.loss_weight', ), weights=paper),
        sokd_fitnet=row('SoKD on FitNet', 'fitnet', 'fitnet', weights=feature, options=around),
        sokd_at=row('SoKD on AT', 'at', 'at', weights=attention, options=around),
        sokd_reviewkd=row('SoKD on ReviewKD', 'reviewkd', 'reviewkd', weights=review, options=around),
        sokd_amd=row('SoKD on AMD', 'amd', 'amd', weights=paper, options=around),
        margin_1=part('AMD, margin 1', 'amd', 'amd', options={'model.distiller.base.margin': 1.0}),
        no_dafa=part('SoKD on FitNet without DAFA', options={'model.distiller.dam': dict(anchor='attention')}),
        no_dam=part('SoKD on FitNet without DAM', options={**around, 'model.distiller.dam': None}),
        no_anchor=part('SoKD on FitNet without anchor', options=sokd(12, None)),
        random=part('SoKD on FitNet, policy not learned', options=sokd(0, 'attention')),
        region_student=part('SoKD on FitNet, areas of the student', options=sokd(12, 'attention', region='student')),
        region_teacher=part('SoKD on FitNet, areas of the teacher', options=sokd(12, 'attention', region='teacher')))
    return Task('Fashion-MNIST, ResNet-20 to ResNet-8', 'configs/fashion', 'resnet20_fashion_mnist',
                'accuracy/top1', 'top-1 accuracy (%)', 1.0, rows)


def fashion_cross() -> Task:
    end = '_repvgg_fashion_mnist-500'
    same = fashion().rows

    def row(name: str, config: str, base: str = 'student') -> Row:
        """The row of this name for the other student, on the same terms."""
        return replace(same[name], config=config + end, base=base, seeds=OTHER)

    rows = dict(
        student=Row('student alone', end[1:], seeds=OTHER),
        kd=row('kd', 'kd'),
        fitnet=row('fitnet', 'fitnet'),
        at=row('at', 'at'),
        amd=row('amd', 'amd', 'at'),
        amd_free=row('amd_free', 'amd', 'at'),
        sokd_fitnet=row('sokd_fitnet', 'fitnet', 'fitnet'),
        sokd_at=row('sokd_at', 'at', 'at'))
    return Task('Fashion-MNIST, ResNet-20 to RepVGG', 'configs/fashion', 'resnet20_fashion_mnist',
                'accuracy/top1', 'top-1 accuracy (%)', 1.0, rows)


def clothing() -> Task:
    end = '_retinanet_r18-c16_clothing-300'
    dafa = dict(beta_init=0.1)
    around = sokd(3, 'boxes', dafa)
    feature, attention = (0.25, 0.5, 1.0, 2.0), (3.0, 10.0, 30.0, 100.0)
    paper, free = (1.0, 3.0, 10.0, 30.0), (0.03, 0.1, 0.3, 1.0)
    other = (0.3, 1.0, 3.0, 10.0)

    def row(label: str, config: str, base: str = 'inherited', weight: tuple[str, ...] = BASE, **kwargs) -> Row:
        return Row(label, config + end, base, weight=weight, **kwargs)

    def part(label: str, of: str = 'sokd_fitnet', config: str = 'fitnet', **kwargs) -> Row:
        return row(label, config, of, seeds=OTHER, weight_of=of, **kwargs)

    mgd = tuple(f'model.distiller.distill_losses.loss_mgd_{i}.alpha_mgd' for i in range(3))
    rows = dict(
        student=Row('student alone', end[1:]),
        inherited=row('student alone, inherited start', 'inherit', 'student', weight=()),
        fitnet=row('FitNet', 'fitnet', weights=feature),
        at=row('AT', 'at', weights=attention),
        cwd=row('CWD', 'cwd', weights=other, seeds=OTHER),
        pkd=row('PKD', 'pkd', weights=other, seeds=OTHER),
        mgd=row('MGD', 'mgd', weight=mgd, weights=(3e-4, 1e-3, 3e-3, 1e-2), seeds=OTHER),
        reviewkd=row('ReviewKD', 'reviewkd', weights=other),
        amd=row('AMD, paper form', 'amd', 'at', weights=paper),
        amd_free=row('AMD, scale-free', 'amd', 'at', weights=free, options=FREE),
        sokd_fitnet=row('SoKD on FitNet', 'fitnet', 'fitnet', weights=feature, options=around),
        sokd_at=row('SoKD on AT', 'at', 'at', weights=attention, options=around),
        sokd_reviewkd=row('SoKD on ReviewKD', 'reviewkd', 'reviewkd', weights=other, options=around),
        sokd_amd=row('SoKD on AMD', 'amd', 'amd_free', weights=free, options={**FREE, **around}),
        margin_1=part('AMD, scale-free, margin 1', 'amd_free', 'amd',
                      options={**FREE, 'model.distiller.base.margin': 1.0}),
        no_dafa=part('SoKD on FitNet without DAFA', options={'model.distiller.dam': dict(anchor='boxes')}),
        no_dam=part('SoKD on FitNet without DAM', options={**around, 'model.distiller.dam': None}),
        no_anchor=part('SoKD on FitNet without anchor', options=sokd(3, None, dafa)),
        random=part('SoKD on FitNet, policy not learned', options=sokd(0, 'boxes', dafa)),
        region_student=part('SoKD on FitNet, areas of the student', options=sokd(3, 'boxes', dafa, region='student')),
        region_teacher=part('SoKD on FitNet, areas of the teacher', options=sokd(3, 'boxes', dafa, region='teacher')))
    return Task('Clothing detection, RetinaNet R18 of width 32 to width 16', 'configs/clothing',
                'retinanet_r18-c32_clothing', 'coco/bbox_mAP', 'AP (%)', 100.0, rows)


TASKS = {'fashion': fashion(), 'clothing': clothing(), 'fashion_cross': fashion_cross()}
