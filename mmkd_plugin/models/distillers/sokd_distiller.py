"""SoKD on top of any distiller of features."""
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import DefaultScope
from mmrazor.registry import MODELS as RAZOR_MODELS
from torch import Tensor, nn

from ...registry import MODELS
from ...utils import check_dict, closest
from ..area_detectors import DAM
from ..connectors import ConvAdapter, ReviewKDConnector
from ..losses import ReviewKDLoss
from ..refiners import DAFA
from .layer_distiller import LayerDistiller, exact_zero, map_name

_SIDES = {True: re.compile('^s_|_s$|student', re.IGNORECASE), False: re.compile('^t_|_t$|teacher', re.IGNORECASE)}


@dataclass
class _Pair:
    """A student's and a teacher's feature; both recorders give one map or equally many."""
    student: str  # recorder
    teacher: str
    name: str  # in the names of losses
    phi: list[dict] = field(default_factory=list)  # where each map of the adapted student is, as get_record takes it
    aligned: bool = False  # whether only the alignment loss trains the adapter


@MODELS.register_module()
class SoKDDistiller(LayerDistiller):
    """DAFA and DAM of SoKD [0] around a base distiller, which sees the refined teacher instead of the teacher.

    [0] Shen, Huang, Zhu, Fan, Zhang, *Student-Oriented Teacher Knowledge Refinement for Knowledge
    Distillation*, arXiv 2409.18785 (2024).

    The base is written short (``layers`` and ``base``), or as in MMRazor's ``ConfigurableDistiller``
    with ``refine`` to name its features, or both. With ``dafa=None, dam=None`` it is the base distiller,
    to the bit, but that a connector runs once a step and not for every loss. Losses, besides the user's:

    ==================================  ===========================================================
    ``loss_base_LAYER[_LEVEL]``         the base loss at each map of ``layers``
    ``loss_dam_detect``, ``_area``,     DAM's, followed by ``_LAYER`` where several layers have one
    ``_anchor``
    ``loss_aug``                        the policy's; reaches nothing but DAFA, and nothing else does
    ``loss_align_LAYER``                see below
    ==================================  ===========================================================

    DAM and ``loss_aug`` see the student through an adapter Phi to the teacher's channels. It is the
    connector that the base has for that feature, if it makes the teacher's shape of it; else a
    :class:`ConvAdapter`, one for all levels of a layer, its channels learnt from one blank image. If
    neither base nor DAM trains that one, ``loss_align_LAYER`` does: the mean squared difference of
    ``Phi(F_S)`` and the *unaugmented* teacher, with ``F_S`` detached. So the student still learns
    nothing but what the base tells it. The loss ends, like the need for Phi, when the policy is frozen.

    The policy needs an optimiser of its own: :class:`~mmkd_plugin.engine.PolicyOptimWrapperConstructor`.
    Its search is ended by :class:`~mmkd_plugin.engine.FreezePolicyHook`.

    Args:
        layers: as in :class:`LayerDistiller`; ``['neck']`` is every pyramid level.
        base: a loss for every map of ``layers``, such as ``dict(type='L2Loss', normalize=False, div_element=True)``.
        connect: whether the base loss sees the student through Phi (FitNet, CWD, PKD) or directly (AT, AMD).
            Phi of :class:`ReviewKDLoss` is one :class:`ReviewKDConnector` over all ``layers``, from shallow to deep.
        refine: further features, of full wiring: pairs (student recorder, teacher recorder), or one name for both.
        dafa: arguments of :class:`DAFA`; None is no refinement.
        dam: arguments of :class:`DAM` without channels; None is no areas.
        adapter: arguments of :class:`ConvAdapter`, or of :class:`ReviewKDConnector`, without channels. Whether the
            teacher is ``signed`` is judged by a blank image, unless it is stated here.
        kwargs: recorders, connectors and losses, as in MMRazor's ``ConfigurableDistiller``.

    Raises:
        ValueError: the arguments contradict each other or, when the models are there, their features.
    """

    def __init__(self,
                 layers: Sequence[str | Sequence[str]] | None = None,
                 base: dict | None = None,
                 connect: bool = True,
                 refine: Sequence[str | Sequence[str]] = (),
                 dafa: dict | None = None,
                 dam: dict | None = None,
                 adapter: dict | None = None,
                 **kwargs) -> None:
        super().__init__(layers, **kwargs)
        for field_name, value in (('base', base), ('dafa', dafa), ('dam', dam), ('adapter', adapter)):
            check_dict(field_name, {} if value is None else value)
        self.pairs += _recorder_pairs(refine, self.student_recorders.recorders, self.teacher_recorders.recorders)
        teachers = [teacher for _, teacher in self.pairs]
        if len(set(teachers)) < len(teachers):
            raise ValueError(f'refine: {max(teachers, key=teachers.count)!r} of the teacher is refined twice')
        if base is not None and layers is None:
            raise ValueError('base is a loss for each of layers, but layers is missing')
        if (dafa is not None or dam is not None) and not self.pairs:
            raise ValueError('dafa and dam need features: name them in layers or refine')
        self.base, self.connect, self.dam, self.adapter = base, connect, dam, adapter or {}
        self.dafa = None if dafa is None else DAFA(**dafa)
        self.dams = nn.ModuleDict()
        self.features: list[_Pair] = []
        self._image: tuple[list[Tensor], tuple[int, int]] | None = None  # boxes and padded size
        self._refined: dict[str, Any] = {}  # records by the name of the teacher's recorder
        self._outputs: dict | None = None  # of connectors within a step
        self._fusion: str | None = None  # the connector that takes the maps of all layers

    @property
    def loss_names(self) -> list[str]:
        """The names of all losses."""
        names = list(self.distill_losses)
        for name, dam in self.dams.items():
            parts = ('detect', 'area') if dam.anchor is None else ('detect', 'area', 'anchor')
            names += [f'loss_dam_{part}{self._dam_suffix(name)}' for part in parts]
        names += [f'loss_align_{pair.name}' for pair in self.features if pair.aligned]
        return names + ['loss_aug'] * (self.dafa is not None)

    def prepare_from_student(self, model: nn.Module) -> None:
        from mmdet.models.detectors import BaseDetector
        if self.dam is not None and self.dam.get('anchor', 'boxes') == 'boxes' and not isinstance(model, BaseDetector):
            raise ValueError(f"dam: anchor='boxes' needs the boxes of a detector, and {type(model).__name__} is "
                             "none; use anchor='attention'")
        super().prepare_from_student(model)

    def wire(self, maps: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> None:
        self._check_record_idx()
        base = self.base is not None
        fused = base and self.connect and isinstance(_build_loss(self.base), ReviewKDLoss)
        if fused:
            self._add_fusion(maps[:len(self.layers)])
        for index, ((student, teacher), (s_maps, t_maps)) in enumerate(zip(self.pairs, maps)):
            short = index < len(self.layers)
            pair = _Pair(student, teacher, student.replace('.', '_'))
            through = short and base and self.connect  # the base loss sees the student through Phi
            if through or self.refining:
                _check_sizes(student, s_maps, t_maps)
                if through and fused:
                    first = sum(len(s) for s, _ in maps[:index])
                    pair.phi = [self._through('phi', student, first + level) for level in range(len(s_maps))]
                else:
                    own = [] if through else self._own_connector(student, t_maps)
                    pair.phi = own or self._add_adapter(student, s_maps, t_maps)
                    pair.aligned = not through and not own and self.dafa is not None and self.dam is None
            if short and base:
                self._add_base(pair, len(s_maps))
            if self.dam is not None:
                self._add_dam(pair, t_maps)
            self.features.append(pair)

    @property
    def refining(self) -> bool:
        """Whether there is anything around the base."""
        return self.dafa is not None or self.dam is not None

    def _through(self, connector: str, recorder: str, connector_idx: int | None) -> dict:
        index = {} if connector_idx is None else dict(connector_idx=connector_idx)
        return dict(recorder=recorder, from_student=True, connector=connector, **index)

    def _add_connector(self, name: str, kind: type[nn.Module], channels: dict, **defaults) -> None:
        if name in self.connectors:
            raise ValueError(f'connectors: the distiller writes a connector named {name!r} itself; rename yours')
        arguments = _checked('adapter', self.adapter, channels)
        for key, value in defaults.items():
            arguments.setdefault(key, value)
        self.connectors[name] = kind(**arguments)
        self._written['connectors'][name] = dict(type=f'mmkd_plugin.{kind.__name__}', **arguments)

    def _add_fusion(self, maps: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> None:
        s_channels, t_channels = ([x.shape[1] for pair in maps for x in pair[side]] for side in (0, 1))
        self._add_connector('phi', ReviewKDConnector, dict(in_channels=s_channels, out_channels=t_channels))
        self._fusion = 'phi'

    def _add_adapter(self, recorder: str, s_maps: Sequence[Tensor], t_maps: Sequence[Tensor]) -> list[dict]:
        name = f'phi_{recorder.replace(".", "_")}'
        channels = dict(in_channels=_one_channel_count(recorder, 'student', s_maps),
                        out_channels=_one_channel_count(recorder, 'teacher', t_maps))
        self._add_connector(name, ConvAdapter, channels, signed=_signed(t_maps))
        alone = isinstance(self.get_record(recorder, True), Tensor)
        return [self._through(name, recorder, None if alone else level) for level in range(len(s_maps))]

    @torch.no_grad()
    def _own_connector(self, recorder: str, t_maps: Sequence[Tensor]) -> list[dict]:
        """Returns where the user's wiring has this feature in the teacher's shape, all of its maps or none."""
        shapes, found = [t.shape for t in t_maps], {}
        training = {module: module.training for module in self.connectors.modules()}
        self.connectors.eval()
        for entry in (entry for inputs in self.loss_forward_mappings.values() for entry in inputs.values()):
            if not (entry['from_student'] and entry['recorder'] == recorder and entry.get('connector')):
                continue
            try:
                out = self.get_record(**entry)
            except (RuntimeError, ValueError):  # the trial of the losses tells what is wrong
                continue
            level = entry.get('data_idx') or entry.get('connector_idx') or 0
            if isinstance(out, Tensor):
                if level < len(shapes) and out.shape == shapes[level]:
                    found.setdefault(level, entry)
            elif [getattr(x, 'shape', None) for x in out] == shapes:
                found = {level: dict(entry, connector_idx=level) for level in range(len(shapes))}
        for module, mode in training.items():
            module.training = mode
        return [found[level] for level in range(len(shapes))] if len(found) == len(shapes) else []

    def _add_base(self, pair: _Pair, levels: int) -> None:
        s_input, t_input = _input_names(_build_loss(self.base))
        for level in range(levels):
            student = pair.phi[level] if self.connect else self.record(pair.student, level, True)
            self.add_loss(f'loss_base_{map_name(pair.student, level, levels)}', self.base,
                          **{s_input: student, t_input: self.record(pair.teacher, level, False)})

    def _add_dam(self, pair: _Pair, t_maps: Sequence[Tensor]) -> None:
        channels = _one_channel_count(pair.student, 'teacher', t_maps)
        self.dams[pair.name] = DAM(**_checked('dam', self.dam, dict(channels=channels)))

    def _dam_suffix(self, name: str) -> str:
        return f'_{name}' if len(self.dams) > 1 else ''

    def _check_record_idx(self) -> None:
        refined = [teacher for _, teacher in self.pairs]
        for loss, inputs in self.loss_forward_mappings.items():
            for entry in inputs.values():
                if not entry['from_student'] and entry['recorder'] in refined and entry.get('record_idx'):
                    raise ValueError(f'{loss} reads call {entry["record_idx"]} of {entry["recorder"]!r}, but only the '
                                     'first call, 0, is refined: record a layer that is called once')

    def prepare_batch(self, batch_inputs: Tensor, data_samples: list | None) -> None:
        """Takes from the batch what DAM's anchor 'boxes' needs."""
        if any(dam.anchor == 'boxes' for dam in self.dams.values()):
            boxes = [sample.gt_instances.bboxes for sample in data_samples]
            self._image = [getattr(each, 'tensor', each) for each in boxes], tuple(batch_inputs.shape[-2:])

    def get_record(self,
                   recorder: str,
                   from_student: bool,
                   record_idx: int = 0,
                   data_idx: int | None = None,
                   connector: str | None = None,
                   connector_idx: int | None = None) -> Any:
        """As in MMRazor; within a step a refined teacher, and each connector's output computed once."""
        if not connector:
            record = self._raw_or_refined(recorder, from_student, record_idx, data_idx)
        elif connector == self._fusion:
            record = self._once((connector, ), lambda: [x for layer in self.layers for x in self.maps(layer, True)])
        else:
            place = recorder, from_student, record_idx, data_idx
            record = self._once((connector, *place), lambda: self._raw_or_refined(*place))
        return record if connector_idx is None else record[connector_idx]

    def _raw_or_refined(self, recorder: str, from_student: bool, record_idx: int, data_idx: int | None) -> Any:
        if from_student or recorder not in self._refined:
            return super().get_record(recorder, from_student, record_idx, data_idx)
        record = self._refined[recorder]
        return record if data_idx is None else record[data_idx]

    def _once(self, key: tuple, feature: Callable[[], Any]) -> Any:
        """Returns the output of the connector ``key[0]``, which runs once a step."""
        if self._outputs is None:
            return self.connectors[key[0]](feature())
        if key not in self._outputs:
            self._outputs[key] = self.connectors[key[0]](feature())
        return self._outputs[key]

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Keeps refined features and connectors' outputs, with their graph, no longer than the losses need."""
        self._outputs = {}
        try:
            yield
        finally:
            self._outputs, self._refined, self._image = None, {}, None

    def compute_distill_losses(self, search: bool = True) -> dict[str, Tensor]:
        """The losses of what is recorded; without ``loss_aug`` unless ``search``."""
        with self._step():
            if not self.refining:
                return super().compute_distill_losses()
            t_maps = [self.maps(pair.teacher, False) for pair in self.features]
            refined = self._refine(t_maps)
            losses = super().compute_distill_losses()
            adapted = [self._adapted(pair) for pair in self.features]
            boxes, shape = self._image or (None, None)
            for pair, s, t, new in zip(self.features, adapted, t_maps, refined):
                if pair.name in self.dams:
                    parts = self.dams[pair.name](s, new, None if self.dafa is None else list(t), boxes, shape)
                    losses.update({name + self._dam_suffix(pair.name): loss for name, loss in parts.items()})
                elif pair.aligned:
                    losses[f'loss_align_{pair.name}'] = self._align(pair, s, t)
            if search and self.dafa is not None and self.dafa.training:
                losses['loss_aug'] = self.dafa.policy_loss([x for s in adapted for x in s])
        return losses

    def compute_policy_loss(self) -> Tensor:
        """``loss_aug`` alone, of what is recorded: of a batch that only the policy learns from."""
        with self._step():
            self._refine([self.maps(pair.teacher, False) for pair in self.features])
            with torch.no_grad():
                adapted = [self._adapted(pair) for pair in self.features]
            return self.dafa.policy_loss([x for s in adapted for x in s])

    def _refine(self, t_maps: list[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Refines all maps by one draw, for :meth:`get_record` too."""
        if self.dafa is None:
            return [list(maps) for maps in t_maps]
        flat = iter(self.dafa([x for maps in t_maps for x in maps]))
        refined = [[next(flat) for _ in maps] for maps in t_maps]
        for pair, maps in zip(self.features, refined):
            alone = isinstance(super().get_record(pair.teacher, False), Tensor)
            self._refined[pair.teacher] = maps[0] if alone else tuple(maps)
        return refined

    def _adapted(self, pair: _Pair) -> list[Tensor]:
        """Phi(F_S), every level; nothing where it is not needed any more."""
        if not pair.aligned:
            return [self.get_record(**entry) for entry in pair.phi]
        if self.dafa.frozen:
            return []
        adapter = self.connectors[pair.phi[0]['connector']]
        return list(adapter([x.detach() for x in self.maps(pair.student, True)]))

    def _align(self, pair: _Pair, s_maps: list[Tensor], t_maps: Sequence[Tensor]) -> Tensor:
        if not s_maps:
            return exact_zero(self.connectors[pair.phi[0]['connector']])
        return sum(F.mse_loss(s.float(), t.float()) for s, t in zip(s_maps, t_maps)) / len(s_maps)


def _recorder_pairs(refine: Sequence[str | Sequence[str]], students: dict, teachers: dict) -> list[tuple[str, str]]:
    pairs = []
    for entry in refine if isinstance(refine, (list, tuple)) else [None]:
        pair = (entry, entry) if isinstance(entry, str) else entry
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
            raise ValueError('refine must be a list of recorders, or of pairs (student\'s, teacher\'s), such as '
                             f'["neck"], got {refine!r}')
        for name, recorders, field_name in zip(pair, (students, teachers), ('student_recorders', 'teacher_recorders')):
            if name not in recorders:
                raise ValueError(f'refine: {field_name} has no {name!r}; {closest(name, recorders)}')
        pairs.append(tuple(pair))
    return pairs


def _build_loss(loss: dict) -> nn.Module:
    with DefaultScope.overwrite_default_scope('mmrazor'):
        return RAZOR_MODELS.build(loss)


def _input_names(loss: nn.Module) -> tuple[str, str]:
    """Returns what the loss calls the student's and the teacher's feature."""
    parameters = inspect.signature(loss.forward).parameters
    needed = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    names = [[name for name in needed if _SIDES[side].search(name)] for side in (True, False)]
    if len(needed) != 2 or [len(side) for side in names] != [1, 1]:
        raise ValueError(f'base: {type(loss).__name__} takes {", ".join(needed)}; a base loss takes a feature of the '
                         'student and one of the teacher, such as s_feature and t_feature. Wire it in full: '
                         'recorders, connectors, distill_losses, loss_forward_mappings, refine')
    return names[0][0], names[1][0]


def _checked(field_name: str, given: dict, inferred: dict) -> dict:
    for key, value in inferred.items():
        if key in given and given[key] != value:
            raise ValueError(f'{field_name}.{key} is {given[key]!r}, but the features have {value!r}; leave it out')
    return dict(given, **inferred)


def _check_sizes(layer: str, s_maps: Sequence[Tensor], t_maps: Sequence[Tensor]) -> None:
    sizes = [[tuple(x.shape[2:]) for x in maps] for maps in (s_maps, t_maps)]
    if sizes[0] != sizes[1]:
        raise ValueError(f'{layer!r}: the strides differ: an image of 224 x 224 gives maps of {sizes[0]} in the '
                         f'student and {sizes[1]} in the teacher; choose layers of equal stride')


def _signed(maps: Sequence[Tensor]) -> bool:
    """Whether values are negative, or nothing speaks against it: a network without biases says nothing of a blank."""
    return any(bool((x < 0).any()) for x in maps) or not any(bool((x > 0).any()) for x in maps)


def _one_channel_count(layer: str, side: str, maps: Sequence[Tensor]) -> int:
    channels = [x.shape[1] for x in maps]
    if len(set(channels)) > 1:
        raise ValueError(f'{layer!r} of the {side} gives maps of {channels} channels, but the levels of a layer share '
                         'one adapter and one DAM: name the stages as layers of their own')
    return channels[0]
