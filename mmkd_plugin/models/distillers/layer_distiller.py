"""What the distillers of AMD and SoKD share: layers named in a short list."""
from abc import abstractmethod
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmrazor.models.distillers import ConfigurableDistiller
from mmrazor.models.task_modules import RecorderManager
from mmrazor.registry import MODELS
from torch import Tensor, nn

from ..recording import check_sources, record_blank_image


class LayerDistiller(ConfigurableDistiller):
    """MMRazor's ``ConfigurableDistiller`` that writes recorders, losses and mappings itself.

    Each of ``layers`` gives a recorder of that name in student and teacher. How
    many maps the layer puts out (``'neck'``: one a pyramid level) is learnt from
    one blank image when the models are there; then :meth:`wire` is called.
    :meth:`written_config` shows the result.

    Args:
        layers: names of modules, each the same in student and teacher or a
            pair (student's, teacher's). None, where the subclass allows it: none.
        student_recorders, teacher_recorders, connectors, distill_losses,
            loss_forward_mappings: further ones, as in ``ConfigurableDistiller``.

    Raises:
        ValueError: ``layers`` is no list of names, or shares a name with a
            recorder; when the models are there: a layer is not in its model, or
            puts out something other than feature maps (N, C, H, W).
    """

    def __init__(self,
                 layers: Sequence[str | Sequence[str]] | None,
                 student_recorders: dict | None = None,
                 teacher_recorders: dict | None = None,
                 connectors: dict | None = None,
                 distill_losses: dict | None = None,
                 loss_forward_mappings: dict | None = None,
                 **kwargs) -> None:
        pairs = {} if layers is None else _pairs(layers)
        clash = set(pairs) & (set(student_recorders or {}) | set(teacher_recorders or {}))
        if clash:
            raise ValueError(f'layers: a recorder is named {min(clash)!r} too; rename the recorder')
        self._written = dict(
            type='mmrazor.ConfigurableDistiller',
            student_recorders=dict(student_recorders or {}, **_recorders(pairs, 0)),
            teacher_recorders=dict(teacher_recorders or {}, **_recorders(pairs, 1)),
            connectors=dict(connectors or {}),
            distill_losses=dict(distill_losses or {}),
            loss_forward_mappings=dict(loss_forward_mappings or {}))
        super().__init__(**{k: v for k, v in self._written.items() if k != 'type'}, **kwargs)
        self.layers = list(pairs)
        self.pairs = [(layer, layer) for layer in self.layers]

    def written_config(self) -> str:
        """Returns, once the models are there, the ``ConfigurableDistiller`` config that does the same, as Python."""
        return Config(dict(distiller=self._written)).pretty_text

    def prepare_from_student(self, model: nn.Module) -> None:
        check_sources(self._written['student_recorders'], model, 'layers')
        super().prepare_from_student(model)
        _record(model, self.student_recorders, [pair[0] for pair in self.pairs])

    def prepare_from_teacher(self, model: nn.Module) -> None:
        """Also wires the layers, so that every part exists before an optimiser is built."""
        check_sources(self._written['teacher_recorders'], model, 'layers')
        super().prepare_from_teacher(model)
        _record(model, self.teacher_recorders, [pair[1] for pair in self.pairs])
        maps = [(self.maps(student, True), self.maps(teacher, False)) for student, teacher in self.pairs]
        for (name, _), (s_maps, t_maps) in zip(self.pairs, maps):
            if len(s_maps) != len(t_maps):
                raise ValueError(f'layers: {name!r} gives {len(s_maps)} feature maps in the student and '
                                 f'{len(t_maps)} in the teacher')
        self.wire(maps)

    @abstractmethod
    def wire(self, maps: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> None:
        """Adds what is to be done with the maps of each of ``self.pairs``, recorders in student and teacher.

        Args:
            maps: by pair, what student and teacher make of one blank image, equally many maps.
        """

    def add_loss(self, name: str, loss: dict, **inputs: dict) -> None:
        """Adds a loss and where it reads its ``inputs``, each an entry of ``loss_forward_mappings``."""
        if name in self.distill_losses:
            raise ValueError(f'distill_losses.{name}: the distiller writes a loss of this name itself; rename yours')
        with DefaultScope.overwrite_default_scope('mmrazor'):
            self.distill_losses[name] = MODELS.build(loss)
        self.loss_forward_mappings[name] = inputs
        self._written['distill_losses'][name] = loss
        self._written['loss_forward_mappings'][name] = inputs

    def record(self, layer: str, level: int, from_student: bool) -> dict:
        """Returns where the map is, as an entry of ``loss_forward_mappings``."""
        entry = dict(recorder=layer, from_student=from_student)
        if not isinstance(self.get_record(**entry), Tensor):
            entry['data_idx'] = level
        return entry

    def maps(self, layer: str, from_student: bool) -> Sequence[Tensor]:
        """Returns all that is recorded of a layer.

        Raises:
            ValueError: it is something other than feature maps.
        """
        maps = self.get_record(layer, from_student)
        maps = [maps] if isinstance(maps, Tensor) else maps
        if not (isinstance(maps, (list, tuple)) and maps
                and all(isinstance(x, Tensor) and x.dim() == 4 for x in maps)):
            given = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                     for x in (maps if isinstance(maps, (list, tuple)) else [maps])]
            raise ValueError(f'layers: {layer!r} of the {"student" if from_student else "teacher"} must put out '
                             f'feature maps (N, C, H, W), got {given}')
        return maps


def _pairs(layers: Sequence[str | Sequence[str]]) -> dict[str, tuple[str, str]]:
    """Returns (student's layer, teacher's layer) by recorder name, which is the student's layer."""
    pairs = {}
    for layer in layers if isinstance(layers, (list, tuple)) else [None]:
        pair = (layer, layer) if isinstance(layer, str) else layer
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
            raise ValueError('layers must be a list of names, or of pairs (student\'s, teacher\'s), such as '
                             f'["backbone.layer3", "neck"], got {layers!r}')
        if pair[0] in pairs:
            raise ValueError(f'layers names {pair[0]!r} twice')
        pairs[pair[0]] = tuple(pair)
    if not pairs:
        raise ValueError('layers is empty: name at least one, such as "neck"')
    return pairs


def map_name(layer: str, level: int, levels: int) -> str:
    """The end of a loss's name: the layer, and the level where there are several."""
    return layer.replace('.', '_') + (f'_{level}' if levels > 1 else '')


def exact_zero(module: nn.Module) -> Tensor | float:
    """A zero that gives every trainable parameter a zero gradient, as DistributedDataParallel wants it."""
    return sum(parameter.flatten()[:0].sum() for parameter in module.parameters() if parameter.requires_grad)


def _record(model: nn.Module, recorders: RecorderManager, names: Sequence[str]) -> None:
    """Fills the recorders of these names from a blank image; others, which may need ground truth, are left out."""
    wanted = RecorderManager()
    wanted.recorders.update({name: recorders.get_recorder(name) for name in names})
    record_blank_image(model, wanted)


def _recorders(pairs: dict[str, tuple[str, str]], side: int) -> dict[str, dict]:
    return {name: dict(type='ModuleOutputs', source=pair[side]) for name, pair in pairs.items()}
