"""A model for the composer: outputs of its backbone and neck, and inputs of its head."""
from collections import Counter
from dataclasses import dataclass

import torch
from mmengine.config import Config
from torch import Tensor, nn

from ..config.cfg_path import read_cfg_path
from ..config.classes import class_names
from ..models.algorithms.inherit import num_classes
from ..models.area_detectors.heatmap_anchor import level_stride
from ..models.dummy_input import input_channels
from ..models.recording import evaluating
from ..models.tokens import to_map
from .building import answering, build_random, scope_of
from .images import image_sides, synthetic_samples

FLAT = 1e-3  # relative spread of a map's energy below which the map counts as flat
EARLY, DEEP = 0.15, 0.5  # fraction of the backbone's modules that ran before the output of a layer
Size = tuple[int, int]  # height and width


@dataclass
class Layer:
    """The output of a module for two random images."""
    maps: list[Tensor]  # (2, C, H, W) each; tokens are converted
    depth: float = 1.0  # fraction of the backbone's modules that ran before it ended, 0 to 1

    @property
    def sizes(self) -> list[Size]:
        return [tuple(x.shape[2:]) for x in self.maps]

    @property
    def depends(self) -> bool:
        """Whether all maps depend on the image. A position embedding does not."""
        return all(float((x[0] - x[1]).abs().max()) > 1e-6 * float(x.abs().max()) for x in self.maps)

    @property
    def trained(self) -> bool:
        """Whether all maps depend on a trained weight. The network must have run with gradient."""
        return all(x.requires_grad for x in self.maps)

    @property
    def flat(self) -> bool:
        return any(is_flat(x) for x in self.maps)


@torch.no_grad()
def is_flat(x: Tensor) -> bool:
    """Whether the energy of a map (N, C, H, W), the sum of squares over channels, is the same at every position.

    With random weights, this is the case after a normalisation over channels.
    """
    energy = x.float().square().sum(1).flatten(1)
    return energy.shape[1] > 1 and bool((energy.std(1) < FLAT * energy.mean(1)).all())


