"""Angular margin-based distillation at any layers."""
from collections.abc import Sequence

from torch import Tensor

from ...registry import MODELS
from ...utils import check_dict
from .layer_distiller import LayerDistiller, map_name


@MODELS.register_module()
class AMDDistiller(LayerDistiller):
    """One :class:`AMDLoss` at each map of each layer, beside any other distillation losses.

    Source: Jeon, Choi, Shukla, Turaga, *Leveraging Angular Distributions for
    Improved Knowledge Distillation*, arXiv 2302.14130. The losses are named
    ``loss_amd_LAYER`` with ``_`` for dots, and ``_0``, ``_1``, ... where a layer
    puts out several maps.

    Args:
        layers: as in :class:`LayerDistiller`. ``['neck']`` is every pyramid level.
        amd: arguments of :class:`AMDLoss`, the same at every map. A detector
            wants ``dict(scale_free=True, local_grid=2)``.
        kwargs: further recorders, connectors and losses, as in MMRazor's ``ConfigurableDistiller``.

    Raises:
        ValueError: see :class:`LayerDistiller` and :class:`AMDLoss`.
    """

    def __init__(self, layers: Sequence[str | Sequence[str]], amd: dict | None = None, **kwargs) -> None:
        super().__init__(layers or [], **kwargs)
        self.amd = dict(check_dict('amd', {} if amd is None else amd), type='mmkd_plugin.AMDLoss')

    def wire(self, maps: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> None:
        for layer, (s_maps, _) in zip(self.layers, maps):
            for level in range(len(s_maps)):
                self.add_loss(f'loss_amd_{map_name(layer, level, len(s_maps))}', self.amd,
                              s_feature=self.record(layer, level, True), t_feature=self.record(layer, level, False))
