"""Makes a resumed run go on as if it had never stopped."""
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
    """What is random depends on the seed and the place in the run alone, not on how the run came there.

    MMEngine's checkpoints hold no random state. This hook seeds Python, NumPy and torch anew before every
    iteration, and the data workers, which start afresh with every epoch, from seed, epoch, rank and worker.
    A run that is resumed from a checkpoint at the end of an epoch, or at any iteration of an ``IterBasedTrainLoop``,
    then ends with the weights of the run that was not: to the bit where the hardware is deterministic, as CPUs are.

    A fresh worker also forgets what transforms keep between images, such as RTMDet's cached mosaic, so that
    nothing of the epoch before is missing. Loading in the main process (``num_workers=0``) keeps
    such transforms as they are, and a run with them resumes to another one.

    As in MMEngine, all ranks share one seed, unless ``randomness.diff_rank_seed`` is set.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        if hasattr(loop, 'dataloader_iterator'):
            loop.dataloader_iterator = _Reseeded(loop.dataloader_iterator, runner.seed)
            if runner.iter and hasattr(loop, 'multi_loaders'):
                runner.logger.warning(f'{type(loop).__name__} begins with the first batch again: the resumed run will '
                                      'be another one than the one that was interrupted')
            return
        extra = runner.iter - runner.epoch * len(loop.dataloader)
        if extra == len(loop.dataloader):  # saved by iteration at an epoch's end, before MMEngine counted it
            loop._epoch += 1
        elif extra:
            runner.logger.warning(
                f'Resumed after {runner.iter} iterations, which are not {runner.epoch} epochs of '
                f'{len(loop.dataloader)}: epoch {runner.epoch + 1} begins anew. Checkpoints at the ends of epochs '
                '(default_hooks.checkpoint.by_epoch=True), with as many images a step as before, resume exactly')

    def before_train_epoch(self, runner: Runner) -> None:
        seed(runner.seed, runner.epoch, 0)
        if hasattr(runner.train_loop, 'dataloader_iterator'):
            return  # has started its workers, once for all
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
    """Seeds Python, NumPy and torch with a mixture of whole numbers."""
    mixed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def start_worker(worker_id: int, original: partial | None, entropy: tuple[int, ...]) -> None:
    """Seeds a data worker after all that its config does at the start."""
    if original is not None:
        original(worker_id)
    seed(*entropy, worker_id)


def _original(worker_init_fn: partial | None) -> partial | None:
    """Returns what was there before this hook."""
    return worker_init_fn.keywords['original'] if getattr(worker_init_fn, 'func', None) is start_worker else (
        worker_init_fn)


class _Reseeded:
    """An iterator over batches, seeded before each; after a resume those of before are loaded again, to be exact."""

    def __init__(self, iterator: Iterator, base: int) -> None:
        self.iterator = iterator
        self.base = base
        self.count = 0

    def __next__(self) -> dict:
        seed(self.base, self.count, 2)
        self.count += 1
        return next(self.iterator)

    def skip_iter(self, iterations: int) -> None:
        """As newer MMEngines call it, which themselves would skip without loading."""
        for _ in range(iterations):
            next(self)
