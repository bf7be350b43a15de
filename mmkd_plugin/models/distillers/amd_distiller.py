"""Angular margin-based distillation at any layers."""
from collections.abc import Sequence

from ...registry import MODELS
from ...utils import check_dict
from .feature_distiller import FeatureDistiller


@MODELS.register_module()
class AMDDistiller(FeatureDistiller):
    """:class:`FeatureDistiller` with :class:`AMDLoss` at each map of each layer.

    Source: Jeon, Choi, Shukla, Turaga, *Leveraging Angular Distributions for
    Improved Knowledge Distillation*, arXiv 2302.14130. The losses are
    ``loss_amd_LAYER`` with ``_`` for dots, and ``_0``, ``_1``, ... where a layer
    has several maps. All maps are computed at once.

    Args:
        layers: as in :class:`FeatureDistiller`. ``['neck']`` is every pyramid level.
        amd: arguments of :class:`AMDLoss`, the same at every map. For a detector
            use ``dict(scale_free=True, local_grid=2)``.
        kwargs: further recorders, connectors and losses, as in MMRazor's ``ConfigurableDistiller``.

    Raises:
        ValueError: see :class:`FeatureDistiller` and :class:`AMDLoss`.
    """

    def __init__(self, layers: Sequence[str | Sequence[str]], amd: dict | None = None, **kwargs) -> None:
        amd = check_dict('amd', {} if amd is None else amd)
        super().__init__(layers, base=dict(preset='amd', loss=dict(amd), weight=1.0), **kwargs)
