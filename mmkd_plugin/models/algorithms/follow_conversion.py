"""Keeps recorders on the modules of a model, when a conversion puts others in their places."""
from mmrazor.models.task_modules import RecorderManager
from torch import nn


class FollowConversion:
    """Puts the hooks of recorders on the modules that have taken the place of those that were recorded.

    ``Runner`` turns synchronised batch norm into plain one where a single process trains, and the other way round for
    ``sync_bn='torch'``, after the model is built: by new modules, which know nothing of the hooks of the old ones.

    Args:
        model: whose modules are recorded.
        recorders: of that model.
    """

    def __init__(self, model: nn.Module, recorders: RecorderManager) -> None:
        self.recorders = list(recorders.recorders.values())
        self.modules = self._current(model)

    def __call__(self, model: nn.Module) -> list[str]:
        """Looks for modules that have been replaced; returns their names."""
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
