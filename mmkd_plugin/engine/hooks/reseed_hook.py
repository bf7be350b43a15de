"""Hook that makes a resumed run continue as if it had not been interrupted."""
import random
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ...registry import HOOKS


@HOOKS.register_module()
class ReseedHook(Hook):
    """Makes all randomness depend only on the seed and the position in the run.

    MMEngine's checkpoints do not contain random states. This hook seeds Python, NumPy and torch before every
    iteration. It restarts the data workers in every epoch and seeds them from seed, epoch, rank and worker. A run that
    is resumed from a checkpoint at the end of an epoch, or at any iteration of an ``IterBasedTrainLoop``, then ends
    with the weights of an uninterrupted run. On deterministic hardware, such as CPUs, they are bit-identical.

    A restarted worker also clears the state that transforms keep between images, such as RTMDet's cached mosaic, so
    that a resumed run does not lack it. With ``num_workers=0`` the main process loads the data, and transforms keep
    their state. A run with such transforms then resumes differently.

    As in MMEngine, all ranks share one seed unless ``randomness.diff_rank_seed`` is set.
    """

    priority = 'VERY_HIGH'
    epoch_length: int | None = None  # of the run in the checkpoint, in iterations

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        if hasattr(loop, 'dataloader_iterator'):
            loop.dataloader_iterator = _Reseeded(loop.dataloader_iterator, runner.seed)
            if runner.iter and hasattr(loop, 'multi_loaders'):
                runner.logger.warning(f'{type(loop).__name__} starts again at the first batch, so the resumed run will '
                                      'differ from an uninterrupted one')
            return
        extra = runner.iter - runner.epoch * len(loop.dataloader)
        # saved by iteration at the end of an epoch, before MMEngine counted it
        if extra == len(loop.dataloader) == (self.epoch_length or extra):
            loop._epoch += 1
        elif extra:
            runner.logger.warning(
                f'Resumed after {runner.iter} iterations, which are not {runner.epoch} epochs of '
                f'{len(loop.dataloader)}, so epoch {runner.epoch + 1} starts again. To resume exactly, save '
                'checkpoints at the end of epochs (default_hooks.checkpoint.by_epoch=True) and keep the batch size')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if not hasattr(runner.train_loop, 'dataloader_iterator'):
            checkpoint['meta']['epoch_length'] = len(runner.train_loop.dataloader)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.epoch_length = (checkpoint.get('meta') or {}).get('epoch_length')

    def before_train_epoch(self, runner: Runner) -> None:
        seed(runner.seed, runner.epoch, 0)
        if hasattr(runner.train_loop, 'dataloader_iterator'):
            return  # its workers are started only once
        for loader in {id(loader): loader for loader in (
                getattr(runner.train_loop, name, None)
                for name in ('dataloader', 'mutator_dataloader', 'unlabelled_dataloader'))}.values():
            if isinstance(loader, DataLoader) and loader.num_workers:
                loader.worker_init_fn = partial(start_worker, original=_original(loader.worker_init_fn),
                                                entropy=(runner.seed, runner.epoch, get_rank()))
                loader._iterator = None  # torch keeps persistent workers here

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        seed(runner.seed, runner.iter, 1)


def seed(*entropy: int) -> None:
    """Seeds Python, NumPy and torch from several integers."""
    mixed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def start_worker(worker_id: int, original: partial | None, entropy: tuple[int, ...]) -> None:
    """Calls the original ``worker_init_fn`` of a data worker, then seeds the worker."""
    if original is not None:
        original(worker_id)
    seed(*entropy, worker_id)


def _original(worker_init_fn: partial | None) -> partial | None:
    """Returns the ``worker_init_fn`` that was set before this hook."""
    return worker_init_fn.keywords['original'] if getattr(worker_init_fn, 'func', None) is start_worker else (
        worker_init_fn)


class _Reseeded:
    """An iterator that seeds before each batch. After a resume, it loads the earlier batches again and skips them."""

    def __init__(self, iterator: Iterator, base: int) -> None:
        self.iterator = iterator
        self.base = base
        self.count = 0

    def __next__(self) -> dict:
        seed(self.base, self.count, 2)
        self.count += 1
        return next(self.iterator)

    def skip_iter(self, iterations: int) -> None:
        """Skips batches by loading them. Newer MMEngine calls it; its own version does not load."""
        for _ in range(iterations):
            next(self)