def _same_storage(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


class Network:
    """The model of a config with random parameters, and its feature maps for two random images.

    Args:
        name: a library's config (``mmdet::...``) or a file.
        field: the argument that names it; error messages begin with it.
        student: the network whose images it gets; None if it is the student itself.

    Raises:
        ValueError: the config does not exist or is a distillation, or its model is
            not a detector or classifier, or cannot be built or run.
    """

    def __init__(self, name: str, field: str, student: 'Network | None' = None) -> None:
        from mmdet.models.detectors import BaseDetector
        from mmpretrain.models.classifiers import BaseClassifier
        self.name, self.field = name, field
        self.cfg = read_plain(name, field)
        with answering(f'{field}: {name!r} cannot be built here',
                       '. It may need a package that is not installed, or a file that is missing'):
            self.model = build_random(self.cfg.model, scope_of(self.cfg, name))
        if not isinstance(self.model, (BaseDetector, BaseClassifier)):
            raise ValueError(f'{field}: {name!r} is a {type(self.model).__name__}, expected a detector of MMDetection '
                             'or a classifier of MMPretrain. Name another config')
        if not isinstance(getattr(self.model, 'backbone', None), nn.Module):
            raise ValueError(f'{field}: {type(self.model).__name__} of {name!r} wraps another model and has no '
                             'backbone of its own. Name a config of the wrapped model')
        with answering(f'{field}: the parameters of {name!r} cannot be initialised'):
            self.model.init_weights()
        self.is_detector = isinstance(self.model, BaseDetector)
        self.classes = num_classes(self.model)
        self.is_student = student is None
        self.calls: Counter[str] = Counter()  # how often each module ran
        self.layers: dict[str, Layer] = {}  # by module, in the order of their last calls
        self.images = student.images if student else image_sides(self.cfg, self.is_detector)
        self.image = self._look_at_some_size()
        self.images = self.images[self.images.index(self.image):]  # this one and larger ones
        if student and student.image != self.image:
            student.look_at(self)

    def _look_at_some_size(self) -> int:
        """Returns the first image side at which the network runs."""
        sides = self.images
        for side in sides:
            try:
                self._look(side)
                return side
            except Exception as error:  # of any model
                failure = error
        whose = 'random images' if self.is_student else "the student's images"
        with answering(f'{self.field}: {self.name!r} does not run on {whose} of '
                       f'{" or ".join(f"{side} x {side}" for side in sides)}',
                       '' if self.is_student else '. Use images of the size that it was built for'):
            raise failure

    def look_at(self, other: 'Network') -> None:
        """Runs the images of another network."""
        self.image, self.images = other.image, other.images
        self._look(self.image)

    def _look(self, side: int) -> None:
        """Fills ``calls`` and ``layers`` by running two random images."""
        self.calls.clear()
        self.layers.clear()
        finished: dict[str, int] = {}
        leaves = 0

        def note(name: str):
            def hook(module: nn.Module, args: tuple, output) -> None:
                nonlocal leaves
                leaves += next(module.children(), None) is None
                self.calls[name] += 1
                finished[name] = leaves
                self.layers.pop(name, None)
                outputs = list(output) if isinstance(output, (list, tuple)) else [output]
                maps = [self._as_map(x, side) for x in outputs]
                if maps and all(x is not None for x in maps):
                    self.layers[name] = Layer(maps)
            return hook

        hooks = [module.register_forward_hook(note(name)) for name, module in self.model.named_modules()
                 if name.split('.')[0] in ('backbone', 'neck')]
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, input_channels(self.model), side, side, generator=generator)
        self.model.train()  # some backbones freeze their first stages here
        try:
            with evaluating(self.model), torch.set_grad_enabled(self.is_student):
                self.features = self.model.extract_feat(images)
        finally:
            for hook in hooks:
                hook.remove()
        total = finished['backbone']
        for name, layer in self.layers.items():
            if name.startswith('backbone'):
                layer.depth = finished[name] / max(total, 1)

    def _as_map(self, x, side: int) -> Tensor | None:
        """Returns the output of a module as (2, C, H, W) if it is feature maps or tokens, else None."""
        if not isinstance(x, Tensor) or x.dim() not in (3, 4) or len(x) != 2 or not x.is_floating_point():
            return None
        if x.dim() == 3:
            try:
                x = to_map(x, (side, side))
            except ValueError:
                return None
        return x if x.shape[2] == x.shape[3] else None  # (N, H, W, C) does not count

    def sizes(self, module: str) -> list[Size]:
        """Returns the size of each map of the module."""
        return self.layers[module].sizes if module in self.layers else []

    def widths(self, module: str) -> set[int]:
        """Returns the numbers of channels of its maps."""
        return {x.shape[1] for x in self.layers[module].maps} if module in self.layers else set()

    def distillable(self, module: str) -> bool:
        """Whether a module's maps depend on the image and, in the student, on trained weights."""
        layer = self.layers.get(module)
        return layer is not None and layer.depends and (layer.trained or not self.is_student)

    def levels(self) -> dict[Size, str]:
        """Returns, by size, the modules whose only output is one level of the neck."""
        found = {}
        for level in self.layers['neck'].maps if 'neck' in self.layers else []:
            names = [name for name, layer in self.layers.items()
                     if len(layer.maps) == 1 and layer.maps[0] is level and self.calls[name] == 1]
            if names:
                found[tuple(level.shape[2:])] = min(names, key=lambda name: name.count('.'))
        return {size: name for size, name in found.items() if self.distillable(name)}

    def stages(self) -> dict[Size, str]:
        """Returns, by size from shallow to deep, the last of the backbone's outermost modules with a map of that size.

        A module counts if its map depends on the image and, in a student, on trained weights. If the energy of its map
        is the same everywhere, as after a normalisation, the module before it is returned instead. A map with one
        position is a pooled vector and does not count.
        """
        found: dict[Size, str] = {}
        candidates = {name for name, layer in self.layers.items()
                      if name.startswith('backbone.') and len(layer.maps) == self.calls[name] == 1
                      and layer.sizes[0] != (1, 1) and self.distillable(name)}
        for name, layer in self.layers.items():
            parents = name.split('.')[:-1]
            if name not in candidates or any('.'.join(parents[:i]) in candidates for i in range(2, len(parents) + 1)):
                continue
            before = self.layers.get(found.get(layer.sizes[0], ''))
            passed_on = before and _same_storage(before.maps[0], layer.maps[0])  # by nn.Identity or a padding of 0
            if before is None or not passed_on and (before.flat or not layer.flat):
                found[layer.sizes[0]] = name
        if len(self.sizes('backbone')) == 1 and self.distillable('backbone'):
            found.setdefault(self.sizes('backbone')[0], 'backbone')
        return dict(sorted(found.items(), reverse=True))

    def logits(self) -> str | None:
        """Returns the layer whose output is the input of the head's softmax cross-entropy, or None.

        It compares the input of the loss with the outputs of layers. A head that scales the output of its last layer or
        adds a margin, such as ArcFace's, has no such layer.
        """
        head = getattr(self.model, 'head', None)
        loss = getattr(head, 'loss_module', None)
        if type(loss).__name__ not in ('CrossEntropyLoss', 'LabelSmoothLoss') or any(
                getattr(module, 'use_sigmoid', False) for module in loss.modules()):
            return None
        read, outputs = [], {}

        def note(name: str):
            def hook(module: nn.Module, args: tuple, output) -> None:
                outputs[name] = output
            return hook

        hooks = [module.register_forward_hook(note(f'head.{name}')) for name, module in head.named_modules()
                 if name and f'{name}.'.split('.')[0] != 'loss_module']
        hooks.append(loss.register_forward_pre_hook(lambda _, args: read.extend(args[:1])))
        try:
            with evaluating(self.model), torch.no_grad():
                head.loss(self.features, synthetic_samples(self.model, 2))
        except Exception:  # a head without a loss has no such logits
            return None
        finally:
            for hook in hooks:
                hook.remove()
        names = [name for name, output in outputs.items() if read and output is read[0]]
        return min(names, key=lambda name: name.count('.')) if len(read) == 1 and names else None


def read_plain(name: str, field: str) -> Config:
    """Returns the config of a plain model.

    Raises:
        ValueError: the config does not exist, cannot be read, or is a distillation.
    """
    try:
        cfg = read_cfg_path(name, field)
    except ValueError:
        raise
    except Exception as error:  # of Python in the config
        with answering(f'{field}: the config {name!r} cannot be read'):
            raise error
    if not isinstance(cfg.model, dict):
        raise ValueError(f'{field}: model of {name!r} must be a dict, got {type(cfg.model).__name__}')
    if 'teacher_config' in cfg.model:
        raise ValueError(f'{field}: {name!r} ({cfg.model.get("type")}) has a teacher of its own in teacher_config. '
                         'Name the config of the plain student')
    return cfg


def same_classes(student: Network, teacher: Network) -> bool:
    """Whether both have the same number of classes and, if known, the same class names."""
    names = class_names(student.cfg), class_names(teacher.cfg)
    return student.classes == teacher.classes and (None in names or names[0] == names[1])


def stride(length: int, image: int) -> int | float:
    """Returns the pixels per cell of a map, as an int if it is whole."""
    pixels = level_stride(image, length)
    return int(pixels) if pixels == int(pixels) else round(pixels, 1)
