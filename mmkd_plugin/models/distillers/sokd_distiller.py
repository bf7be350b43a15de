"""SoKD around a distiller of feature maps."""
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...registry import MODELS
from ...utils import check_dict
from ..area_detectors import DAM
from ..connectors import ConvAdapter
from ..recording import keep_statistics
from ..refiners import DAFA
from ..refiners.agreement import agreement_score
from .feature_distiller import FeatureDistiller, exact_zero, one_width


class _Search(NamedTuple):
    """What the search of a step reads after its backward."""
    maps: dict[tuple[str, bool], list[Tensor]]  # by layer and whether of the student, detached
    whole: list[Tensor | None]  # gradients at the student's maps of the last layer
    distilled: list[Tensor | None]  # the part of them that comes from the distillation


@MODELS.register_module()
class SoKDDistiller(FeatureDistiller):
    """DAFA and DAM of SoKD [0] around a base distiller, which sees the refined teacher instead of the teacher.

    [0] Shen, Huang, Zhu, Fan, Zhang, *Student-Oriented Teacher Knowledge Refinement for Knowledge
    Distillation*, arXiv 2409.18785 (2024).

    The student's objective is ``L_task + L_base(F_S, s(F_T)) + lambda L_D + beta L_DA``; the policy ``chi`` of the
    augmentation ``s`` minimises ``L_aug = 1/2 mean (s(F_T) - sg Phi(F_S))^2``, or with ``dafa=dict(objective=
    'agreement')`` maximises how far the distillation's gradient points where the task's points, see
    :meth:`search_policy`. With ``dafa=None, dam=None`` it is the
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
                 loss_weight: float | str | Sequence[float | str] | None = None,
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
        self._given: dict[tuple[str, bool], list[Tensor]] = {}  # features in place of the recorded maps, in a step
        self._image: tuple[list[Tensor], tuple[int, int]] | None = None  # boxes and size, for DAM's anchor
        self._search: _Search | None = None  # from the losses to the search after the backward

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
        if name == 'loss_aug':
            return float(self.dafa.searching and self.dafa.objective == 'similarity')
        if name.startswith('loss_align_'):
            return float(not self.dafa.frozen)
        if name in self.distill_losses or not name.startswith('loss_dam_'):
            return super().weight_of(name)
        return getattr(next(iter(self.dams.values())), f'{name.split("_")[2]}_loss_weight')

    def prepare_batch(self, batch_inputs: Tensor, data_samples: list | None) -> None:
        """Takes from the batch what DAM's anchor 'boxes' needs."""
        if any(dam.anchor == 'boxes' for dam in self.dams.values()):
            boxes = [sample.gt_instances.bboxes for sample in data_samples]
            self._image = [getattr(each, 'tensor', each) for each in boxes], tuple(batch_inputs.shape[-2:])

    def features(self, layer: str, from_student: bool) -> list[Tensor]:
        """Of the teacher, the refined maps."""
        return self._given.get((layer, from_student)) or super().features(layer, from_student)

    @contextmanager
    def step(self) -> Iterator[None]:
        with super().step():
            try:
                yield
            finally:
                self._given, self._image = {}, None

    def compute_distill_losses(self, search: bool = True) -> dict[str, Tensor]:
        """Returns the losses of what is recorded; without ``loss_aug`` unless ``search``."""
        with self.step():
            t_maps = {layer: self.maps(layer, False) for layer in self.layers}
            self._refine(t_maps)
            if self.dafa is not None and self.dafa.objective == 'agreement' and self.dafa.training and (
                    self.dafa.searching):
                self._watch_gradients(t_maps)
            losses = super().compute_distill_losses()
            adapted = self._adapted()
            losses.update(self._dam_losses(adapted, t_maps))
            losses.update({f'loss_align_{name}': self._align(name, adapted, t_maps) for name in self.aligners})
            if search and self.dafa is not None and self.dafa.training:
                losses['loss_aug'] = self._policy_loss(t_maps, adapted)
        return losses

    def compute_unlabelled_losses(self, names: Collection[str]) -> dict[str, Tensor]:
        """As :class:`FeatureDistiller`'s, of the refined teacher, and DAM's without its anchor.

        The policy and ``Phi`` learn from labelled images alone.
        """
        with self.step():
            self._refine({layer: self.maps(layer, False) for layer in self.layers})
            losses = self.losses_of(names)
            adapted = self._adapted() if self.dams else {}
            for layer in adapted:
                name = layer.replace('.', '_')
                parts = self.dams[name].compare(adapted[layer], self.features(layer, False))
                losses.update({part + self._suffix(name): loss for part, loss in parts.items()})
        return losses

    def _refine(self, t_maps: dict[str, list[Tensor]]) -> None:
        """Puts the refined teacher in place of the recorded one, until the step ends."""
        if self.dafa is not None:
            refined = iter(self.dafa([x for maps in t_maps.values() for x in maps]))  # one draw for all
            self._given.update({(layer, False): [next(refined) for _ in maps] for layer, maps in t_maps.items()})

    def _dam_losses(self, adapted: dict[str, list[Tensor]], t_maps: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        losses, (boxes, shape) = {}, self._image or (None, None)
        for layer in self.layers:
            name = layer.replace('.', '_')
            if name in self.dams:
                parts = self.dams[name](adapted[layer], self.features(layer, False), t_maps[layer], boxes, shape)
                losses.update({part + self._suffix(name): loss for part, loss in parts.items()})
        return losses

    def compute_policy_loss(self) -> Tensor:
        """Returns ``loss_aug`` alone, of what is recorded: of a batch that only the policy learns from."""
        with self.step(), torch.no_grad():
            adapted = self._adapted()
        return self._policy_loss({layer: self.maps(layer, False) for layer in self.layers}, adapted)

    def _policy_loss(self, t_maps: dict[str, list[Tensor]], adapted: dict[str, list[Tensor]]) -> Tensor:
        return self.dafa.policy_loss([x for maps in t_maps.values() for x in maps],
                                     [x for maps in adapted.values() for x in maps])

    def _watch_gradients(self, t_maps: dict[str, list[Tensor]]) -> None:
        """Lets the backward record the task's gradient at the student's last layer, for :meth:`search_policy`.

        The distillation reads the maps through views of their own, so that their gradient is that of its branch; the
        rest of a map's gradient is the task's. At earlier layers the rest would hold the distillation of later ones.
        """
        layer = self.layers[-1]
        maps = self.features(layer, True)
        if not all(x.requires_grad for x in maps):
            return  # an evaluation of the losses
        views = [x.view_as(x) for x in maps]
        self._given[layer, True] = views
        every = {(each, True): [x.detach() for x in self.features(each, True)] for each in self.layers}
        every.update({(each, False): values for each, values in t_maps.items()})
        self._search = _Search(every, [None] * len(maps), [None] * len(maps))
        for i, (x, view) in enumerate(zip(maps, views)):
            x.register_hook(partial(self._search.whole.__setitem__, i))
            view.register_hook(partial(self._search.distilled.__setitem__, i))

    def search_policy(self) -> None:
        """Adds the gradient of the policy's objective ``agreement`` to DAFA's parameters, after a backward.

        Each of DAFA's policy draws is scored by :func:`~..refiners.agreement.agreement_score` at the last of
        ``layers``, on a part of the batch: how far the gradient of base and DAM, which see the teacher refined by that
        draw, points where the gradient of the task points.
        """
        search, self._search = self._search, None
        if search is None or search.whole[0] is None:
            return
        layer, draws = self.layers[-1], self.dafa.sample()
        part = self.dafa.next_samples(len(search.whole[0]))
        maps = {key: [x[part].float() for x in values] for key, values in search.maps.items()}
        task = [(whole if distilled is None else whole - distilled)[part].float()
                for whole, distilled in zip(search.whole, search.distilled)]
        scores = []
        with keep_statistics(self):
            for draw in draws:
                student = [x.detach().requires_grad_() for x in maps[layer, True]]
                refined = self.dafa.refine(draw, maps[layer, False])
                loss = self._distillation(layer, {**maps, (layer, True): student, (layer, False): refined})
                gradients = torch.autograd.grad(loss, student, allow_unused=True)
                scores.append(agreement_score(task, [torch.zeros_like(x) if gradient is None else gradient
                                                     for x, gradient in zip(student, gradients)]))
        parameters = list(self.dafa.parameters())  # not backward(): a parallel wrapper would count it
        for parameter, gradient in zip(parameters, torch.autograd.grad(
                self.dafa.score_loss(draws, scores), parameters)):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _distillation(self, layer: str, given: dict[tuple[str, bool], list[Tensor]]) -> Tensor:
        """Returns the losses of the base and of DAM at a layer that depend on the refined teacher, summed."""
        with self.step():
            self._given = given
            losses = self.losses_of([name for name in self.weights if any(
                entry['recorder'] == layer for entry in self.loss_forward_mappings[name].values())])
            name = layer.replace('.', '_')
            if name in self.dams:
                losses.update(self.dams[name].compare(self._adapted()[layer], self.features(layer, False)))
            return sum(losses.values())

    def _adapted(self) -> dict[str, list[Tensor]]:
        """Returns ``Phi(F_S)`` by layer; nothing where it is not needed any more."""
        if self.dams and self.dam.get('adapter') != 'base':
            return {layer: self.dams[layer.replace('.', '_')].adapt(self.features(layer, True))
                    for layer in self.layers}
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

    def _align(self, name: str, adapted: dict[str, list[Tensor]], t_maps: dict[str, list[Tensor]]) -> Tensor:
        layer = next(layer for layer in self.layers if layer.replace('.', '_') == name)
        if layer not in adapted:
            return exact_zero(self.aligners[name])
        return sum(F.mse_loss(s.float(), t.float()) for s, t in zip(adapted[layer], t_maps[layer])) / len(t_maps[layer])

    @torch.no_grad()
    def detect_areas(self, layer: str) -> list[dict[str, Tensor]] | None:
        """Returns what DAM sees in what is recorded of a layer, see :meth:`DAM.detect`; None without DAM."""
        if not self.dams:
            return None
        with self.step():
            adapted = self._adapted()[layer]
        return self.dams[layer.replace('.', '_')].detect(adapted, self.maps(layer, False))
