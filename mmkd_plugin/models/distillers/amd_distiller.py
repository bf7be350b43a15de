"""The distiller of angular margin-based distillation."""
from collections.abc import Sequence

from ...registry import MODELS
from ...utils import check_dict
from .feature_distiller import FeatureDistiller


@MODELS.register_module()
class AMDDistiller(FeatureDistiller):
    """:class:`FeatureDistiller` with :class:`AMDLoss` for each map of each layer.

    Source: Jeon, Choi, Shukla, Turaga, *Leveraging Angular Distributions for Improved Knowledge Distillation*,
    arXiv 2302.14130. The losses are ``loss_amd_LAYER`` with ``_`` for dots, followed by ``_0``, ``_1``, ... if a layer
    has several maps. One call computes the losses of all maps.

    Args:
        layers: as in :class:`FeatureDistiller`. ``['neck']`` is all pyramid levels.
        amd: arguments of :class:`AMDLoss`, the same for all maps. For a detector, use
            ``dict(scale_free=True, local_grid=2)``.
        kwargs: further recorders, connectors and losses, as in MMRazor's ``ConfigurableDistiller``.

    Raises:
        ValueError: see :class:`FeatureDistiller` and :class:`AMDLoss`.
    """

    def __init__(self, layers: Sequence[str | Sequence[str]], amd: dict | None = None, **kwargs) -> None:
        amd = check_dict('amd', {} if amd is None else amd)
        super().__init__(layers, base=dict(preset='amd', loss=dict(amd), weight=1.0), **kwargs)
