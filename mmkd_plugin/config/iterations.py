"""Check of a config whose training loop counts iterations."""
from mmengine.config import Config

from ..utils import type_name


def check_counts_iterations(cfg: Config) -> None:
    """Checks that loss schedules, checkpoints and learning rates count iterations, as the training loop does.

    With such a loop, MMEngine never steps a scheduler that counts epochs, and a checkpoint hook that counts epochs
    writes the last checkpoint only.

    Raises:
        ValueError: one of them counts epochs.
    """
    for name, entries in (cfg.model.get('loss_schedules') or {}).items():
        if any(entry.get('by_epoch') for entry in _list(entries)):
            raise ValueError(f'model.loss_schedules.{name}: by_epoch=True, but train_cfg counts iterations. Give begin '
                             'and end in iterations')
    checkpoint = (cfg.get('default_hooks') or {}).get('checkpoint', {})  # without an entry, it is MMEngine's
    if checkpoint is not None and type_name(checkpoint.get('type', 'CheckpointHook')) in (
            'CheckpointHook', 'SafeCheckpointHook') and checkpoint.get('by_epoch', True):
        raise ValueError('default_hooks.checkpoint: counts epochs, but train_cfg counts iterations, so a run that '
                         'stops could not be resumed. Set by_epoch=False, and interval to a number of iterations')
    schedulers = cfg.get('param_scheduler') or []
    several = isinstance(schedulers, dict) and 'type' not in schedulers  # by the name of the optimizer
    for name, entries in (schedulers.items() if several else [('', schedulers)]):
        for index, scheduler in enumerate(_list(entries)):
            kind = type_name(scheduler['type'])
            by_epoch = scheduler.get('by_epoch', True) and not scheduler.get('convert_to_iter_based')
            field = '.'.join(filter(None, ('param_scheduler', name, str(index))))
            if 'ReduceOnPlateau' not in kind and by_epoch:
                raise ValueError(f'{field}: {kind} counts epochs, but train_cfg counts iterations, so it would never '
                                 'act. Set by_epoch=False, and its arguments to numbers of iterations')
            if scheduler.get('convert_to_iter_based') and 'end' not in scheduler:
                raise ValueError(f'{field}: {kind} has no end, and train_cfg counts iterations, so it would end after '
                                 'the first epoch. Set end to a number of epochs')


def _list(entries: dict | list | tuple) -> list | tuple:
    return entries if isinstance(entries, (list, tuple)) else [entries]
