"""Distinctive area detection module (DAM) of SoKD.

Letters: S networks, N images, C channels, (H, W) a level's map, V levels, L cells of all levels, P areas per level,
h hidden channels.
"""
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...registry import MODELS
from ...utils import check_dict, check_number, closest
from ..connectors import ConvAdapter
from ..levels import join, to_row
from .areas import (
    AREA_REDUCTIONS,
    Shapes,
    area_loss,
    cells_of,
    count_areas,
    detection_loss,
    find_areas,
)
from .heatmap_anchor import attention_loss, attention_map, centernet_loss, centernet_targets

ANCHORS = ('boxes', 'attention', None)

#: Networks whose heatmaps give the areas, as slices of the networks of DAM's head: teacher, student.
REGIONS = {'mutual': slice(0, 2), 'student': slice(1, 2), 'teacher': slice(0, 1)}


class DetectionHead(nn.Module):
    """Predicts heatmap, size and offset of a feature map, each by a 3x3 convolution, ReLU and a 1x1 convolution.

    The three branches share their input, so their 3x3 convolutions are computed as one. Before it, a 1x1 convolution
    reduces the C channels to h, which is a factorisation of rank h. Multiply-adds per position, C = 256:

    ======================  =========================  =========
    three plain branches    27 C^2 + 5 C               1 770 752
    h = 64                  C h + 27 h^2 + 5 h           127 296
    h = 32 (default)        C h + 27 h^2 + 5 h            36 000
    ======================  =========================  =========

    For the 22 400 positions of a pyramid P3-P7 at 800 x 1344: 39.7, 2.9 and 0.8 G per image and network.

    With ``hidden_channels >= channels``, there is no reduction, and the head is the three plain branches.
    """

    def __init__(self, channels: int, hidden_channels: int = 32):
        super().__init__()
        hidden = min(hidden_channels, channels)
        self.reduce = nn.Conv1d(channels, hidden, 1, bias=False) if hidden < channels else nn.Identity()
        self.spatial = nn.Conv2d(hidden, 3 * hidden, 3, padding=1)
        self.heat = nn.Conv1d(hidden, 1, 1)
        self.size = nn.Conv1d(hidden, 2, 1)
        self.offset = nn.Conv1d(hidden, 2, 1)
        nn.init.constant_(self.heat.bias, -math.log(9))  # sigmoid 0.1: objects are rare
        nn.init.constant_(self.size.bias, math.log(math.e**3 - 1))  # softplus 3: areas start as 3 x 3 cells

    def forward(self, rows: Sequence[Tensor], shapes: Shapes) -> Tensor:
        """Returns the raw outputs, float32 (S, N, 5, L), for the (N, C, L) features of S networks, in one batch.

        The five channels are the logit of the heatmap and width, height, x and y before
        :func:`~mmkd_plugin.models.area_detectors.decode`.
        """
        levels = zip(*(self.reduce(row).split(cells_of(shapes), 2) for row in rows), strict=True)
        x = join([
            self.spatial(join(level, 0).unflatten(2, shape)).flatten(2)
            for level, shape in zip(levels, shapes, strict=True)
        ], 2)  # (S N, 3 h, L)
        branches = zip((self.heat, self.size, self.offset), x.relu().chunk(3, dim=1), strict=True)
        raw = torch.cat([branch(hidden) for branch, hidden in branches], 1)
        return raw.float().view(len(rows), -1 if len(raw) else 0, *raw.shape[1:])


