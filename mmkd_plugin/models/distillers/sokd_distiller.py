"""The distiller of SoKD, around a distiller of feature maps."""
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
from ..origin import Derive, origin
from ..recording import keep_statistics
from ..refiners import DAFA
from ..refiners.agreement import agreement_score
from .feature_distiller import DATA_SAMPLES, FeatureDistiller, exact_zero, map_name, one_width


class _Search(NamedTuple):
    """Inputs of a search step, after the backward."""
    maps: dict[tuple[str, bool], list[Tensor]]  # by layer and whether it is of the student, detached
    whole: list[Tensor | None]  # gradients at the student's outputs of the last layer
    distilled: list[Tensor | None]  # the part from the distillation, at the maps
    derived: list[Derive]  # functions from gradients at the outputs to gradients at the maps


@MODELS.register_module()
class SoKDDistiller(FeatureDistiller):
    """DAFA and DAM of SoKD [0] around a base distiller, which gets the refined teacher's maps.

    [0] Shen, Huang, Zhu, Fan, Zhang, *Student-Oriented Teacher Knowledge Refinement for Knowledge
    Distillation*, arXiv 2409.18785 (2024).

    The student's objective is ``L_task + L_base(F_S, s(F_T)) + lambda L_D + beta L_DA``. The policy ``chi`` of the
    augmentation ``s`` minimises ``L_aug = 1/2 mean (s(F_T) - sg Phi(F_S))^2``. With ``dafa=dict(objective=
    'agreement')``, it maximises the agreement of the distillation's gradient with the task's, see
    :meth:`search_policy`. With ``dafa=None, dam=None``, this is the base distiller. Losses in addition to those of
    :class:`FeatureDistiller`:

    =======================================  ==========================================================
    ``loss_dam_detect``, ``loss_dam_area``,  DAM's, followed by ``_LAYER`` if there are several layers
    ``loss_dam_anchor``
    ``loss_aug``                             the policy's; only DAFA gets its gradient
    ``loss_align_LAYER``                     see below
    =======================================  ==========================================================

    ``Phi`` maps the student's features to the teacher's for the policy. It is DAM's adapter. Without DAM, it is the
    base's connector if that is ``aligned``. Otherwise it is a separate :class:`ConvAdapter`, which
    ``loss_align_LAYER`` trains. This loss is the mean squared difference of ``Phi(F_S)`` and the unrefined teacher,
    with ``F_S`` detached, and ends with the search.

    The policy needs its own optimizer, :class:`~mmkd_plugin.engine.PolicyOptimWrapperConstructor`, and
    :class:`~mmkd_plugin.engine.FreezePolicyHook` ends its search.

    Args:
        layers, base, loss_weight: as in :class:`FeatureDistiller`.
        dafa: arguments of :class:`DAFA`, or None for an unrefined teacher.
        dam: arguments of :class:`DAM` without channels, or None for no DAM. ``adapter`` has arguments of
            :class:`ConvAdapter`. With ``adapter='base'``, DAM uses the first aligned connector of the bases.
        kwargs: recorders, connectors and losses, as in MMRazor's ``ConfigurableDistiller``.

    Raises:
        ValueError: an argument is wrong, or the models' features do not fit the arguments.
    """

    def __init__(self,
                 layers: Sequence[str | Sequence[str]],
                 base: str | dict | Sequence[str | dict] | None = 'fitnet',
                 loss_weight: float | str | Sequence[float | str] | None = None,
                 dafa: dict | None = {},  # noqa: B006  never changed
                 dam: dict | None = {},  # noqa: B006
                 **kwargs) -> None:
        if kwargs.keys() & {'connect', 'refine', 'adapter'}:
            raise ValueError('SoKDDistiller: connect, refine and adapter were arguments before version 0.2. The '
                             "connector is now in the base: base='fitnet' or base=dict(loss=..., connector=...). The "
                             'adapter is now in dam: dam=dict(adapter=dict(signed=False))')
        super().__init__(layers, base, loss_weight, **kwargs)
        for field, value in (('dafa', dafa), ('dam', dam)):
            check_dict(field, {} if value is None else value)
        self.dam = None if dam is None else dict(dam)
        self.dafa = None if dafa is None else DAFA(**dafa)
        if getattr(self.dafa, 'objective', None) == 'agreement' and (self.crosskd is not None or kwargs.get(
                'distill_losses')):
            other = "base 'crosskd'" if self.crosskd is not None else 'distill_losses'
            raise ValueError(f"dafa.objective: 'agreement' counts the gradient of all other losses as the task's, got "
                             f"{other} beside the layers. Use 'similarity', or remove {other}")
        reads_samples = [name for name, base in self.bases if DATA_SAMPLES in base['inputs'].values()]
        if reads_samples and getattr(self.dafa, 'objective', None) == 'agreement':
            raise ValueError(f"dafa.objective: 'agreement' computes the losses again after the step, but base "
                             f"{reads_samples[0]!r} reads the step's samples. Use 'similarity', or another base")
        self.dams = nn.ModuleDict()
        self.aligners = nn.ModuleDict()
        self._given: dict[tuple[str, bool], list[Tensor]] = {}  # features that replace recorded maps in a step
        self._image: tuple[list[Tensor], tuple[int, int]] | None = None  # boxes and size, for DAM's anchor
        self._search: _Search | None = None  # set by the losses, read by the search after the backward

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
            name = map_name(layer)
            channels = one_width(layer, 'teacher', t_maps)
            if self.dam is not None:
                self.dams[name] = self._build_dam(layer, s_maps, channels)
            elif self.dafa is not None and self._aligned is None:
                self.aligners[name] = ConvAdapter(one_width(layer, 'student', s_maps), channels)

    def _build_dam(self, layer: str, s_maps: list[Tensor], channels: int) -> DAM:
        given = dict(self.dam)
        for key in ('channels', 'in_channels'):
            if key in given:
                raise ValueError(f'dam.{key}: is set from the features. Leave it out')
        if given.get('adapter') != 'base':
            return DAM(channels, one_width(layer, 'student', s_maps), **given)
        if self._aligned is None:
            raise ValueError("dam.adapter: 'base' shares the base's connector, but no base has a connector to the "
                             "teacher's channels. Leave out adapter, so that DAM builds its own")
        given.pop('adapter')
        return DAM(channels, **given)

    @property
    def loss_names(self) -> list[str]:
        """Names of all losses."""
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
        """Stores the boxes of the batch if DAM's anchor is 'boxes'."""
        if any(dam.anchor == 'boxes' for dam in self.dams.values()):
            boxes = [sample.gt_instances.bboxes for sample in data_samples]
            self._image = [getattr(each, 'tensor', each) for each in boxes], tuple(batch_inputs.shape[-2:])

    def features(self, layer: str, from_student: bool) -> list[Tensor]:
        """As :class:`FeatureDistiller`'s, with the refined maps of the teacher."""
        return self._given.get((layer, from_student)) or super().features(layer, from_student)

    @contextmanager
    def step(self) -> Iterator[None]:
        with super().step():
            try:
                yield
            finally:
                self._given, self._image = {}, None

    def compute_distill_losses(self, search: bool = True) -> dict[str, Tensor]:
        """Returns the losses of the records, with ``loss_aug`` only if ``search``."""
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
        """As :class:`FeatureDistiller`'s, with the refined teacher, and DAM's losses without the anchor.

        The policy and ``Phi`` learn only from labelled images.
        """
        with self.step():
            self._refine({layer: self.maps(layer, False) for layer in self.layers})
            losses = self.losses_of(names)
            adapted = self._adapted() if self.dams else {}
            for layer in adapted:
                name = map_name(layer)
                parts = self.dams[name].compare(adapted[layer], self.features(layer, False))
                losses.update({part + self._suffix(name): loss for part, loss in parts.items()})
        return losses

    def _refine(self, t_maps: dict[str, list[Tensor]]) -> None:
        """Replaces the teacher's recorded maps by refined ones until the end of the step."""
        if self.dafa is not None:
            refined = iter(self.dafa([x for maps in t_maps.values() for x in maps]))  # one draw for all maps
            self._given.update({(layer, False): [next(refined) for _ in maps] for layer, maps in t_maps.items()})

    def _dam_losses(self, adapted: dict[str, list[Tensor]], t_maps: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        losses, (boxes, shape) = {}, self._image or (None, None)
        for layer in self.layers:
            name = map_name(layer)
            if name in self.dams:
                parts = self.dams[name](adapted[layer], self.features(layer, False), t_maps[layer], boxes, shape)
                losses.update({part + self._suffix(name): loss for part, loss in parts.items()})
        return losses

    def compute_policy_loss(self) -> Tensor:
        """Returns only ``loss_aug``, for the records of a batch that only the policy learns from."""
        with self.step(), torch.no_grad():
            adapted = self._adapted()
        return self._policy_loss({layer: self.maps(layer, False) for layer in self.layers}, adapted)

    def _policy_loss(self, t_maps: dict[str, list[Tensor]], adapted: dict[str, list[Tensor]]) -> Tensor:
        return self.dafa.policy_loss([x for maps in t_maps.values() for x in maps],
                                     [x for maps in adapted.values() for x in maps])

    def _watch_gradients(self, t_maps: dict[str, list[Tensor]]) -> None:
        """Adds hooks that record the task's gradient at the student's last layer, for :meth:`search_policy`.

        The distillation reads the maps through separate views, whose gradient is that of the distillation. The rest of
        a map's gradient is the task's. At earlier layers, the rest would contain the distillation of later layers.
        """
        layer = self.layers[-1]
        maps = self.features(layer, True)
        if not all(x.requires_grad for x in maps):
            return  # the losses are evaluated without a backward
        views = [x.view_as(x) for x in maps]
        self._given[layer, True] = views
        every = {(each, True): [x.detach() for x in self.features(each, True)] for each in self.layers}
        every.update({(each, False): values for each, values in t_maps.items()})
        outputs, derived = zip(*map(origin, maps))
        self._search = _Search(every, [None] * len(maps), [None] * len(maps), list(derived))
        for i, (output, view) in enumerate(zip(outputs, views)):
            output.register_hook(partial(self._search.whole.__setitem__, i))
            view.register_hook(partial(self._search.distilled.__setitem__, i))

    def search_policy(self) -> None:
        """Adds the gradient of the policy's objective ``agreement`` to DAFA's parameters, after a backward.

        The score of each draw is the agreement of two gradients at the last of ``layers``, on a part of the batch: the
        gradient of base and DAM with the teacher refined by that draw, and the gradient of the task. See
        :func:`~..refiners.agreement.agreement_score`.
        """
        search, self._search = self._search, None
        if search is None or search.whole[0] is None:
            return
        layer, draws = self.layers[-1], self.dafa.sample()
        part = self.dafa.next_samples(len(search.whole[0]))
        maps = {key: [x[part].float() for x in values] for key, values in search.maps.items()}
        whole = [derive(gradient) for derive, gradient in zip(search.derived, search.whole)]
        task = [(every if distilled is None else every - distilled)[part].float()
                for every, distilled in zip(whole, search.distilled)]
        scores = []
        with keep_statistics(self):
            for draw in draws:
                student = [x.detach().requires_grad_() for x in maps[layer, True]]
                refined = self.dafa.refine(draw, maps[layer, False])
                loss = self._distillation(layer, {**maps, (layer, True): student, (layer, False): refined})
                gradients = torch.autograd.grad(loss, student, allow_unused=True)
                scores.append(agreement_score(task, [torch.zeros_like(x) if gradient is None else gradient
                                                     for x, gradient in zip(student, gradients)]))
        parameters = list(self.dafa.parameters())  # not backward(), which a parallel wrapper would count
        for parameter, gradient in zip(parameters, torch.autograd.grad(
                self.dafa.score_loss(draws, scores), parameters)):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _distillation(self, layer: str, given: dict[tuple[str, bool], list[Tensor]]) -> Tensor:
        """Returns the sum of the losses of base and DAM at a layer that depend on the refined teacher."""
        with self.step():
            self._given = given
            losses = self.losses_of([name for name in self.weights if any(
                entry['recorder'] == layer for entry in self.loss_forward_mappings[name].values())])
            name = map_name(layer)
            if name in self.dams:
                losses.update(self.dams[name].compare(self._adapted()[layer], self.features(layer, False)))
            return sum(losses.values())

    def _adapted(self) -> dict[str, list[Tensor]]:
        """Returns ``Phi(F_S)`` by layer, or an empty dict if it is no longer needed."""
        if self.dams and self.dam.get('adapter') != 'base':
            return {layer: self.dams[map_name(layer)].adapt(self.features(layer, True))
                    for layer in self.layers}
        if not self.dams and (self.dafa is None or self.dafa.frozen):
            return {}
        if self.aligners:
            return {layer: self.aligners[map_name(layer)]([x.detach() for x in self.maps(layer, True)])
                    for layer in self.layers}
        first = next(base['inputs'] for name, base in self.bases if name == self._aligned)
        argument = next(key for key, role in first.items() if role == 'student')
        return {layer: [self.get_record(**self.loss_forward_mappings[loss][argument])
                        for loss in self._losses_at(layer)] for layer in self.layers}

    def _losses_at(self, layer: str) -> list[str]:
        """Returns the names of the aligned base's losses at a layer, one per map."""
        return [name for name in self.losses_by_base[self._aligned]
                if any(entry['recorder'] == layer and entry['from_student']
                       for entry in self.loss_forward_mappings[name].values())]

    def _align(self, name: str, adapted: dict[str, list[Tensor]], t_maps: dict[str, list[Tensor]]) -> Tensor:
        layer = next(layer for layer in self.layers if map_name(layer) == name)
        if layer not in adapted:
            return exact_zero(self.aligners[name])
        return sum(F.mse_loss(s.float(), t.float()) for s, t in zip(adapted[layer], t_maps[layer])) / len(t_maps[layer])

    @torch.no_grad()
    def detect_areas(self, layer: str) -> list[dict[str, Tensor]] | None:
        """Returns DAM's detections on the records of a layer, see :meth:`DAM.detect`, or None without DAM."""
        if not self.dams:
            return None
        with self.step():
            adapted = self._adapted()[layer]
        return self.dams[map_name(layer)].detect(adapted, self.maps(layer, False))
