"""SoKD around a distiller of feature maps."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...registry import MODELS
from ...utils import check_dict
from ..area_detectors import DAM
from ..connectors import ConvAdapter
from ..refiners import DAFA
from .feature_distiller import FeatureDistiller, exact_zero, one_width


@MODELS.register_module()
class SoKDDistiller(FeatureDistiller):
    """DAFA and DAM of SoKD [0] around a base distiller, which sees the refined teacher instead of the teacher.

    [0] Shen, Huang, Zhu, Fan, Zhang, *Student-Oriented Teacher Knowledge Refinement for Knowledge
    Distillation*, arXiv 2409.18785 (2024).

    The student's objective is ``L_task + L_base(F_S, s(F_T)) + lambda L_D + beta L_DA``; the policy ``chi`` of the
    augmentation ``s`` minimises ``L_aug = 1/2 mean (s(F_T) - sg Phi(F_S))^2``. With ``dafa=None, dam=None`` it is the
    base distiller. Losses beside those of :class:`FeatureDistiller`:

    =======================================  ==========================================================
    ``loss_dam_detect``, ``loss_dam_area``,  DAM's, followed by ``_LAYER`` where ``layers`` has several
    ``loss_dam_anchor``
    ``loss_aug``                             the policy's; its gradient reaches DAFA alone
    ``loss_align_LAYER``                     see below
    =======================================  ==========================================================

    ``Phi``, through which the policy sees the student, is DAM's adapter. Without DAM it is the base's connector if that
    is ``aligned``; otherwise it is a :class:`ConvAdapter` of its own, which ``loss_align_LAYER`` trains: the mean
    squared difference of ``Phi(F_S)`` and the teacher that is not refined, with ``F_S`` detached. This loss ends with
    the search.

    The policy needs an optimiser of its own, :class:`~mmkd_plugin.engine.PolicyOptimWrapperConstructor`, and
    :class:`~mmkd_plugin.engine.FreezePolicyHook` ends its search.

    Args:
        layers, base, loss_weight: as in :class:`FeatureDistiller`.
        dafa: arguments of :class:`DAFA`; None: the teacher is not refined.
        dam: arguments of :class:`DAM` without channels; None: no areas. ``adapter`` has arguments of
            :class:`ConvAdapter`, or is ``'base'``: then DAM reads the aligned connector of the first base.
        kwargs: recorders, connectors and losses, as in MMRazor's ``ConfigurableDistiller``.

    Raises:
        ValueError: the arguments contradict each other or, when the models are there, their features.
    """

    def __init__(self,
                 layers: Sequence[str | Sequence[str]],
                 base: str | dict | Sequence[str | dict] | None = 'fitnet',
                 loss_weight: float | Sequence[float] | None = None,
                 dafa: dict | None = {},  # noqa: B006  never changed
                 dam: dict | None = {},  # noqa: B006
                 **kwargs) -> None:
        if kwargs.keys() & {'connect', 'refine', 'adapter'}:
            raise ValueError('SoKDDistiller: connect, refine and adapter were arguments before version 0.2. The base '
                             "has the connector now: base='fitnet' or base=dict(loss=..., connector=...); dam has the "
                             'adapter: dam=dict(adapter=dict(signed=False))')
        super().__init__(layers, base, loss_weight, **kwargs)
        for field, value in (('dafa', dafa), ('dam', dam)):
            check_dict(field, {} if value is None else value)
        self.dam = None if dam is None else dict(dam)
        self.dafa = None if dafa is None else DAFA(**dafa)
        self.dams = nn.ModuleDict()
        self.aligners = nn.ModuleDict()
        self._refined: dict[str, list[Tensor]] = {}  # by layer, within a step
        self._image: tuple[list[Tensor], tuple[int, int]] | None = None  # boxes and size, for DAM's anchor

    def prepare_from_student(self, model: nn.Module) -> None:
        from mmdet.models.detectors import BaseDetector
        if self.dam is not None and self.dam.get('anchor', 'boxes') == 'boxes' and not isinstance(model, BaseDetector):
            raise ValueError("dam.anchor: 'boxes' needs the boxes of a detector, but the student is a "
                             f"{type(model).__name__}. Use anchor='attention'")
        super().prepare_from_student(model)

    def wire(self, maps: dict[str, tuple[list[Tensor], list[Tensor]]]) -> None:
        super().wire(maps)
        self._aligned = next((name for name, base in self.bases if base['aligned'] and base['connector']), None)
        for layer, (s_maps, t_maps) in maps.items():
            name = layer.replace('.', '_')
            channels = one_width(layer, 'teacher', t_maps)
            if self.dam is not None:
                self.dams[name] = self._build_dam(layer, s_maps, channels)
            elif self.dafa is not None and self._aligned is None:
                self.aligners[name] = ConvAdapter(one_width(layer, 'student', s_maps), channels)

    def _build_dam(self, layer: str, s_maps: list[Tensor], channels: int) -> DAM:
        given = dict(self.dam)
        for key in ('channels', 'in_channels'):
            if key in given:
                raise ValueError(f'dam.{key}: the features have it. Leave it out')
        if given.get('adapter') != 'base':
            return DAM(channels, one_width(layer, 'student', s_maps), **given)
        if self._aligned is None:
            raise ValueError("dam.adapter: 'base' shares the base's connector, but no base has one that gives the "
                             "teacher's channels. Leave adapter out: DAM has one of its own then")
        given.pop('adapter')
        return DAM(channels, **given)

    @property
    def loss_names(self) -> list[str]:
        """The names of all losses."""
        names = super().loss_names
        for name, dam in self.dams.items():
            parts = ('detect', 'area') if dam.anchor is None else ('detect', 'area', 'anchor')
            names += [f'loss_dam_{part}{self._suffix(name)}' for part in parts]
        return names + [f'loss_align_{name}' for name in self.aligners] + ['loss_aug'] * (self.dafa is not None)

    def _suffix(self, name: str) -> str:
        return f'_{name}' if len(self.dams) > 1 else ''

    def weight_of(self, name: str) -> float:
        if name in self.distill_losses or not name.startswith('loss_dam_'):
            frozen = self.dafa is not None and self.dafa.frozen
            return 0.0 if frozen and name.startswith(('loss_align', 'loss_aug')) else super().weight_of(name)
        return getattr(next(iter(self.dams.values())), f'{name.split("_")[2]}_loss_weight')

    def prepare_batch(self, batch_inputs: Tensor, data_samples: list | None) -> None:
        """Takes from the batch what DAM's anchor 'boxes' needs."""
        if any(dam.anchor == 'boxes' for dam in self.dams.values()):
            boxes = [sample.gt_instances.bboxes for sample in data_samples]
            self._image = [getattr(each, 'tensor', each) for each in boxes], tuple(batch_inputs.shape[-2:])

    def read(self, recorder: str, from_student: bool, record_idx: int, data_idx: int | None) -> Any:
        """Of the teacher, the refined map."""
        if from_student or recorder not in self._refined:
            return super().read(recorder, from_student, record_idx, data_idx)
        return self._refined[recorder][self._places[False][recorder].index((record_idx, data_idx))]

    @contextmanager
    def step(self) -> Iterator[None]:
        with super().step():
            try:
                yield
            finally:
                self._refined, self._image = {}, None

    def compute_distill_losses(self, search: bool = True) -> dict[str, Tensor]:
        """Returns the losses of what is recorded; without ``loss_aug`` unless ``search``."""
        with self.step():
            t_maps = {layer: self.maps(layer, False) for layer in self.layers}
            self._refine(t_maps)
            losses = super().compute_distill_losses()
            adapted = self._adapted()
            boxes, shape = self._image or (None, None)
            for layer in self.layers:
                name = layer.replace('.', '_')
                if name in self.dams:
                    parts = self.dams[name](adapted[layer], self._refined.get(layer, t_maps[layer]), t_maps[layer],
                                            boxes, shape)
                    losses.update({part + self._suffix(name): loss for part, loss in parts.items()})
                elif name in self.aligners:
                    losses[f'loss_align_{name}'] = self._align(name, adapted.get(layer), t_maps[layer])
            if search and self.dafa is not None and self.dafa.training:
                losses['loss_aug'] = self._policy_loss(t_maps, adapted)
        return losses

    def compute_policy_loss(self) -> Tensor:
        """Returns ``loss_aug`` alone, of what is recorded: of a batch that only the policy learns from."""
        with self.step(), torch.no_grad():
            adapted = self._adapted()
        return self._policy_loss({layer: self.maps(layer, False) for layer in self.layers}, adapted)

    def _policy_loss(self, t_maps: dict[str, list[Tensor]], adapted: dict[str, list[Tensor]]) -> Tensor:
        return self.dafa.policy_loss([x for maps in t_maps.values() for x in maps],
                                     [x for maps in adapted.values() for x in maps])

    def _refine(self, t_maps: dict[str, list[Tensor]]) -> None:
        """Refines the maps of all layers by one draw, for :meth:`read`."""
        if self.dafa is not None:
            refined = iter(self.dafa([x for maps in t_maps.values() for x in maps]))
            self._refined = {layer: [next(refined) for _ in maps] for layer, maps in t_maps.items()}

    def _adapted(self) -> dict[str, list[Tensor]]:
        """Returns ``Phi(F_S)`` by layer; nothing where it is not needed any more."""
        if self.dams and self.dam.get('adapter') != 'base':
            return {layer: self.dams[layer.replace('.', '_')].adapt(self.maps(layer, True)) for layer in self.layers}
        if self.dafa is None and not self.dams or self.dafa is not None and self.dafa.frozen and not self.dams:
            return {}
        if self.aligners:
            return {layer: self.aligners[layer.replace('.', '_')]([x.detach() for x in self.maps(layer, True)])
                    for layer in self.layers}
        first = next(base['inputs'] for name, base in self.bases if name == self._aligned)
        argument = next(key for key, role in first.items() if role == 'student')
        return {layer: [self.get_record(**self.loss_forward_mappings[loss][argument])
                        for loss in self._losses_at(layer)] for layer in self.layers}

    def _losses_at(self, layer: str) -> list[str]:
        """Returns the losses of the aligned base at a layer, a map each."""
        return [name for name, inputs in self.loss_forward_mappings.items() if name.startswith(f'loss_{self._aligned}_')
                and any(entry['recorder'] == layer and entry['from_student'] for entry in inputs.values())]

    def _align(self, name: str, s_maps: list[Tensor] | None, t_maps: list[Tensor]) -> Tensor:
        if not s_maps:
            return exact_zero(self.aligners[name])
        return sum(F.mse_loss(s.float(), t.float()) for s, t in zip(s_maps, t_maps)) / len(s_maps)

    @torch.no_grad()
    def detect_areas(self, layer: str) -> list[dict[str, Tensor]] | None:
        """Returns what DAM sees in what is recorded of a layer, see :meth:`DAM.detect`; None without DAM."""
        if not self.dams:
            return None
        with self.step():
            adapted = self._adapted()[layer]
        return self.dams[layer.replace('.', '_')].detect(adapted, self.maps(layer, False))
