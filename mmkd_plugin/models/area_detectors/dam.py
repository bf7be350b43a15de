"""Distinctive area detection module (DAM) of SoKD.

Letters: N images, C channels, (H, W) a level's map, L cells of all levels, h hidden channels.
"""
import math
import operator
from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from ...registry import MODELS
from ...utils import check_number, closest
from .areas import (
    REGIONS,
    Areas,
    Detection,
    Shapes,
    area_loss,
    areas_of,
    cells_of,
    count_areas,
    detection_loss,
    find_areas,
)
from .heatmap_anchor import attention_loss, attention_map, centernet_loss, centernet_targets

ANCHORS = ('boxes', 'attention', None)


class DetectionHead(BaseModule):
    """Heatmap, size and offset of a feature map, each by a 3x3 convolution, ReLU and a 1x1 convolution.

    All three read the same features, so their 3x3 convolutions are one, and it reads h channels that one
    1x1 convolution makes of the C, a factorisation at rank h. Multiply-adds per position, C = 256:

    ======================  =========================  =========
    three plain branches    27 C^2 + 5 C               1 770 752
    h = 64                  C h + 27 h^2 + 5 h           127 296
    h = 32 (default)        C h + 27 h^2 + 5 h            36 000
    ======================  =========================  =========

    For the 22 400 positions of a pyramid P3-P7 at 800 x 1344: 39.7, 2.9 and 0.8 G per image and network.

    With ``hidden_channels >= channels`` nothing is reduced and the head is the three plain branches.
    """

    def __init__(self, channels: int, hidden_channels: int = 32):
        super().__init__()
        hidden = min(hidden_channels, channels)
        self.reduce = nn.Conv2d(channels, hidden, 1) if hidden < channels else nn.Identity()
        self.spatial = nn.Conv2d(hidden, 3 * hidden, 3, padding=1)
        self.heat = nn.Conv1d(hidden, 1, 1)
        self.size = nn.Conv1d(hidden, 2, 1)
        self.offset = nn.Conv1d(hidden, 2, 1)
        nn.init.constant_(self.heat.bias, -math.log(9))  # sigmoid 0.1: objects are rare
        nn.init.constant_(self.size.bias, math.log(math.e**3 - 1))  # softplus 3: areas start as 3 x 3 cells

    def forward(self, *pyramids: Sequence[Tensor]) -> list[Detection]:
        """One detection per pyramid of (N, C, H, W), all in one batch from the reduction on."""
        x = torch.cat([
            self.spatial(torch.cat([self.reduce(feature) for feature in level])).flatten(2)
            for level in zip(*pyramids, strict=True)
        ], 2)  # (pyramids N, 3 h, L)
        heat, size, offset = x.relu().chunk(3, dim=1)
        branches = (
            self.heat(heat).float().squeeze(1),
            nn.functional.softplus(self.size(size).float()),
            self.offset(offset).float().sigmoid().clamp(max=1 - 2**-20),
        )
        sides = (branch.chunk(len(pyramids)) for branch in branches)
        return [Detection(*side) for side in zip(*sides, strict=True)]


