"""The distiller of feature maps at a list of layers."""
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from mmrazor.models.distillers import ConfigurableDistiller
from mmrazor.models.task_modules import RecorderManager
from mmrazor.registry import MODELS as RAZOR_MODELS
from torch import Tensor, nn

from ...registry import MODELS
from ...utils import check_number
from ..origin import origin
from ..recording import check_sources, record_dummy_input
from .auto_weight import AutoWeight, gradient_norms, reaches
from .crosskd import CrossKD
from .presets import fill_channels, resolve

DATA_SAMPLES = 'data_samples'  # recorder of the student's input, for losses that need it


@MODELS.register_module()
class FeatureDistiller(ConfigurableDistiller):
    """MMRazor's ``ConfigurableDistiller`` that writes recorders, connectors, losses and mappings itself.

    ``layers`` are the layers to compare, and ``base`` tells how. The layer ``'neck'`` of a detector gives one map per
    pyramid level. A layer that runs several times in a forward gives the maps of each call. When the models are built,
    a dummy input tells the number of maps of each layer and their channels. :meth:`written_config` returns the full
    config.

    The losses are ``loss_BASE_LAYER``, with ``_`` for dots in the layer's name, or ``loss_BASE_LAYER_0``, ``_1``, ...
    if a layer has several maps.

    Usage, in a config::

        distiller=dict(type='mmkd_plugin.FeatureDistiller', layers=['neck'], base='pkd')
        distiller=dict(type='mmkd_plugin.FeatureDistiller', layers=['neck'], base=['pkd', 'amd-scale-free'],
                       loss_weight=[10.0, 1.0])
        distiller=dict(type='mmkd_plugin.FeatureDistiller', layers=['backbone.layer3'],
                       base=dict(loss=dict(type='L1Loss'), weight=2.0))

    Args:
        layers: names of modules. Each is a name for both student and teacher, or a pair (student's, teacher's). Maps
            of different strides are interpolated for a pair, also of equal names, and an error for a name.
        base: a preset's name or a dict, as in :mod:`.presets`, or a list of them, or None for no base. ``'crosskd'``,
            or ``dict(preset='crosskd', ...)`` with arguments of :class:`CrossKD`, compares predictions of dense heads.
            It reads no ``layers``, so ``layers`` may be empty.
        loss_weight: replaces the base's ``weight``; a list if ``base`` is a list. ``'auto'`` measures the weight in
            the first iterations, see :class:`.AutoWeight`.
        auto_ratio: ratio of the base's gradient norm at the layers to the task's, for ``'auto'``.
        student_recorders, teacher_recorders, connectors, distill_losses, loss_forward_mappings: additional ones, as in
            ``ConfigurableDistiller``.

    Raises:
        ValueError: an argument is wrong. When the models are built: a layer is not in its model, its output is not
            feature maps (N, C, H, W), or student and teacher have different numbers of maps.
    """

    def __init__(self,
                 layers: Sequence[str | Sequence[str]],
                 base: str | dict | Sequence[str | dict] | None = 'fitnet',
                 loss_weight: float | str | Sequence[float | str] | None = None,
                 student_recorders: dict | None = None,
                 teacher_recorders: dict | None = None,
                 connectors: dict | None = None,
                 distill_losses: dict | None = None,
                 loss_forward_mappings: dict | None = None,
                 auto_ratio: float = 1.0,
                 **kwargs) -> None:
        self.bases, crosskd = _bases(base, loss_weight)
        pairs = _pairs(layers) if layers or crosskd is None else {}
        clash = set(pairs) & (set(student_recorders or {}) | set(teacher_recorders or {}))
        if clash:
            raise ValueError(f'layers: a recorder is also named {min(clash)!r}. Rename the recorder')
        student = {name: dict(type='mmkd_plugin.MapOutputs', source=pair[0]) for name, pair in pairs.items()}
        teacher = {name: dict(type='mmkd_plugin.MapOutputs', source=pair[1]) for name, pair in pairs.items()}
        if any(DATA_SAMPLES in whole['inputs'].values() for _, whole in self.bases):
            student[DATA_SAMPLES] = dict(type='ModuleInputs', source='')
        if crosskd is not None and not any(pair[1] == 'neck' for pair in pairs.values()):
            teacher['crosskd'] = dict(type='ModuleOutputs', source='neck')  # the teacher runs as far as this layer
        self._written = dict(
            type='mmrazor.ConfigurableDistiller',
            student_recorders=dict(student_recorders or {}, **student),
            teacher_recorders=dict(teacher_recorders or {}, **teacher),
            connectors=dict(connectors or {}),
            distill_losses=dict(distill_losses or {}),
            loss_forward_mappings=dict(loss_forward_mappings or {}))
        super().__init__(**{key: value for key, value in self._written.items() if key != 'type'}, **kwargs)
        self.layers = list(pairs)
        self.pairs = [(layer, layer) for layer in self.layers]  # recorders of student and teacher
        self.given_as_pairs = {layer[0] for layer in layers or () if not isinstance(layer, str)}
        self.crosskd_weight, arguments = crosskd or (1.0, None)
        self.crosskd = None if arguments is None else CrossKD(**arguments)
        self.auto_ratio = check_number('auto_ratio', auto_ratio, above=0)
        self.autos = nn.ModuleDict()  # measured weights, by the base's name
        self.weights: dict[str, float] = {}  # of the bases' losses, by name
        self.losses_by_base: dict[str, list[str]] = {}
        self._whole: set[str] = set()  # connectors with all maps of a layer as input
        self._fused: set[str] = set()  # connectors with all maps of all layers as input
        self._connectors_of: dict[str, set[str]] = {}  # by the base's name
        self._at_once: dict[str, list[str]] = {}  # losses computed in one call, by the base's name
        self._places: dict[bool, dict[str, list[tuple[int, int | None]]]] = {True: {}, False: {}}
        self._outputs: dict[tuple, Any] | None = None  # of connectors, during a step

    def written_config(self) -> str:
        """Returns the complete ``ConfigurableDistiller`` config. Call it after the models are built.

        Weights other than 1 are in comments, because not all losses of MMRazor have a weight.
        """
        lines = [f'# {name}: weight {weight:g}' for name, weight in self.weights.items() if weight != 1]
        return '\n'.join([*lines, Config(dict(distiller=self._written)).pretty_text])

    def prepare_from_student(self, model: nn.Module) -> None:
        check_sources(self._written['student_recorders'], model, 'layers')
        super().prepare_from_student(model)
        self._record(model, True)
        if self.crosskd is not None:
            self.__dict__['_student'] = model  # not as a submodule

    def prepare_from_teacher(self, model: nn.Module) -> None:
        """Also adds connectors and losses, so that all parts exist before the optimizer is built."""
        check_sources(self._written['teacher_recorders'], model, 'layers')
        super().prepare_from_teacher(model)
        if self.crosskd is not None:
            self.crosskd.prepare(self.__dict__.pop('_student'), model)
        self._record(model, False)
        maps = {layer: (self.maps(layer, True), self.maps(layer, False)) for layer in self.layers}
        for layer, (s_maps, t_maps) in maps.items():
            if len(s_maps) != len(t_maps):
                raise ValueError(f'layers: {layer!r} gives {len(s_maps)} feature maps in the student and '
                                 f'{len(t_maps)} in the teacher')
        self.wire(maps)
        self._log(maps)

    def _log(self, maps: dict[str, tuple[list[Tensor], list[Tensor]]]) -> None:
        """Logs layers, channels, losses and weights."""
        for layer, both in maps.items():
            student, teacher = (self._written[f'{side}_recorders'][layer]['source'] for side in ('student', 'teacher'))
            s_channels, t_channels = ([x.shape[1] for x in side] for side in both)
            print_log(f'Distilled layer: {student} of the student, channels {s_channels}, with {teacher} of the '
                      f'teacher, channels {t_channels}.', logger='current')
        for name, base in self.bases:
            parts = [f'{end} {_types(base[end])}' for end in ('loss', 'connector', 't_connector') if base[end]]
            weight = "is measured ('auto')" if base['auto'] else f'{base["weight"]:g}'
            print_log(f'Distillation base {name}: {", ".join(parts)}; losses {", ".join(self.losses_by_base[name])}; '
                      f'weight {weight}.', logger='current')
            if get_world_size() > 1 and 'CRDLoss' in _types(base['loss']):
                print_log(f'Distillation base {name}: each process has a memory of its own, which it updates with its '
                          'own images, and a checkpoint has the memory of the first process. So the training differs '
                          'from that of one process, and a resumed run from an uninterrupted one.',
                          logger='current', level=logging.WARNING)

    def _record(self, model: nn.Module, from_student: bool) -> None:
        """Records the layers on a dummy input and stores the places of their maps."""
        manager, wanted = self.student_recorders if from_student else self.teacher_recorders, RecorderManager()
        wanted.recorders.update({name: manager.get_recorder(name) for name in self.layers})
        record_dummy_input(model, wanted, to_the_end=True)
        network = 'student' if from_student else 'teacher'
        for name in self.layers:
            places, source = [], wanted.get_recorder(name).source
            for call, output in enumerate(wanted.get_recorder(name).data_buffer):
                several = isinstance(output, (list, tuple))
                maps = output if several else [output]
                if not maps or not all(isinstance(x, Tensor) and x.dim() == 4 for x in maps):
                    given = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in maps]
                    raise ValueError(f'layers: {source!r} of the {network} must have feature maps (N, C, H, W) as its '
                                     f'output, got {given}')
                places += [(call, i if several else None) for i in range(len(maps))]
            if not places:
                raise ValueError(f"layers: {source!r} of the {network} does not run in the model's forward. Use "
                                 'another layer')
            self._places[from_student][name] = places

    def wire(self, maps: dict[str, tuple[list[Tensor], list[Tensor]]]) -> None:
        """Adds the connectors and losses of the bases.

        Args:
            maps: by layer, the maps of student and teacher on a dummy input, equal in number.
        """
        for name, base in self.bases:
            others = set(self.connectors)
            self._wire_base(name, base, maps)
            self._connectors_of[name] = set(self.connectors) - others
            if base['auto']:
                trained = any(parameter.requires_grad for connector in self._connectors_of[name]
                              for parameter in self.connectors[connector].parameters())
                self.autos[name] = AutoWeight(name, base['weight'], 200 if trained else 0, self.auto_ratio)

    def _wire_base(self, name: str, base: dict, maps: dict[str, tuple[list[Tensor], list[Tensor]]]) -> None:
        s_all, t_all = ([x.shape[1] for pair in maps.values() for x in pair[side]] for side in (0, 1))
        if base['share'] == 'all':
            for end, config in (('connector', base['connector']), ('t_connector', base['t_connector'])):
                if config:
                    self._fused.add(self._add_connector(f'{name}_{end}', config, s_all, t_all))
        if base['same_channels'] and s_all != t_all:
            raise ValueError(
                f'base: {name!r} compares channel with channel, but the maps of {", ".join(maps)} have {s_all} '
                f"channels in the student and {t_all} in the teacher. Use base='fitnet', or adapt the channels with "
                f"base=dict(preset={name!r}, same_channels=False, share='layer', connector=dict("
                "type='mmkd_plugin.FitNetConnector', in_channels='s_channels', out_channels='t_channels'))")
        index = 0
        for layer, (s_maps, t_maps) in maps.items():
            for level in range(len(s_maps)):
                names = dict(student=base['connector'], teacher=base['t_connector'])
                entries = {}
                for side, connector in names.items():
                    from_student = side == 'student'
                    entry = self.place(layer, level, from_student)
                    if connector:
                        entry.update(self._connect(
                            f'{name}_connector' if from_student else f'{name}_t_connector', connector,
                            base['share'], layer, level, index, s_maps, t_maps))
                        if base['share'] != 'map':
                            entry.pop('data_idx', None)
                    entries[side] = entry
                entries[DATA_SAMPLES] = dict(recorder=DATA_SAMPLES, from_student=True, data_idx=1)
                loss = f'loss_{name}_{map_name(layer, level, len(s_maps))}'
                self.losses_by_base.setdefault(name, []).append(loss)
                self.add_loss(loss, base['loss'], base['weight'],
                              **{argument: entries[role] for argument, role in base['inputs'].items()})
                if base['at_once']:
                    if not hasattr(self.distill_losses[loss], 'per_map'):
                        raise ValueError(f'base.at_once: needs a loss with the method per_map(), got '
                                         f'{_types(base["loss"])}. Leave out at_once')
                    self._at_once.setdefault(name, []).append(loss)
                index += 1

    def _connect(self, name: str, config: dict | list, share: str, layer: str, level: int, index: int,
                 s_maps: list[Tensor], t_maps: list[Tensor]) -> dict:
        """Returns the connector's part of an entry of ``loss_forward_mappings``. Adds the connector at first use."""
        if share == 'all':
            return dict(connector=name, connector_idx=index)
        if share == 'map':
            name = f'{name}_{map_name(layer, level, len(s_maps))}'
            return dict(connector=self._add_connector(name, config, s_maps[level].shape[1], t_maps[level].shape[1]))
        name = f'{name}_{map_name(layer)}'
        if level == 0:
            self._whole.add(self._add_connector(name, config, one_width(layer, 'student', s_maps),
                                                one_width(layer, 'teacher', t_maps)))
        return dict(connector=name, connector_idx=level)

    def build_connectors(self, connectors: dict) -> nn.ModuleDict:
        """As in MMRazor, but raises ``ValueError`` for a value of the wrong type."""
        try:
            return super().build_connectors(connectors)
        except TypeError as error:
            raise ValueError(f'connectors: {connectors} cannot be built: {error}') from error

    def _add_connector(self, name: str, config: dict | list, s_channels: int | list[int],
                       t_channels: int | list[int]) -> str:
        if name in self.connectors:
            raise ValueError(f'connectors: {name!r} is a name that the distiller uses itself. Rename your connector')
        config = fill_channels(config, s_channels, t_channels)
        with DefaultScope.overwrite_default_scope('mmrazor'):
            self.connectors[name] = self.build_connectors({name: config})[name]
        self._written['connectors'][name] = config
        return name

    def add_loss(self, name: str, loss: dict, weight: float = 1.0, **inputs: dict) -> None:
        """Adds a loss with its ``inputs``, each an entry of ``loss_forward_mappings``."""
        if name in self.distill_losses:
            raise ValueError(f'distill_losses.{name}: the distiller uses this name itself. Rename your loss')
        with DefaultScope.overwrite_default_scope('mmrazor'):
            try:
                self.distill_losses[name] = RAZOR_MODELS.build(loss)
            except TypeError as error:
                raise ValueError(f'distill_losses.{name}: {loss} cannot be built: {error}') from error
        self.loss_forward_mappings[name] = inputs
        self.weights[name] = weight
        self._written['distill_losses'][name] = loss
        self._written['loss_forward_mappings'][name] = inputs

    @property
    def loss_names(self) -> list[str]:
        """Names of all losses."""
        return list(self.distill_losses) + (['loss_crosskd_cls', 'loss_crosskd_reg'] if self.crosskd else [])

    def place(self, layer: str, level: int, from_student: bool) -> dict:
        """Returns the place of a map, as an entry of ``loss_forward_mappings``."""
        call, part = self._places[from_student][layer][level]
        entry = dict(recorder=layer, from_student=from_student)
        if call:
            entry['record_idx'] = call
        if part is not None:
            entry['data_idx'] = part
        return entry

    def calls(self, from_student: bool) -> dict[str, int]:
        """Returns how often each layer runs in a forward."""
        return {layer: places[-1][0] + 1 for layer, places in self._places[from_student].items()}

    def maps(self, layer: str, from_student: bool) -> list[Tensor]:
        """Returns all recorded maps of a layer, each (N, C, H, W)."""
        return [ConfigurableDistiller.get_record(self, **self.place(layer, level, from_student))
                for level in range(len(self._places[from_student][layer]))]

    def get_record(self,
                   recorder: str,
                   from_student: bool,
                   record_idx: int = 0,
                   data_idx: int | None = None,
                   connector: str | None = None,
                   connector_idx: int | None = None) -> Any:
        """As in MMRazor, except that a connector runs once per step, even if several losses read it."""
        place = (recorder, from_student, record_idx, data_idx)
        if not connector:
            record = self.read(*place)
        elif connector in self._fused:
            record = self._once((connector, ), lambda: self._for_connector(connector, [
                x for layer in self.layers for x in self.features(layer, from_student)]))
        elif connector in self._whole:
            record = self._once((connector, ), lambda: self._for_connector(connector, self.features(
                recorder, from_student)))
        else:
            record = self._once((connector, *place), lambda: self._for_connector(connector, self.read(*place)))
        return record if connector_idx is None else record[connector_idx]

    def read(self, recorder: str, from_student: bool, record_idx: int, data_idx: int | None) -> Any:
        """Returns the record that a loss or connector gets from a recorder."""
        if recorder not in self.layers:
            return super().get_record(recorder, from_student, record_idx, data_idx)
        places, maps = self._places[from_student][recorder], self.features(recorder, from_student)
        if (record_idx, data_idx) in places:
            return maps[places.index((record_idx, data_idx))]
        return [x for x, (call, _) in zip(maps, places) if call == record_idx]  # all maps of a call

    def features(self, layer: str, from_student: bool) -> list[Tensor]:
        """Returns the maps of a layer that losses and connectors get."""
        return self.maps(layer, from_student)

    def _for_connector(self, connector: str, maps: Any) -> Any:
        """Detaches maps from the student while only the connector is trained, see :class:`.AutoWeight`."""
        if not any(auto.warming_up and connector in self._connectors_of[name] for name, auto in self.autos.items()):
            return maps
        return maps.detach() if isinstance(maps, Tensor) else [x.detach() for x in maps]

    def _once(self, key: tuple, feature: Callable[[], Any]) -> Any:
        """Returns the output of the connector ``key[0]``, which runs once per step."""
        if self._outputs is None:
            return self.connectors[key[0]](feature())
        if key not in self._outputs:
            self._outputs[key] = self.connectors[key[0]](feature())
        return self._outputs[key]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Keeps the outputs of connectors, with their graph, until the losses are computed."""
        self._outputs = {}
        try:
            yield
        finally:
            self._outputs = None

    def compute_distill_losses(self) -> dict[str, Tensor]:
        """Returns the weighted losses of the records."""
        if self._outputs is None:
            with self.step():
                return self.compute_distill_losses()
        losses = self.losses_of(self.loss_forward_mappings)
        if self.crosskd is not None:
            losses.update({name: loss * self.crosskd_weight for name, loss in self.crosskd().items()})
        return losses

    def forget(self) -> None:
        """Releases the records of a step outside the recorders."""
        if self.crosskd is not None:
            self.crosskd.reset()

    def compute_unlabelled_losses(self, names: Collection[str]) -> dict[str, Tensor]:
        """Returns the weighted losses of the records of images without labels.

        Args:
            names: names in ``loss_forward_mappings`` of losses that need no labels.
        """
        with self.step():
            return self.losses_of(names)

    def losses_of(self, names: Collection[str]) -> dict[str, Tensor]:
        """Returns the weighted losses of these names."""
        def inputs_of(name: str) -> dict[str, Any]:
            return {argument: self.get_record(**entry) for argument, entry in self.loss_forward_mappings[name].items()}

        groups = [[name for name in group if name in names] for group in self._at_once.values()]
        together = {name for group in groups for name in group}
        losses = {name: self.distill_losses[name](**inputs_of(name)) for name in names if name not in together}
        for group in filter(None, groups):
            given = [inputs_of(name) for name in group]
            values = self.distill_losses[group[0]].per_map(**{key: [each[key] for each in given] for key in given[0]})
            losses.update(zip(group, values.unbind()))
        for name in names:
            auto = self.auto_of(name)
            weight = self.weights.get(name, 1.0) if auto is None else auto.weight.clone()  # it changes during the step
            if auto is not None or weight != 1:
                losses[name] = losses[name] * weight
        return {name: losses[name] for name in names}

    def auto_of(self, loss: str) -> AutoWeight | None:
        """Returns the measured weight of a loss, or None."""
        return next((auto for name, auto in self.autos.items() if loss in self.losses_by_base[name]), None)

    def gradient_report(self, task: Tensor, losses: dict[str, Tensor]) -> str | None:
        """Returns the gradient norms of each part of the distillation at the layers, relative to the task, or None.

        For the arguments, see :meth:`measure`.
        """
        groups = {name: [losses[loss] for loss in names] for name, names in self.losses_by_base.items()
                  if not (name in self.autos and self.autos[name].warming_up)}
        groups['DAM'] = [loss for name, loss in losses.items() if name.startswith('loss_dam_')]
        sums = {name: sum(parts) for name, parts in groups.items() if parts}
        outputs = self._outputs_with_gradient()
        if not (outputs and sums and all(loss.requires_grad for loss in sums.values())):
            return None
        try:
            task_norm, *norms = gradient_norms([task, *sums.values()], outputs).tolist()
        except RuntimeError:  # activation checkpointing does not support these gradients
            return None
        if not task_norm > 0:
            return None
        return ', '.join(f'{name} {norm / task_norm:.3g}' for name, norm in zip(sums, norms))

    @property
    def measuring(self) -> bool:
        """Whether to call :meth:`measure` in this iteration."""
        return any(auto.measuring for auto in self.autos.values())

    def measure(self, task: Tensor, losses: dict[str, Tensor]) -> None:
        """Updates the measured weights.

        Args:
            task: the sum of the student's own losses.
            losses: the result of :meth:`compute_distill_losses` in this step.

        Raises:
            ValueError: the layers are frozen, the task's loss does not depend on them, or the student has activation
                checkpointing after a layer.
        """
        autos = {name: auto for name, auto in self.autos.items() if auto.measuring}
        outputs = self._outputs_with_gradient()
        sums = [sum(losses[loss] for loss in self.losses_by_base[name]) for name in autos]
        task_norm, *norms = [task.new_zeros(())] * (1 + len(sums))
        if not all(auto.warming_up and auto.step for auto in autos.values()):  # the first iteration shows errors
            if not outputs:
                raise ValueError("loss_weight: 'auto' needs gradients at the layers, but "
                                 f'{", ".join(self.layers)} of the student are frozen. Give a number')
            try:
                if not all(auto.step for auto in autos.values()) and not reaches(task, outputs):
                    raise ValueError("loss_weight: 'auto' compares gradients at the layers, but the task's loss does "
                                     f'not depend on {", ".join(self.layers)} of the student. Give a number')
                task_norm, *norms = gradient_norms([task, *sums], outputs)
            except RuntimeError as error:
                if 'Checkpointing' not in str(error):
                    raise
                raise ValueError("loss_weight: 'auto' needs gradients at the layers, which activation checkpointing "
                                 '(with_cp=True) after a layer does not support. Set with_cp=False in the student, or '
                                 'give a number') from error
        for auto, norm in zip(autos.values(), norms):
            auto.update(task_norm, norm)

    def _outputs_with_gradient(self) -> list[Tensor]:
        """Returns the student's outputs that the recorded maps are derived from, without frozen ones."""
        return [origin(x)[0] for layer in self.layers for x in self.maps(layer, True) if x.requires_grad]

    def weight_of(self, name: str) -> float:
        """Returns the weight of a loss; 0 means that the loss is always zero."""
        if name.startswith('loss_crosskd_'):
            return self.crosskd_weight * getattr(self.crosskd, f'{name.removeprefix("loss_crosskd_")}_loss_weight')
        inner = getattr(self.distill_losses[name], 'loss_weight', 1.0) if name in self.distill_losses else 1.0
        return self.weights.get(name, 1.0) * (inner if isinstance(inner, (int, float)) else 1.0)


