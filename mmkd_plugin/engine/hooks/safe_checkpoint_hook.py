"""Hook that writes checkpoints completely or not at all."""
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ...registry import HOOKS


class AtomicBackend(LocalBackend):
    """MMEngine's local storage, but a file is written completely or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f'{path.name}.unfinished')
        try:
            with open(unfinished, 'wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


register_backend('mmkd_plugin.atomic', AtomicBackend)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook``, but no checkpoint is lost if saving is interrupted or the disk is full.

    A checkpoint gets its name when it is complete. Checkpoints that ``max_keep_ckpts`` and ``save_best`` no longer keep
    are deleted after the new one is complete, so the disk needs space for one more. MMEngine deletes them before. The
    arguments are those of ``CheckpointHook``. On a storage other than a local disk, only the order of deletion differs.
    """

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        if isinstance(self.file_backend, LocalBackend) and self.backend_args is None and self.file_client_args is None:
            self.backend_args = dict(backend='mmkd_plugin.atomic')

    def after_train_epoch(self, runner: Runner) -> None:
        with self._remove_afterwards():
            super().after_train_epoch(runner)

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        with self._remove_afterwards():
            super().after_train_iter(runner, *args, **kwargs)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        with self._remove_afterwards():
            super().after_val_epoch(runner, metrics)

    @contextmanager
    def _remove_afterwards(self) -> Iterator[None]:
        remove, given_up = self.file_backend.remove, []
        self.file_backend.remove = given_up.append
        try:
            yield
        finally:
            self.file_backend.remove = remove
        current = {self.last_ckpt, getattr(self, 'best_ckpt_path', None),
                   *getattr(self, 'best_ckpt_path_dict', {}).values()}
        for path in given_up:
            if path not in current and Path(path).parent == Path(self.out_dir):  # not those of the resumed run
                remove(path)
