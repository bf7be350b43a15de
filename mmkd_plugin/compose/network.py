"""A model as the composer sees it: what its backbone and neck put out, and what its head reads."""
from collections import Counter

from mmengine.registry import DATASETS
from mmrazor.models.task_modules import RecorderManager
from torch import Tensor, nn

from ..config.cfg_path import build_cfg_path, read_cfg_path
from ..models.algorithms.inherit import num_classes
from ..models.area_detectors.heatmap_anchor import level_stride
from ..models.recording import record_blank_image

IMAGE = 224  # side of the blank image of record_blank_image
Size = tuple[int, int]  # height and width


class Network:
    """The model of a config, with random weights, and the feature maps that it makes of one blank image.

    Args:
        name: a library's config (``mmdet::...``) or a file.
        field: begins error messages.

    Raises:
        ValueError: there is no such config, or it is one of a distillation, or its
            model is no detector or classifier, or cannot run.
    """

    def __init__(self, name: str, field: str) -> None:
        from mmdet.models.detectors import BaseDetector
        from mmpretrain.models.classifiers import BaseClassifier
        self.name = name
        self.cfg = read_cfg_path(name, field)
        if 'architecture' in self.cfg.model:
            raise ValueError(f'{field}: {name!r} is a distillation already; name the config of the plain model')
        self.model = build_cfg_path(name, field)
        if not isinstance(self.model, (BaseDetector, BaseClassifier)):
            raise ValueError(f'{field}: expected a detector of MMDetection or a classifier of MMPretrain, {name!r} is '
                             f'{type(self.model).__name__}')
        self.is_detector = isinstance(self.model, BaseDetector)
        self.classes = num_classes(self.model)
        self.calls: Counter[str] = Counter()  # how often each module ran
        self.maps: dict[str, list[Tensor]] = {}  # (1, C, H, W) each, by module, in the order of their last calls
        if isinstance(getattr(self.model, 'backbone', None), nn.Module):
            self._look()

    def _look(self) -> None:
        def note(name: str):
            def hook(module: nn.Module, args: tuple, output) -> None:
                self.calls[name] += 1
                maps = list(output) if isinstance(output, (list, tuple)) else [output]
                if maps and all(isinstance(x, Tensor) and x.dim() == 4 for x in maps):
                    self.maps[name] = maps
            return hook

        hooks = [module.register_forward_hook(note(name)) for name, module in self.model.named_modules()
                 if name.split('.')[0] in ('backbone', 'neck')]
        end = 'neck' if isinstance(getattr(self.model, 'neck', None), nn.Module) else 'backbone'
        recorders = RecorderManager(dict(end=dict(type='ModuleOutputs', source=end)))
        recorders.initialize(self.model)
        try:
            record_blank_image(self.model, recorders)
        except RuntimeError as error:
            raise ValueError(f'{self.name}: {type(self.model).__name__} cannot run on a blank image of '
                             f'{IMAGE} x {IMAGE}, by which layers are measured: {error}') from error
        finally:
            for hook in hooks:
                hook.remove()

    def sizes(self, module: str) -> list[Size]:
        """Returns the size of each map that the module puts out."""
        return [tuple(x.shape[2:]) for x in self.maps.get(module, [])]

    def levels(self) -> dict[Size, str]:
        """Returns, by size, the modules whose only output is a level of the neck."""
        found = {}
        for level in self.maps.get('neck', []):
            names = [name for name, maps in self.maps.items()
                     if len(maps) == 1 and maps[0] is level and self.calls[name] == 1]
            if names:
                found[tuple(level.shape[2:])] = min(names, key=lambda name: name.count('.'))
        return found

    def stages(self) -> dict[Size, str]:
        """Returns, by size from shallow to deep, the last of the backbone's outermost modules with such a map.

        One position is no map but a pooled vector.
        """
        found = {}
        for name, maps in self.maps.items():
            parents = name.split('.')[:-1]
            inside = any(self.calls['.'.join(parents[:i])] for i in range(2, len(parents) + 1))
            if not name.startswith('backbone.') or inside or not self.calls[name] == len(maps) == 1:
                continue
            size = tuple(maps[0].shape[2:])
            passed_on = size in found and self.maps[found[size]][0] is maps[0]  # by an nn.Identity at the end
            if size != (1, 1) and not passed_on:
                found[size] = name
        if len(self.sizes('backbone')) == 1:
            found.setdefault(self.sizes('backbone')[0], 'backbone')
        return dict(sorted(found.items(), reverse=True))

    def logits(self) -> str | None:
        """Returns the layer whose output a softmax over the classes reads; None where there is not exactly one."""
        head = getattr(self.model, 'head', None)
        if not isinstance(head, nn.Module) or any(getattr(module, 'use_sigmoid', False) for module in head.modules()):
            return None
        found = [f'head.{name}' for name, module in head.named_modules()
                 if isinstance(module, nn.Linear) and [module.out_features] == self.classes]
        return found[0] if len(found) == 1 else None

    def class_names(self) -> tuple[str, ...] | None:
        """Returns the names of the classes of the training data; None where the config does not tell."""
        dataset = self.cfg.get('train_dataloader', {}).get('dataset', {})
        while 'dataset' in dataset or 'datasets' in dataset:  # wrappers such as RepeatDataset and ConcatDataset
            dataset = dataset['dataset'] if 'dataset' in dataset else dataset['datasets'][0]
        names = (dataset.get('metainfo') or {}).get('classes')
        if names is None and dataset.get('type'):
            with DATASETS.switch_scope_and_registry(self.cfg.get('default_scope')) as registry:
                names = getattr(registry.get(dataset['type']), 'METAINFO', {}).get('classes')
        return tuple(names) if isinstance(names, (list, tuple)) else None


def same_classes(student: Network, teacher: Network) -> bool:
    """Whether both tell equally many classes apart and nothing says that these have other names."""
    names = student.class_names(), teacher.class_names()
    return student.classes == teacher.classes and (None in names or names[0] == names[1])


def stride(length: int, image: int = IMAGE) -> int | float:
    """Returns the pixels per cell of a map, whole where they are."""
    pixels = level_stride(image, length)
    return int(pixels) if pixels == int(pixels) else round(pixels, 1)
