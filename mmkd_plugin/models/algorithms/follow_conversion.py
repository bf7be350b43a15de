"""Moves recorders to the new modules after a conversion has replaced modules of a model."""
from mmrazor.models.task_modules import RecorderManager
from torch import nn


class FollowConversion:
    """Puts the hooks of recorders on modules that have replaced the recorded ones.

    After the model is built, ``Runner`` converts synchronised batch norm to plain batch norm if a single process
    trains, and the other way round for ``sync_bn='torch'``. The new modules do not have the hooks of the old ones.

    Args:
        model: the model with the recorded modules.
        recorders: recorders of this model.
    """

    def __init__(self, model: nn.Module, recorders: RecorderManager) -> None:
        self.recorders = list(recorders.recorders.values())
        self.modules = self._current(model)

    def __call__(self, model: nn.Module) -> list[str]:
        """Updates the hooks of replaced modules, and returns their names."""
        current = self._current(model)
        moved = [name for name, module in current.items() if module is not self.modules.get(name)]
        for recorder in self.recorders:
            if recorder.source in moved:
                recorder.initialize(model)
        self.modules = current
        return moved

    def _current(self, model: nn.Module) -> dict[str, nn.Module]:
        sources = {recorder.source for recorder in self.recorders if hasattr(recorder, 'forward_hook')}
        return {name: module for name, module in model.named_modules() if name in sources}