@MODELS.register_module()
class DAM(BaseModule):
    """Finds where student and teacher look, and compares them there.

    [0] Shen, Huang, Zhu, Fan, Zhang, Student-Oriented Teacher Knowledge Refinement for Knowledge
    Distillation, arXiv 2409.18785, 2024.

    One detection head sees the adapted student features and the refined teacher features, of all levels.
    It learns to say the same of both (``L_D``), and its best ``num_areas`` boxes per level are where the
    features themselves must agree (``L_DA``). Areas are taken per level, not over the pyramid, because the
    terms compare one level's pair of features each, and no level, however faint its heatmap, is left out.

    Both terms are means that depend on neither resolution nor the number of levels, boxes or channels (see
    :func:`detection_loss` and :func:`area_loss`), where [0] writes plain sums. The weights of [0] are not
    published; 1000 and 1000, on mean-squared terms, are known from one CIFAR setting with a single
    map. The defaults of 1 put both terms on the scale of a mean-squared feature loss of weight 1.

    [0] has nothing that keeps the head from saying the same everywhere, which minimises ``L_D``. The anchor
    does; it supervises the head on the student and on the *unaugmented* teacher, as augmentation moves
    objects.

    The teacher's features are detached. ``L_D`` and the anchor train the head and, through it, the student
    and its adapter; ``L_DA`` trains the student and its adapter. No gradient passes through boxes.

    Args:
        channels: Of the features, the teacher's.
        num_areas: P, at most so many per level and image.
        region: Whose heatmap places the areas: 'mutual' (the product), 'student' or 'teacher'.
        anchor: 'boxes' (CenterNet targets, for detectors), 'attention' (the teacher's attention map, for
            classifiers) or None (the paper).
        hidden_channels: Of the head, see :class:`DetectionHead`.
        detect_loss_weight: Weight of ``L_D``.
        area_loss_weight: Weight of ``L_DA``. The paper's is not published; 3 did best of 1, 3 and 10 on the digits.
        anchor_loss_weight: Weight of the anchor, the mean of its values on student and teacher.
        max_cells: With 'boxes', the longest side in cells of a box on any level but the deepest.
        init_cfg: As in any MMEngine module.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self,
                 channels: int,
                 num_areas: int = 8,
                 region: str = 'mutual',
                 anchor: str | None = 'boxes',
                 hidden_channels: int = 32,
                 detect_loss_weight: float = 1.,
                 area_loss_weight: float = 3.,
                 anchor_loss_weight: float = 1.,
                 max_cells: float = 8.,
                 init_cfg: dict | list | None = None):
        super().__init__(init_cfg)
        for field, value, allowed in (('region', region, tuple(REGIONS)), ('anchor', anchor, ANCHORS)):
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
        hidden_channels = check_number('DAM.hidden_channels', hidden_channels, least=1, whole=True)
        self.head = DetectionHead(channels, hidden_channels)

    def forward(self,
                s_features: Sequence[Tensor],
                t_refined: Sequence[Tensor],
                t_features: Sequence[Tensor] | None = None,
                gt_boxes: Sequence[Tensor] | None = None,
                image_shape: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """The losses, float32 scalars, of features given per level, shallow to deep, (N, C, H, W) each.

        Args:
            s_features: The student's, adapted to the teacher's channels and sizes.
            t_refined: The teacher's, refined.
            t_features: The teacher's, unaugmented, for the anchor. None says that ``t_refined`` are.
            gt_boxes: For the anchor 'boxes', (n_i, 4) per image, x1 y1 x2 y2 in pixels of the padded input.
            image_shape: For the anchor 'boxes', (H, W) of the padded input.

        Returns:
            ``loss_dam_detect``, ``loss_dam_area`` and, unless the anchor is None, ``loss_dam_anchor``.

        Raises:
            ValueError: features do not match each other or ``channels``, or the anchor lacks its boxes.
        """
        self._check_features(s_features=s_features, t_refined=t_refined, t_features=t_features or t_refined)
        if self.anchor is None or t_features is not None and all(map(operator.is_, t_features, t_refined)):
            t_features = None  # not needed, or seen already
        t_refined = [t.detach() for t in t_refined]
        shapes = _shapes(s_features)
        plain = () if t_features is None else ([t.detach() for t in t_features], )
        student, teacher, *unaugmented = self.head(s_features, t_refined, *plain)
        with torch.autocast(s_features[0].device.type, enabled=False):
            _, counts = self._find(student, teacher, shapes)
            losses = dict(
                loss_dam_detect=self.detect_loss_weight * detection_loss(student, teacher, shapes),
                loss_dam_area=self.area_loss_weight * area_loss(s_features, t_refined, counts))
            if self.anchor is not None:
                t_features, = plain or (t_refined, )
                teacher, = unaugmented or (teacher, )
                losses['loss_dam_anchor'] = self.anchor_loss_weight * self._anchor_loss(
                    student, teacher, t_features, gt_boxes, image_shape)
        return losses

    def _find(self, student: Detection, teacher: Detection, shapes: Shapes) -> tuple[Areas, Tensor]:
        areas = find_areas(student, teacher, shapes, self.num_areas, self.region)
        return areas, count_areas(areas, shapes, self.num_areas)

    def _anchor_loss(self, student: Detection, teacher: Detection, t_features: Sequence[Tensor],
                     gt_boxes: Sequence[Tensor] | None, image_shape: tuple[int, int] | None) -> Tensor:
        shapes = _shapes(t_features)
        if self.anchor == 'attention':
            attention = torch.cat([attention_map(t).flatten(1) for t in t_features], 1)
            return sum(attention_loss(side, attention, shapes) for side in (student, teacher)) / 2
        images = len(t_features[0])
        if gt_boxes is None or image_shape is None or len(gt_boxes) != images:
            given = 'None' if gt_boxes is None else f'those of {len(gt_boxes)} images'
            raise ValueError(f"DAM with anchor='boxes' needs gt_boxes of {images} images and image_shape "
                             f'(H, W), got {given} and {image_shape}')
        device = t_features[0].device
        target = centernet_targets([boxes.detach().to(device) for boxes in gt_boxes], image_shape, shapes,
                                   self.max_cells)
        return (centernet_loss(student, target) + centernet_loss(teacher, target)) / 2

    @torch.no_grad()
    def detect(self, s_features: Sequence[Tensor], t_features: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """What DAM sees, per level, for pictures.

        Returns:
            ``s_heatmap`` and ``t_heatmap`` (N, H, W) in [0, 1]; ``boxes`` (N, P, 4), x1 y1 x2 y2 in cells;
            ``scores`` and ``valid`` (N, P); ``counts`` (N, H, W), the number of boxes over each cell.
        """
        self._check_features(s_features=s_features, t_features=t_features)
        shapes = _shapes(s_features)
        student, teacher = self.head(s_features, t_features)
        with torch.autocast(s_features[0].device.type, enabled=False):
            areas, counts = self._find(student, teacher, shapes)
        maps = dict(s_heatmap=student.heat.sigmoid(), t_heatmap=teacher.heat.sigmoid(), counts=counts)
        levels = [{} for _ in shapes]
        for name, value in maps.items():
            for level, part, shape in zip(levels, value.split(cells_of(shapes), 1), shapes, strict=True):
                level[name] = part.unflatten(1, shape)
        for name, value in areas._asdict().items():
            for level, part in zip(levels, value.split(areas_of(shapes, self.num_areas), 1), strict=True):
                level[name] = part
        return levels

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


def _shapes(features: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [tuple(feature.shape[2:]) for feature in features]
