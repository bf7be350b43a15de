"""Weights of distillation losses that change during training."""
import math
from fnmatch import fnmatchcase

from mmengine.logging import MessageHub

from ...utils import check_dict, check_number, closest

_SHAPES = {
    'constant': lambda t: 1.0,
    'linear': lambda t: t,
    'cosine': lambda t: (1 - math.cos(math.pi * t)) / 2,
}


class LossSchedule:
    """A factor that changes from ``start_factor`` at ``begin`` to ``end_factor`` at ``end``.

    It depends only on the iteration, which MMEngine restores on resume, so it has no state. Outside a ``Runner``, the
    iteration is 0.

    Args:
        type: ``'linear'`` or ``'cosine'``; ``'constant'`` is ``end_factor`` from the beginning.
        start_factor: factor until ``begin``, >= 0. Use 0 for a warm-up.
        end_factor: factor from ``end`` on, >= 0. Use 0 for a decay to zero.
        begin: start of the change, >= 0.
        end: end of the change, > ``begin``; None for the end of training.
        by_epoch: whether ``begin`` and ``end`` are in epochs instead of iterations.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self,
                 type: str = 'linear',
                 start_factor: float = 1.0,
                 end_factor: float = 1.0,
                 begin: int = 0,
                 end: int | None = None,
                 by_epoch: bool = False) -> None:
        if type not in _SHAPES:
            raise ValueError(f'loss_schedules: no type {type!r}; {closest(type, _SHAPES)}')
        self.shape = _SHAPES[type]
        self.start_factor = check_number('loss_schedules.start_factor', start_factor, least=0)
        self.end_factor = check_number('loss_schedules.end_factor', end_factor, least=0)
        self.begin = check_number('loss_schedules.begin', begin, least=0)
        self.end = end if end is None else check_number('loss_schedules.end', end, above=begin)
        self.by_epoch = by_epoch

    def __call__(self) -> float:
        """Returns the factor at the current iteration."""
        hub = MessageHub.get_current_instance()
        now, length = hub.get_info('iter', 0), hub.get_info('max_iters', 1)
        if self.by_epoch:
            epochs = hub.get_info('max_epochs', 1)
            if epochs == 1 and max(self.begin, self.end or 0) > 1:
                raise ValueError('loss_schedules: by_epoch=True, but the training counts only iterations. Give begin '
                                 'and end in iterations')
            now, length = now * epochs / length, epochs
        end = self.end or max(length, self.begin + 1)
        progress = self.shape(min(max((now - self.begin) / (end - self.begin), 0.0), 1.0))
        return self.start_factor + (self.end_factor - self.start_factor) * progress


def build_schedules(config: dict[str, dict | list[dict]], losses: list[str]) -> dict[str, list[LossSchedule]]:
    """Returns the schedules of each loss. Keys of ``config`` are names of losses or patterns such as ``loss_amd*``.

    Several schedules of one loss are multiplied, such as a warm-up and a later decay.
    """
    schedules: dict[str, list[LossSchedule]] = {}
    for pattern, entries in check_dict('loss_schedules', config).items():
        entries = entries if isinstance(entries, (list, tuple)) else [entries]
        matching = [loss for loss in losses if fnmatchcase(loss, pattern)]
        if not matching:
            raise ValueError(f'loss_schedules: no distillation loss is named {pattern!r}; {closest(pattern, losses)}')
        for loss in matching:
            for entry in entries:
                field = f'loss_schedules[{pattern!r}]'
                try:
                    schedule = LossSchedule(**check_dict(field, entry))
                except TypeError as error:  # an unknown argument
                    raise ValueError(f'{field}: {error}') from error
                schedules.setdefault(loss, []).append(schedule)
    return schedules
