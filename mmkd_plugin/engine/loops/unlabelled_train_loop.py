"""Training loops with a second data loader of unlabelled images."""
from collections.abc import Iterator
from itertools import count

from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ...models.algorithms import TeacherStudentDistill
from ...models.algorithms.second_batch import WithUnlabelled
from ...registry import LOOPS
from ...utils import unwrapped

_ROUNDS = 1000  # passes over the unlabelled loader per epoch that have their own shuffling seeds


@LOOPS.register_module()
class UnlabelledEpochBasedTrainLoop(EpochBasedTrainLoop):
    """MMEngine's ``EpochBasedTrainLoop`` with a batch of unlabelled images in every step.

    On unlabelled images the student has the distillation losses alone, ``unlabelled.loss_*``. Task losses, DAM's
    anchor, the search of SoKD's policy and losses that read labels skip these images. The weights and schedules of the
    losses apply to both batches. Each batch has its own mean.

    An epoch is one pass over the labelled images. In each epoch, the unlabelled loader is shuffled and starts at its
    first batch. If it is shorter than the epoch, it is repeated. Hooks that switch the pipeline switch that of the
    labelled images. Annotations of unlabelled images are not read.

    Usage::

        train_cfg = dict(
            type='mmkd_plugin.UnlabelledEpochBasedTrainLoop', max_epochs=12, val_interval=1,
            unlabelled_dataloader=dict(
                batch_size=4, num_workers=2, sampler=dict(type='DefaultSampler', shuffle=True),
                dataset=dict(type='mmpretrain.CustomDataset', data_root='data/unlabelled', with_label=False, pipeline=[
                    dict(type='LoadImageFromFile'), dict(type='mmdet.Resize', scale=(1333, 800), keep_ratio=True),
                    dict(type='mmdet.PackDetInputs')])))

    Args:
        unlabelled_dataloader: config of the loader, or the loader.
        runner, dataloader, max_epochs, kwargs: as in ``EpochBasedTrainLoop``.

    Raises:
        ValueError: the model is not a :class:`.TeacherStudentDistill`, all of its losses need labels, the loader has no
            batch, there is a loader for the search of a policy, or several processes train a student with activation
            checkpointing.
    """

    def __init__(self, runner: Runner, dataloader: dict | DataLoader, unlabelled_dataloader: dict | DataLoader,
                 max_epochs: int, **kwargs) -> None:
        _check(runner, kwargs)
        super().__init__(runner, dataloader, max_epochs, **kwargs)
        self.unlabelled_dataloader = _build(runner, unlabelled_dataloader)

    def run_epoch(self) -> None:
        self._unlabelled = _endless(self.unlabelled_dataloader, self.epoch * _ROUNDS)
        super().run_epoch()

    def run_iter(self, idx: int, data_batch: dict) -> None:
        super().run_iter(idx, WithUnlabelled(data_batch, next(self._unlabelled)))


@LOOPS.register_module()
class UnlabelledIterBasedTrainLoop(IterBasedTrainLoop):
    """MMEngine's ``IterBasedTrainLoop`` with a batch of unlabelled images in every step.

    See :class:`UnlabelledEpochBasedTrainLoop`.

    Args:
        unlabelled_dataloader: config of the loader, or the loader.
        runner, dataloader, max_iters, kwargs: as in ``IterBasedTrainLoop``.

    Raises:
        ValueError: as in :class:`UnlabelledEpochBasedTrainLoop`.
    """

    def __init__(self, runner: Runner, dataloader: dict | DataLoader, unlabelled_dataloader: dict | DataLoader,
                 max_iters: int, **kwargs) -> None:
        _check(runner, kwargs)
        super().__init__(runner, dataloader, max_iters, **kwargs)
        self.unlabelled_dataloader = _build(runner, unlabelled_dataloader)
        self.dataloader_iterator = _Pairs(self.dataloader_iterator, _endless(self.unlabelled_dataloader, 0))


class _Pairs:
    """Iterates over two endless iterators together, so that a resumed run skips the batches of both."""

    def __init__(self, labelled: Iterator[dict], unlabelled: Iterator[dict]) -> None:
        self.labelled = labelled
        self.unlabelled = unlabelled

    def __iter__(self) -> '_Pairs':
        return self

    def __next__(self) -> WithUnlabelled:
        return WithUnlabelled(next(self.labelled), next(self.unlabelled))

    def skip_iter(self, iterations: int) -> None:
        """Skips batches of both; newer MMEngine calls it after a resume."""
        for _ in range(iterations):
            next(self)


def _check(runner: Runner, kwargs: dict) -> None:
    if 'mutator_dataloader' in kwargs:
        raise ValueError('train_cfg.mutator_dataloader: a separate split for the policy search cannot be combined with '
                         'unlabelled images. Remove one of the two loaders')
    model = unwrapped(runner.model)
    if not isinstance(model, TeacherStudentDistill):
        raise ValueError(f'train_cfg.type: unlabelled images need a distillation, got a {type(model).__name__}, '
                         'expected a TeacherStudentDistill. Use MMEngine\'s train loop')
    if is_model_wrapper(runner.model) and any(getattr(part, 'with_cp', False) for part in model.student.modules()):
        raise ValueError('train_cfg.type: with several processes, a step cannot run blocks with activation '
                         'checkpointing (with_cp=True) twice, on labelled and unlabelled images. Set with_cp=False in '
                         'the student')
    model.check_unlabelled()


def _build(runner: Runner, loader: dict | DataLoader) -> DataLoader:
    if isinstance(loader, dict):  # as MMEngine builds the loader of a loop
        loader = runner.build_dataloader(loader, seed=runner.seed, diff_rank_seed=runner._randomness_cfg.get(
            'diff_rank_seed', False))
    if not len(loader):
        raise ValueError(f'train_cfg.unlabelled_dataloader: has no batch, got {len(loader.dataset)} images. '
                         'Use more images, or a smaller batch_size')
    return loader


def _endless(loader: DataLoader, first: int) -> Iterator[dict]:
    """Yields batches pass after pass. Each pass is shuffled as an epoch of its own, starting with epoch ``first``."""
    for epoch in count(first):
        for sampler in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(epoch)
        yield from loader
