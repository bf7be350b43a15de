"""Training with a second data loader, of images without labels."""
from collections.abc import Iterator
from itertools import count

from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ...models.algorithms import TeacherStudentDistill
from ...models.algorithms.second_batch import WithUnlabelled
from ...registry import LOOPS

_ROUNDS = 1000  # through the unlabelled loader in an epoch, that are shuffled differently from those of the next


@LOOPS.register_module()
class UnlabelledEpochBasedTrainLoop(EpochBasedTrainLoop):
    """MMEngine's ``EpochBasedTrainLoop`` whose every step sees a batch of unlabelled images, too.

    The student learns from them by the distillation losses alone, ``unlabelled.loss_*``. Task losses, DAM's anchor,
    the search of SoKD's policy and losses that read labels skip them. Weights and schedules of the losses apply to
    both batches, each a mean over its own images.

    An epoch is one pass over the labelled images. It begins with the first batch of the unlabelled loader, shuffled
    anew, and goes through that loader as often as it must. Hooks that switch the pipeline switch that of the labelled
    images. Annotations of unlabelled images are not read.

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
        ValueError: the model is no :class:`.TeacherStudentDistill`, none of its losses does without labels, the loader
            has no batch, or there is a loader for the search of a policy.
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
    """MMEngine's ``IterBasedTrainLoop`` whose every step sees a batch of unlabelled images, too.

    See :class:`UnlabelledEpochBasedTrainLoop`.

    Args:
        unlabelled_dataloader: config of the loader, or the loader.
        runner, dataloader, max_iters, kwargs: as in ``IterBasedTrainLoop``.

    Raises:
        ValueError: as :class:`UnlabelledEpochBasedTrainLoop`.
    """

    def __init__(self, runner: Runner, dataloader: dict | DataLoader, unlabelled_dataloader: dict | DataLoader,
                 max_iters: int, **kwargs) -> None:
        _check(runner, kwargs)
        super().__init__(runner, dataloader, max_iters, **kwargs)
        self.unlabelled_dataloader = _build(runner, unlabelled_dataloader)
        self.dataloader_iterator = _Pairs(self.dataloader_iterator, _endless(self.unlabelled_dataloader, 0))


class _Pairs:
    """Goes through two endless iterators at once, so that a resumed run skips the batches of both."""

    def __init__(self, labelled: Iterator[dict], unlabelled: Iterator[dict]) -> None:
        self.labelled = labelled
        self.unlabelled = unlabelled

    def __iter__(self) -> '_Pairs':
        return self

    def __next__(self) -> WithUnlabelled:
        return WithUnlabelled(next(self.labelled), next(self.unlabelled))

    def skip_iter(self, iterations: int) -> None:
        """As newer MMEngines call it after a resume."""
        for _ in range(iterations):
            next(self)


def _check(runner: Runner, kwargs: dict) -> None:
    if 'mutator_dataloader' in kwargs:
        raise ValueError('train_cfg.mutator_dataloader: a policy is not searched on a split of its own together with '
                         'unlabelled images. Take one of the two loaders out')
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if not isinstance(model, TeacherStudentDistill):
        raise ValueError(f'train_cfg.type: unlabelled images teach by distillation alone, got a '
                         f'{type(model).__name__}, expected a TeacherStudentDistill. Use MMEngine\'s train loop')
    model.check_unlabelled()


def _build(runner: Runner, loader: dict | DataLoader) -> DataLoader:
    loader = runner.build_dataloader(loader, seed=runner.seed) if isinstance(loader, dict) else loader
    if not len(loader):
        raise ValueError(f'train_cfg.unlabelled_dataloader: it has no batch: {len(loader.dataset)} images. '
                         'Give it more images, or a smaller batch_size')
    return loader


def _endless(loader: DataLoader, first: int) -> Iterator[dict]:
    """Yields batches, round after round, each shuffled as in an epoch of its own, from ``first`` on."""
    for epoch in count(first):
        for sampler in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(epoch)
        yield from loader