@MODELS.register_module()
class DAM(nn.Module):
    """Detects distinctive areas in the features of student and teacher, and compares the features there.

    [0] Shen, Huang, Zhu, Fan, Zhang, Student-Oriented Teacher Knowledge Refinement for Knowledge
    Distillation, arXiv 2409.18785, 2024.

    One detection head reads the adapted student features and the refined teacher features of all levels. ``L_D`` trains
    it to predict the same for both. ``L_DA`` compares the features in its best ``num_areas`` boxes per level. Areas are
    selected per level and not over the pyramid, because each term compares the features of one level. So levels with
    a weak heatmap also have areas.

    ``L_D`` compares the head's raw outputs instead of probabilities and sizes, see :func:`detection_loss`. Both terms
    are means that do not depend on the number of levels, boxes or channels, where [0] has plain sums. The weights of
    [0] are not published. Weights of 1000 and 1000, on mean-squared terms, are known from one CIFAR setting with a
    single map and ``area_reduction='map'``. The defaults give both terms the scale of a mean-squared feature loss of
    weight 1.

    In [0], a head with a constant output minimises ``L_D``. The anchor prevents this. It supervises the head on the
    student and on the *unaugmented* teacher, because augmentation moves objects.

    The teacher's features are detached. ``L_D`` and the anchor train the head and, through it, the student
    and its adapter. ``L_DA`` trains the student and its adapter. Boxes have no gradient.

    Args:
        channels: Channels of the features, which are the teacher's.
        in_channels: Channels of the student's features. DAM then has an adapter from these to ``channels``. If None,
            features must already have ``channels``.
        adapter: Other arguments of :class:`ConvAdapter`. Use ``dict(signed=False)`` if the teacher's features end in a
            ReLU.
        num_areas: P, the largest number of areas per level and image.
        region: The heatmap that gives the areas: 'mutual' (the product), 'student' or 'teacher'.
        anchor: 'boxes' (CenterNet targets, for detectors), 'attention' (the teacher's attention map, for
            classifiers) or None (the paper).
        area_reduction: Divisor of ``L_DA``, see :func:`area_loss`: the number of cells in areas ('area') or in the map
            ('map').
        hidden_channels: Hidden channels of the head, see :class:`DetectionHead`.
        detect_loss_weight: Weight of ``L_D``.
        area_loss_weight: Weight of ``L_DA``. The paper's is not published. Of 1, 3 and 10, 3 was best on the digits.
        anchor_loss_weight: Weight of the anchor, which is the mean of its values on student and teacher.
        max_cells: With 'boxes', the longest side in cells of a box on any level except the deepest.

    Example:
        >>> dam = DAM(channels=256, in_channels=64)
        >>> s_maps = [torch.randn(2, 64, 25, 42), torch.randn(2, 64, 13, 21)]
        >>> t_maps = [torch.randn(2, 256, 25, 42), torch.randn(2, 256, 13, 21)]
        >>> boxes = [torch.tensor([[20., 30., 90., 100.]]), torch.zeros(0, 4)]
        >>> losses = dam(dam.adapt(s_maps), t_maps, gt_boxes=boxes, image_shape=(200, 336))
        >>> list(losses)
        ['loss_dam_detect', 'loss_dam_area', 'loss_dam_anchor']

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self,
                 channels: int,
                 in_channels: int | None = None,
                 adapter: dict | None = None,
                 num_areas: int = 8,
                 region: str = 'mutual',
                 anchor: str | None = 'boxes',
                 area_reduction: str = 'area',
                 hidden_channels: int = 32,
                 detect_loss_weight: float = 1.,
                 area_loss_weight: float = 3.,
                 anchor_loss_weight: float = 1.,
                 max_cells: float = 8.):
        super().__init__()
        for field, value, allowed in (('region', region, tuple(REGIONS)), ('anchor', anchor, ANCHORS),
                                      ('area_reduction', area_reduction, AREA_REDUCTIONS)):
            if value not in allowed:
                raise ValueError(f'DAM.{field} must be one of {allowed}, got {value!r}; '
                                 f'{closest(value, filter(None, allowed))}')
        self.channels = check_number('DAM.channels', channels, least=1, whole=True)
        self.num_areas = check_number('DAM.num_areas', num_areas, least=1, whole=True)
        self.detect_loss_weight = check_number('DAM.detect_loss_weight', detect_loss_weight, least=0)
        self.area_loss_weight = check_number('DAM.area_loss_weight', area_loss_weight, least=0)
        self.anchor_loss_weight = check_number('DAM.anchor_loss_weight', anchor_loss_weight, least=0)
        self.max_cells = check_number('DAM.max_cells', max_cells, above=0)
        self.region = region
        self.anchor = anchor
        self.area_reduction = area_reduction
        hidden_channels = check_number('DAM.hidden_channels', hidden_channels, least=1, whole=True)
        self.adapter = self._build_adapter(in_channels, adapter)
        self.head = DetectionHead(channels, hidden_channels)

    def _build_adapter(self, in_channels: int | None, adapter: dict | None) -> ConvAdapter | None:
        adapter = check_dict('DAM.adapter', {} if adapter is None else adapter)
        if in_channels is None:
            if adapter:
                raise ValueError(f'DAM.adapter: DAM has no adapter without in_channels, got {adapter!r}. '
                                 'Give the student\'s in_channels too.')
            return None
        unknown = [key for key in adapter if key != 'signed']
        if unknown:
            raise ValueError(f'DAM.adapter: expected signed, got {unknown[0]!r}. Remove it.')
        in_channels = check_number('DAM.in_channels', in_channels, least=1, whole=True)
        return ConvAdapter(in_channels, self.channels, **adapter)

    def adapt(self, s_maps: Sequence[Tensor]) -> Sequence[Tensor]:
        """Maps the student's (N, in_channels, H, W) features, one per level, to the teacher's channels. Returns them
        unchanged if DAM has no adapter."""
        return s_maps if self.adapter is None else self.adapter(s_maps)

    def forward(self,
                s_features: Sequence[Tensor],
                t_refined: Sequence[Tensor],
                t_features: Sequence[Tensor] | None = None,
                gt_boxes: Sequence[Tensor] | None = None,
                image_shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Returns the losses, float32 scalars. Features are given per level, shallow to deep, each (N, C, H, W).

        Args:
            s_features: The student's features, adapted to the teacher's channels and sizes, see :meth:`adapt`.
            t_refined: The teacher's refined features.
            t_features: The teacher's unaugmented features, for the anchor. If None, or the same tensors as
                ``t_refined``, those are unaugmented, and the head runs once on them.
            gt_boxes: For the anchor 'boxes', (n_i, 4) per image, x1 y1 x2 y2 in pixels of the padded input.
            image_shape: For the anchor 'boxes', (H, W) of the padded input.

        Returns:
            ``loss_dam_detect``, ``loss_dam_area`` and, unless the anchor is None, ``loss_dam_anchor``.

        Raises:
            ValueError: shapes of features differ or do not have ``channels``, or the anchor has no boxes.
        """
        self._check_features(s_features=s_features, t_refined=t_refined, t_features=t_features or t_refined)
        networks = [t_refined, s_features]
        if not (self.anchor is None or t_features is None or all(map(operator.is_, t_features, t_refined))):
            networks.append(t_features)
        shapes = _shapes(s_features)
        rows = [to_row(maps) if maps is s_features else to_row(maps).detach() for maps in networks]
        raw = self.head(rows, shapes)
        losses = self._comparison(raw, rows, shapes)
        if self.anchor is not None:
            both, plain = (raw, rows[0]) if len(rows) == 2 else (raw[1:], rows[2])
            losses['loss_dam_anchor'] = self._anchor_loss(both, plain, shapes, gt_boxes, image_shape)
        return losses

    def compare(self, s_features: Sequence[Tensor], t_refined: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns only ``loss_dam_detect`` and ``loss_dam_area``, see :meth:`forward`."""
        self._check_features(s_features=s_features, t_refined=t_refined)
        rows, shapes = [to_row(t_refined).detach(), to_row(s_features)], _shapes(s_features)
        return self._comparison(self.head(rows, shapes), rows, shapes)

    def _comparison(self, raw: Tensor, rows: Sequence[Tensor], shapes: Shapes) -> dict[str, Tensor]:
        t_raw, s_raw, *_ = raw.unbind()  # float32 from here on, because autocast does not change the operations below
        counts = count_areas(find_areas(raw[REGIONS[self.region]], shapes, self.num_areas), shapes)
        return dict(
            loss_dam_detect=detection_loss(s_raw, t_raw, shapes, self.detect_loss_weight),
            loss_dam_area=area_loss(rows[1], rows[0], counts, shapes, self.area_reduction, self.area_loss_weight))

    def _anchor_loss(self, raw: Tensor, t_row: Tensor, shapes: Shapes, gt_boxes: Sequence[Tensor] | None,
                     image_shape: tuple[int, int] | None) -> Tensor:
        if self.anchor == 'attention':
            return attention_loss(raw, attention_map(t_row, shapes), shapes, self.anchor_loss_weight)
        images = raw.shape[1]
        if gt_boxes is None or image_shape is None or len(gt_boxes) != images:
            given = 'None' if gt_boxes is None else f'boxes of {len(gt_boxes)} images'
            raise ValueError(f"DAM with anchor='boxes' needs gt_boxes of {images} images and image_shape "
                             f'(H, W), got {given} and {image_shape}')
        target = centernet_targets([boxes.to(raw.device) for boxes in gt_boxes], image_shape, shapes, raw.device,
                                   self.max_cells)
        return centernet_loss(raw, target, shapes, factor=self.anchor_loss_weight)

    @torch.no_grad()
    def detect(self, s_features: Sequence[Tensor], t_features: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Returns the detections per level, for pictures.

        Returns:
            ``s_heatmap`` and ``t_heatmap`` (N, H, W) in [0, 1]; ``boxes`` (N, P, 4), x1 y1 x2 y2 in cells;
            ``scores`` and ``valid`` (N, P); ``counts`` (N, H, W), the number of boxes over each cell.
        """
        self._check_features(s_features=s_features, t_features=t_features)
        shapes = _shapes(s_features)
        raw = self.head([to_row(t_features), to_row(s_features)], shapes)
        areas = find_areas(raw[REGIONS[self.region]], shapes, self.num_areas)
        counts = count_areas(areas, shapes)
        t_heat, s_heat = (heat.sigmoid().split(cells_of(shapes), 1) for heat in raw[:, :, 0])
        return [
            dict(s_heatmap=s_heat[i].unflatten(1, (h, w)),
                 t_heatmap=t_heat[i].unflatten(1, (h, w)),
                 counts=counts[:, i, :h, :w].float(),
                 boxes=areas.boxes[:, i],
                 scores=areas.log_scores[:, i].exp(),
                 valid=areas.log_scores[:, i] > -torch.inf) for i, (h, w) in enumerate(shapes)
        ]

    def _check_features(self, **features: Sequence[Tensor]) -> None:
        for name, levels in features.items():
            if isinstance(levels, Tensor) or not levels:
                given = tuple(levels.shape) if isinstance(levels, Tensor) else levels
                raise ValueError(f'DAM expects {name} as a list of (N, {self.channels}, H, W) tensors, one '
                                 f'per level, got {given!r}')
        shapes = {name: [tuple(level.shape) for level in levels] for name, levels in features.items()}
        first, *others = shapes.values()
        if any(other != first for other in others) or any(
                len(shape) != 4 or shape[1] != self.channels for shape in first):
            listed = ', '.join(f'{name} {shape}' for name, shape in shapes.items())
            raise ValueError(f'DAM expects features of equal shapes (N, {self.channels}, H, W) per level, '
                             f'got {listed}')


def _shapes(features: Sequence[Tensor]) -> Shapes:
    return tuple(tuple(feature.shape[2:]) for feature in features)