def _bases(base: str | dict | Sequence[str | dict] | None, loss_weight: float | Sequence[float] | None) -> tuple[
        list[tuple[str, dict]], tuple[float, dict] | None]:
    """Returns the names and complete dicts of the bases, and the weight and arguments of CrossKD or None."""
    several = isinstance(base, (list, tuple))
    given = list(base) if several else [] if base is None else [base]
    if loss_weight is None:
        weights = [None] * len(given)
    else:
        weights = list(loss_weight) if isinstance(loss_weight, (list, tuple)) else [loss_weight]
        if len(weights) != len(given):
            raise ValueError(f'loss_weight: expected a number for each base, {len(given)} in all, got {loss_weight!r}')
        for weight in weights:
            if weight != 'auto':
                check_number('loss_weight', weight, least=0)
    found, crosskd = [], None
    for i, (each, weight) in enumerate(zip(given, weights)):
        if each == 'crosskd' or isinstance(each, dict) and each.get('preset') == 'crosskd':
            arguments = {key: value for key, value in (each if isinstance(each, dict) else {}).items()
                         if key not in ('preset', 'weight')}
            own = check_number('base.weight', each.get('weight', 1.0) if isinstance(each, dict) else 1.0, least=0)
            if crosskd is not None:
                raise ValueError("base: 'crosskd' is given twice")
            if weight == 'auto':
                raise ValueError("loss_weight: 'auto' measures gradients at layers, but crosskd has no layers. Give a "
                                 'number')
            crosskd = own if weight is None else weight, arguments
            continue
        name, whole = resolve(each, f'base[{i}]' if several else 'base')
        weight = whole['weight'] if weight is None else weight
        if weight == 'auto' and not whole['weight']:
            raise ValueError(f"base.weight: 'auto' starts from the weight of {name!r}, got 0. Give a positive number")
        found.append((name, dict(whole, auto=weight == 'auto', weight=whole['weight'] if weight == 'auto' else weight)))
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise ValueError(f'base: two bases are named {max(names, key=names.count)!r}. Give one of them another name=')
    return found, crosskd


