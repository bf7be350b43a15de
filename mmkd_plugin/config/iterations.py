"""Check of a config whose training loop counts iterations."""
from mmengine.config import Config


def check_counts_iterations(cfg: Config) -> None:
    """Checks that loss schedules, checkpoints and learning rates count iterations, as the training loop does.

    MMEngine would never call what counts epochs: the learning rate would stay constant, and the only checkpoint would
    be the last one.

    Raises:
        ValueError: one of them counts epochs.
    """
    for name, entries in (cfg.model.get('loss_schedules') or {}).items():
        if any(entry.get('by_epoch') for entry in _list(entries)):
            raise ValueError(f'model.loss_schedules.{name}: by_epoch=True, but train_cfg counts iterations. Give begin '
                             'and end in iterations')
    checkpoint = (cfg.get('default_hooks') or {}).get('checkpoint')
    if checkpoint and checkpoint.get('by_epoch', True):
        raise ValueError('default_hooks.checkpoint: counts epochs, but train_cfg counts iterations, so a run that '
                         'stops could not be resumed. Set by_epoch=False, and interval to a number of iterations')
    for index, scheduler in enumerate(_list(cfg.get('param_scheduler') or [])):
        kind = str(scheduler.get('type'))
        by_epoch = scheduler.get('by_epoch', True) and not scheduler.get('convert_to_iter_based')
        if 'type' in scheduler and 'ReduceOnPlateau' not in kind and by_epoch:
            raise ValueError(f'param_scheduler.{index}: {kind} counts epochs, but train_cfg counts iterations, so it '
                             'would never act. Set by_epoch=False, and its arguments to numbers of iterations')


def _list(entries: dict | list | tuple) -> list | tuple:
    return entries if isinstance(entries, (list, tuple)) else [entries]
