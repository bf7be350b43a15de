"""What the benchmark of accuracy runs: tasks, and the rows of each."""
from dataclasses import dataclass, field, replace

TUNING_SEEDS = (100, )
CLAIM, OTHER = 10, 3  # seeds of a row that carries a claim, and of one that explains it


@dataclass(frozen=True)
class Row:
    """One way to train the student.

    A row with a weight of its own is tuned by trying each of ``weights`` on the tuning split with the tuning seeds.
    What is built on another row, or is one change away from it, has that row's best weights too.
    """
    label: str
    config: str  # file in the task's folder, without .py
    base: str | None = None  # the row that it is compared with
    seeds: int = CLAIM
    options: dict = field(default_factory=dict)  # as --cfg-options
    weight: dict[str, float] = field(default_factory=dict)  # options that hold the weight, times these factors
    weights: tuple[float, ...] = ()  # to try
    weights_of: str | None = None  # the row whose best weights it takes before its own


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
    needs_gpu: bool = False  # too long for a CPU, which runs it only where it is named


def sokd(search_epochs: int, anchor: str | None, beta_init: float = 0.1, **dam) -> dict:
    """The options that put SoKD around a row's base."""
    return {
        'model.distiller.dafa': dict(beta_init=beta_init),
        'model.distiller.dam': dict(anchor=anchor, **dam),
        'optim_wrapper.constructor': 'mmkd_plugin.PolicyOptimWrapperConstructor',
        'optim_wrapper.policy': dict(type='Adam', lr=1e-2, betas=(0.5, 0.999)),
        'custom_hooks': [dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=search_epochs)],
    }


BASE = {'model.distiller.base.loss_weight': 1.0}
KD = {'model.distiller.distill_losses.loss_kd.loss_weight': 1.0}
DAM = {'model.distiller.dam.detect_loss_weight': 1.0, 'model.distiller.dam.area_loss_weight': 3.0}  # as its defaults
FREE = {'model.distiller.base.scale_free': True}


def ablations(config: str, search_epochs: int, anchor: str) -> dict[str, Row]:
    """What becomes of SoKD on FitNet when one thing is otherwise; ``config`` is FitNet's."""
    of = 'sokd_fitnet'
    changes = dict(
        no_dafa=('without DAFA', {'model.distiller.dam': dict(anchor=anchor)}),
        no_dam=('without DAM', {**sokd(search_epochs, anchor), 'model.distiller.dam': None}),
        no_anchor=('without anchor', sokd(search_epochs, None)),
        random=('policy not learned', sokd(0, anchor)),
        half=('operations start at 0.5', sokd(search_epochs, anchor, beta_init=0.5)),
        region_student=('areas of the student', sokd(search_epochs, anchor, region='student')),
        region_teacher=('areas of the teacher', sokd(search_epochs, anchor, region='teacher')))
    return {name: Row(f'SoKD on FitNet, {label}', config, of, OTHER, options, weights_of=of)
            for name, (label, options) in changes.items()}


def fashion() -> Task:
    end = '_resnet8_fashion_mnist-300'
    feature, attention, review = (3.0, 12.0, 50.0, 200.0), (100.0, 500.0, 2500.0, 12500.0), (4.0, 16.0, 64.0, 256.0)
    paper, free, dam = attention, (0.4, 1.6, 6.4, 25.6), (1.0, 4.0, 16.0, 64.0)

    def row(label: str, config: str, base: str = 'student', weight: dict[str, float] = BASE, **kwargs) -> Row:
        return Row(label, config + end, base, weight=weight, **kwargs)

    def around(label: str, of: str, **kwargs) -> Row:
        return row(f'SoKD on {label}', of, of, DAM, weights=dam, weights_of=of, options=sokd(10, 'attention'), **kwargs)

    rows = dict(
        student=Row('student alone', end[1:]),
        longer=Row('student alone, twice as long', end[1:], 'student', OTHER, {'train_cfg.max_epochs': 120}),
        inherited=row('student alone, inherited head', 'inherit', weight={}, seeds=OTHER),
        kd=row('KD', 'kd', weight=KD, weights=(1.0, 3.0, 10.0, 30.0), seeds=OTHER),
        fitnet=row('FitNet', 'fitnet', weights=feature),
        at=row('AT', 'at', weights=attention),
        reviewkd=row('ReviewKD', 'reviewkd', weights=review, seeds=OTHER),
        amd=row('AMD, paper form', 'amd', 'at', weights=paper),
        amd_free=row('AMD, scale-free', 'amd', 'at', weights=free, options=FREE),
        amd_kd=row('AMD + KD, 0.1 CE + 0.9 KD', 'amd-kd', 'kd', {'model.distiller.amd.loss_weight': 1.0},
                   weights=paper, seeds=OTHER),
        sokd_fitnet=around('FitNet', 'fitnet'),
        sokd_at=around('AT', 'at'),
        sokd_reviewkd=around('ReviewKD', 'reviewkd', seeds=OTHER),
        sokd_amd=around('AMD', 'amd', seeds=OTHER),
        margin_1=row('AMD, paper form, margin 1', 'amd', 'amd', {}, seeds=OTHER, weights_of='amd',
                     options={'model.distiller.base.margin': 1.0}),
        **ablations('fitnet' + end, 10, 'attention'))
    return Task('Fashion-MNIST, ResNet-20 to ResNet-8', 'configs/fashion', 'resnet20_fashion_mnist',
                'accuracy/top1', 'top-1 accuracy (%)', 1.0, rows)