def _types(config: dict | Sequence[dict]) -> str:
    return ' + '.join(str(each.get('type')) for each in (config if isinstance(config, (list, tuple)) else [config]))


def _pairs(layers: Sequence[str | Sequence[str]]) -> dict[str, tuple[str, str]]:
    """Returns (student's layer, teacher's layer) by recorder name, which is the student's layer."""
    pairs = {}
    for layer in layers if isinstance(layers, (list, tuple)) else [None]:
        pair = (layer, layer) if isinstance(layer, str) else layer
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
            raise ValueError('layers: expected a list of names, or of pairs (student\'s, teacher\'s), such as '
                             f'["backbone.layer3", "neck"], got {layers!r}')
        if pair[0] in pairs:
            raise ValueError(f'layers: {pair[0]!r} is given twice')
        pairs[pair[0]] = tuple(pair)
    if not pairs:
        raise ValueError('layers: the list is empty. Give at least one layer, such as "neck"')
    return pairs


def map_name(layer: str, level: int = 0, levels: int = 1) -> str:
    """Returns the end of the name of a loss or connector: the layer, and the level if there are several."""
    return layer.replace('.', '_') + (f'_{level}' if levels > 1 else '')


def exact_zero(module: nn.Module) -> Tensor | float:
    """Returns a zero with zero gradients for all trainable parameters, as DistributedDataParallel needs."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.stack([parameter.flatten()[:0].sum() for parameter in parameters]).sum() if parameters else 0.0


def one_width(layer: str, side: str, maps: Sequence[Tensor]) -> int:
    """Returns the channels of all maps of a layer.

    Raises:
        ValueError: they differ.
    """
    channels = [x.shape[1] for x in maps]
    if len(set(channels)) > 1:
        raise ValueError(f'layers: {layer!r} of the {side} gives maps of {channels} channels, but all maps of a layer '
                         'share one connector and one DAM. Give the stages as separate layers')
    return channels[0]
