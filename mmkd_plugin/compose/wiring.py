"""Pairing the layers of two networks, and finding the modules that the student can inherit."""
import math
from itertools import product

from torch import nn

from ..models.algorithms.inherit import num_classes
from .network import DEEP, EARLY, Network, same_classes, stride


def propose_layers(student: Network, teacher: Network, stages: slice, one_width: bool) -> list[tuple[str, str]]:
    """Returns pairs (student, teacher) of modules whose maps have the same strides.

    It returns the whole neck if the strides of all its levels agree, else the levels whose strides agree, else stages
    of the backbone, else the whole backbone. Every map depends on the image and, in the student, on trained weights.
    No stage is among the first layers, and the last one is deep. If no strides agree, it pairs the deep stages with
    the nearest strides; their maps differ in size.

    Args:
        stages: which of the common stages to use, from shallow to deep.
        one_width: whether all maps of a module must have the same channels.

    Raises:
        ValueError: one of the networks has no feature maps.
    """
    def agree(module: str) -> bool:
        if not student.sizes(module) or student.sizes(module) != teacher.sizes(module):
            return False
        if not (student.distillable(module) and teacher.distillable(module)):
            return False
        return not one_width or all(len(network.widths(module)) == 1 for network in (student, teacher))

    if agree('neck'):
        return [('neck', 'neck')]
    s_found, t_found = student.levels(), teacher.levels()
    common = [size for size in s_found if size in t_found]
    if common:
        return [(s_found[size], t_found[size]) for size in common]
    s_found, t_found = student.stages(), teacher.stages()
    common = [size for size in s_found if size in t_found and _depth(student, teacher, s_found, t_found, size) > EARLY]
    if common and _depth(student, teacher, s_found, t_found, common[-1]) > DEEP:
        return [(s_found[size], t_found[size]) for size in common[stages] or common]
    if agree('backbone'):
        return [('backbone', 'backbone')]
    s_deep, t_deep = ([size for size in found if network.layers[found[size]].depth > DEEP]
                      for network, found in ((student, s_found), (teacher, t_found)))
    if s_deep and t_deep:
        nearest = min(product(reversed(s_deep), reversed(t_deep)), key=lambda sizes: abs(math.log(
            sizes[0][0] / sizes[1][0])))
        return [(s_found[nearest[0]], t_found[nearest[1]])]
    raise ValueError(f'layers: no feature maps to compare: {_strides_of(student)}; {_strides_of(teacher)}. '
                     'Name pairs with --layers STUDENT=TEACHER')


def _depth(student: Network, teacher: Network, s_found: dict, t_found: dict, size: tuple[int, int]) -> float:
    return min(student.layers[s_found[size]].depth, teacher.layers[t_found[size]].depth)


def _strides_of(network: Network) -> str:
    found = {**network.stages(), **network.levels()}
    given = ', '.join(f'{stride(size[0], network.image)} ({name})' for size, name in found.items())
    trained = ' and on trained weights' if network.is_student else ''
    return f'{network.name} has feature maps of stride {given}' if given else (
        f'{network.name} (backbone {type(network.model.backbone).__name__}) has no module with feature maps '
        f'(N, C, H, W) or tokens (N, L, C) that depend on the image{trained}')


def propose_inherit(student: Network, teacher: Network) -> list[str]:
    """Returns modules, other than the backbone, that can start from the teacher's weights.

    A module must have the same type in student and teacher. If the classes differ, modules with classes do not count.
    At least one head must have the same type, because the other modules serve the heads. The levels of a neck must
    have the same strides. If all layers of a module agree in name and shape, the module is returned, else those of its
    children that do. For children of a neck, it is enough that more than half of the layers agree, because one of them
    may read a wider backbone.
    """
    pairs = {name: (module, getattr(teacher.model, name, None)) for name, module in student.model.named_children()
             if name not in ('backbone', 'data_preprocessor')}
    pairs = {name: pair for name, pair in pairs.items() if type(pair[0]) is type(pair[1])}
    if not any('head' in name for name in pairs):
        return []
    if student.sizes('neck') != teacher.sizes('neck'):
        pairs.pop('neck', None)
    if not same_classes(student, teacher):
        pairs = {name: pair for name, pair in pairs.items() if not num_classes(student.model, name)}
    names = []
    for name, (s_module, t_module) in pairs.items():
        if layers_of(s_module) == layers_of(t_module) != {}:
            names.append(name)
            continue
        t_children = dict(t_module.named_children())
        for child, module in s_module.named_children():
            s_layers, t_layers = layers_of(module), layers_of(t_children.get(child, nn.Identity()))
            mostly = name == 'neck' and 2 * len(s_layers.items() & t_layers.items()) > len(s_layers)
            if s_layers == t_layers != {} or mostly:
                names.append(f'{name}.{child}')
    return names


def layers_of(module: nn.Module) -> dict[str, tuple]:
    """Returns the names and shapes of each layer's own weights in ``module``."""
    layers = {name: tuple((key, tuple(weight.shape)) for key, weight in layer.named_parameters(recurse=False))
              for name, layer in module.named_modules()}
    return {name: weights for name, weights in layers.items() if weights}