def fashion_cross() -> Task:
    end = '_repvgg_fashion_mnist-300'
    same = fashion().rows

    def row(name: str, config: str, base: str = 'student') -> Row:
        """The row of this name for the other student, on the same terms."""
        seeds = CLAIM if name in ('at', 'amd_free', 'sokd_at') else OTHER
        return replace(same[name], config=config + end, base=base, seeds=seeds)

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


def fashion_all() -> Task:
    """All labels, so that the teacher knows little more than the student's labels tell."""
    same = fashion().rows
    longer = {'train_dataloader.dataset.indices': 50000, 'train_dataloader.batch_size': 125,
              'train_cfg.max_epochs': 16, 'train_cfg.val_interval': 4}
    names = ('student', 'kd', 'fitnet', 'at', 'reviewkd', 'amd', 'amd_free', 'sokd_fitnet', 'sokd_at')
    search = sokd(3, 'attention')  # of 16 epochs
    rows = {name: replace(same[name], seeds=OTHER, options={
        **same[name].options, **(search if name.startswith('sokd') else {}), **longer}) for name in names}
    return Task('Fashion-MNIST with all labels, ResNet-20 to ResNet-8', 'configs/fashion', 'resnet20_fashion_mnist',
                'accuracy/top1', 'top-1 accuracy (%)', 1.0, rows, needs_gpu=True)


def clothing() -> Task:
    end = '_retinanet_r18-c16_clothing-300'
    feature, attention = (0.2, 0.6, 2.0, 6.0), (1.0, 3.0, 10.0, 30.0)
    paper, free, dam = (0.1, 1.0, 10.0, 100.0), (0.1, 0.3, 1.0, 3.0), (0.1, 0.3, 1.0, 3.0)
    other = (1.0, 3.0, 10.0, 30.0)

    def row(label: str, config: str, base: str = 'inherited', weight: dict[str, float] = BASE, **kwargs) -> Row:
        return Row(label, config + end, base, weight=weight, **kwargs)

    def around(label: str, of: str, config: str, options: dict | None = None, **kwargs) -> Row:
        return row(f'SoKD on {label}', config, of, DAM, weights=dam, weights_of=of,
                   options={**sokd(3, 'boxes'), **(options or {})}, **kwargs)

    mgd = {f'model.distiller.distill_losses.loss_mgd_{i}.alpha_mgd': 1.0 for i in range(3)}
    rows = dict(
        student=Row('student alone', end[1:]),
        longer=Row('student alone, twice as long', end[1:], 'student', OTHER, {'train_cfg.max_epochs': 36}),
        inherited=row('student alone, inherited start', 'inherit', 'student', {}),
        fitnet=row('FitNet', 'fitnet', weights=feature),
        at=row('AT', 'at', weights=attention),
        cwd=row('CWD', 'cwd', weights=other, seeds=OTHER),
        pkd=row('PKD', 'pkd', weights=other, seeds=OTHER),
        mgd=row('MGD', 'mgd', weight=mgd, weights=(3e-4, 1e-3, 3e-3, 1e-2), seeds=OTHER),
        reviewkd=row('ReviewKD', 'reviewkd', weights=other, seeds=OTHER),
        amd=row('AMD, paper form', 'amd', 'at', weights=paper, seeds=OTHER),
        amd_free=row('AMD, scale-free', 'amd', 'at', weights=free, options=FREE),
        amd_local=row('AMD, scale-free, global + local', 'amd', 'at', {}, weights_of='amd_free',
                      options={**FREE, 'model.distiller.base.local_grid': 2}),
        sokd_fitnet=around('FitNet', 'fitnet', 'fitnet'),
        sokd_at=around('AT', 'at', 'at'),
        sokd_reviewkd=around('ReviewKD', 'reviewkd', 'reviewkd', seeds=OTHER),
        sokd_amd=around('AMD, scale-free', 'amd_free', 'amd', FREE, seeds=OTHER),
        margin_1=row('AMD, scale-free, margin 1', 'amd', 'amd_free', {}, seeds=OTHER, weights_of='amd_free',
                     options={**FREE, 'model.distiller.base.margin': 1.0}),
        **ablations('fitnet' + end, 3, 'boxes'))
    return Task('Clothing detection, RetinaNet R18 of width 32 to width 16', 'configs/clothing',
                'retinanet_r18-c32_clothing', 'coco/bbox_mAP', 'AP (%)', 100.0, rows)


TASKS = {'fashion': fashion(), 'clothing': clothing(), 'fashion_cross': fashion_cross(), 'fashion_all': fashion_all()}
