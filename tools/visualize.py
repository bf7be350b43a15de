"""Draws predictions and feature maps of teacher and student, one picture per image, before and after training.

The first row has the predictions of the teacher and of the student before and after training. The rows below have the
attention at every map of the distiller's layers and, if the distillation has them, AMD's positive and negative maps and
DAM's heatmaps and areas.
"""
import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import torch
from mmengine.config import Config, DictAction
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import set_random_seed
from mmengine.runner.checkpoint import load_state_dict
from mmengine.structures import BaseDataElement
from torch import Tensor

import mmkd_plugin  # noqa: F401  makes MMRazor importable
from mmkd_plugin.checkpoints.reading import read_checkpoint
from mmkd_plugin.config.loading import read_config
from mmkd_plugin.deploy.sample_batch import as_tested
from mmkd_plugin.deploy.student import plain_config
from mmkd_plugin.models.algorithms import TeacherStudentDistill
from mmkd_plugin.models.algorithms.inherit import num_classes
from mmkd_plugin.visualization.distill_pictures import (
    check_drawable,
    draw_predictions,
    draw_views,
    look,
    rgb_image,
    stack,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the distillation')
    parser.add_argument('checkpoint', help='any checkpoint of the distillation')
    parser.add_argument('images', nargs='+', type=Path, help='image files')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/visualize'),
                        help='folder for the pictures; default: %(default)s')
    parser.add_argument('--score', type=float, default=0.3,
                        help='smallest score of the detections to draw; default: %(default)s')
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='allow the checkpoint to run code; use it only if you trust its source')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override fields of the config')
    args = parser.parse_args()
    try:
        visualize(read_config(args.config, args.cfg_options), args)
    except ValueError as error:
        sys.exit(str(error))


@torch.no_grad()
def visualize(cfg: Config, args: argparse.Namespace) -> None:
    check_names(args.images)
    if args.trust_checkpoint and 'architecture' in cfg.model:
        cfg.model.trust_checkpoint = True
    model, content = build_start(cfg), read_checkpoint(args.checkpoint, 'checkpoint', args.trust_checkpoint)
    items = [read(cfg, path) for path in args.images]
    before = [see(model, item) for item in items]
    load_state_dict(model, content.get('state_dict', content), strict=True)
    names = content.get('meta', {}).get('dataset_meta', {}).get('classes')
    classes = {teacher.title.removeprefix('the '): names if num_classes(teacher.network) == num_classes(
        model.student) else None for teacher in model.teachers.values()}
    classes.update({'student before': names, 'student after': names})
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for path, item, (start, old) in zip(args.images, items, before):
        image = rgb_image(item, model.data_preprocessor)
        now, new = see(model, item)
        sheet = stack([
            draw_predictions(image, dict(zip(classes, (*now[:-1], start[-1], now[-1]))), classes, args.score),
            draw_views(image, old, f'{path.name}: student before training'),
            draw_views(image, new, f'{path.name}: student of {Path(args.checkpoint).name}')])
        out = args.out_dir / f'{path.stem}.png'
        if not cv2.imwrite(str(out), sheet[..., ::-1]):
            raise ValueError(f'--out-dir: cannot write {str(out)!r}')
        print(out)


def build_start(cfg: Config) -> TeacherStudentDistill:
    """Builds the model in its state before training: with the config's seed, and pretrained or inherited weights."""
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    set_random_seed(cfg.get('randomness', {}).get('seed') or 0)
    model = MODELS.build(cfg.model)
    check_drawable(model)
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('ERROR')  # it would log every weight
    model.init_weights()
    logger.setLevel(level)
    return model.eval()


def read(cfg: Config, path: Path) -> dict:
    """Returns an image file as an item of the test set."""
    image = cv2.imread(str(path))
    if image is None:
        raise ValueError(f'images: {str(path)!r} not found, or not an image')
    return as_tested(plain_config(cfg), image, str(path))


def see(model: TeacherStudentDistill, item: dict) -> tuple[Sequence[BaseDataElement], Sequence]:
    """Returns the predictions of the teachers, then of the student, and the views of :func:`look`."""
    data = model.data_preprocessor(pseudo_collate([copy.deepcopy(item)]), False)
    inputs, samples = data['inputs'], data['data_samples']
    views = look(model, inputs, samples, tuple(item['inputs'].shape[1:]))
    predictions = [predict(teacher.network, *teacher.batch(inputs, samples)) for teacher in model.teachers.values()]
    if 'scale_factor' in samples[0]:
        for prediction in predictions:  # the picture is the student's image, whatever teacher_input_size is
            prediction.set_metainfo(dict(scale_factor=samples[0].scale_factor))
    return [*predictions, predict(model.student, inputs, samples)], views


def predict(network: BaseModel, inputs: Tensor, samples: list) -> BaseDataElement:
    """Returns the prediction for one image with the student's data samples, converted for a classifier."""
    from mmpretrain.models.classifiers import BaseClassifier
    from mmpretrain.structures import DataSample
    if isinstance(network, BaseClassifier):
        if not network.with_head:
            return DataSample()
        samples = [DataSample(metainfo=sample.metainfo) for sample in samples]
    prediction, = network(inputs, copy.deepcopy(samples), mode='predict')
    return prediction


def check_names(paths: list[Path]) -> None:
    """Raises ``ValueError`` if the pictures of two images would have one name."""
    stems = [path.stem for path in paths]
    for path in paths:
        if stems.count(path.stem) > 1:
            raise ValueError(f'images: several are named {path.stem!r}, and their pictures would have one name. Draw '
                             'them separately, with another --out-dir')


if __name__ == '__main__':
    main()
