import json
import runpy
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner import Runner

from mmkd_plugin.datasets import scenes
from mmkd_plugin.datasets.digits import make_digits, split_sources
from mmkd_plugin.datasets.scenes import draw_scene

ROOT = Path(__file__).parents[2]
TEACHER = 'configs/benchmarks/digits/retinanet_r18-c32_digits.py'
STUDENT = 'configs/benchmarks/digits/retinanet_r18-c16_digits-300.py'
SMALL = dict(num_train=24, num_val=12)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'digits'
    assert make_digits(root, **SMALL) is True
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def book(root: Path, split: str) -> dict:
    return json.loads((root / 'annotations' / f'{split}.json').read_text())


def test_same_settings_same_bytes_other_seed_other_bytes(made, tmp_path):
    make_digits(tmp_path / 'again', **SMALL)
    assert contents(tmp_path / 'again') == contents(made)
    make_digits(tmp_path / 'other', **SMALL, seed=1)
    assert contents(tmp_path / 'other')['train/00000.png'] != contents(made)['train/00000.png']


def test_the_bytes_are_those_of_the_first_release(made):
    """What the record of these settings said before the composition was shared with other sets."""
    assert json.loads((made / 'digits.json').read_text())['sha256'] == (
        '0608506d662d4173cf84a9b4a19949edd0cb8d1a34bfb56f0e2820238f513bb0')


def test_an_image_does_not_depend_on_how_many_there_are(made, tmp_path):
    make_digits(tmp_path / 'fewer', num_train=2, num_val=1)
    fewer, all_of_them = contents(tmp_path / 'fewer'), contents(made)
    assert all(fewer[name] == all_of_them[name] for name in fewer if name.endswith('.png'))


def test_files_and_images(made):
    assert sorted(p.name for p in made.iterdir()) == ['annotations', 'digits.json', 'train', 'val']
    for split, number in (('train', 24), ('val', 12)):
        images = book(made, split)['images']
        assert [i['file_name'] for i in images] == sorted(p.name for p in (made / split).iterdir())
        assert len(images) == number
        assert cv2.imread(str(made / split / images[0]['file_name'])).shape == (128, 128, 3)


@pytest.mark.parametrize('seed', [0, 1])
def test_splits_share_neither_digit_nor_photograph(seed):
    sources = split_sources(seed)
    assert not set(sources['train'].indices) & set(sources['val'].indices)
    assert sum(len(source.indices) for source in sources.values()) == 1797
    assert set(sources['val'].labels) == set(range(10))
    columns = {split: {(photo, left + i) for part, (photo, left) in zip(source.parts, source.origins, strict=True)
                       for i in range(part.shape[1])} for split, source in sources.items()}
    assert not columns['train'] & columns['val']
    assert len(columns['train']) + len(columns['val']) == 2 * 640


def test_what_the_annotations_say_of_the_sources(made):
    of = {split: book(made, split) for split in ('train', 'val')}
    used = {split: {a['digit'] for a in of[split]['annotations']} for split in of}
    assert not used['train'] & used['val']
    crops = {split: [(i['crop'][0], i['crop'][0] + i['crop'][2]) for i in of[split]['images']] for split in of}
    assert all(left >= 240 and right <= 400 for left, right in crops['val'])
    assert all(right <= 240 or left >= 400 for left, right in crops['train'])
    from sklearn.datasets import load_digits
    target = load_digits().target
    assert all(a['category_id'] == target[a['digit']] for split in of.values() for a in split['annotations'])


def test_scenes_are_varied_and_boxes_inside():
    source = split_sources(0)['train']
    drawn = [draw_scene(np.random.default_rng(i), source, 128)[2] for i in range(150)]
    assert {len(scene) for scene in drawn} == set(range(scenes.MAX_OBJECTS + 1))
    boxes = np.array([a['bbox'] for scene in drawn for a in scene])
    assert boxes.min() >= 0 and (boxes[:, :2] + boxes[:, 2:]).max() <= 128
    assert boxes[:, 3].min() < 28 < 55 < boxes[:, 3].max()
    assert {a['category_id'] for scene in drawn for a in scene} == set(range(10))
    assert all(a['area'] == a['bbox'][2] * a['bbox'][3] for scene in drawn for a in scene)
    pairs = [(a, b) for scene in drawn for a, b in product(scene, scene) if a['digit'] < b['digit']]
    assert any(np.all(np.maximum(a['bbox'][:2], b['bbox'][:2]) < np.minimum(  # some overlap
        np.add(a['bbox'][:2], a['bbox'][2:]), np.add(b['bbox'][:2], b['bbox'][2:]))) for a, b in pairs)


@pytest.mark.parametrize('seed', range(5))
def test_box_is_tight_around_the_ink(monkeypatch, seed):
    monkeypatch.setattr(scenes, 'MAX_OBJECTS', 1)
    monkeypatch.setattr(scenes, 'MAX_CLUTTER', 0)
    monkeypatch.setattr(scenes, 'EMPTY_SHARE', 0)
    source = split_sources(0)['train']
    source = replace(source, parts=[np.zeros_like(part) for part in source.parts])
    image, _, (annotation,) = draw_scene(np.random.default_rng(seed), source, 128)
    light = image.sum(2, dtype=float)
    assert tuple(annotation['bbox']) == cv2.boundingRect((light > light.max() / 2).astype(np.uint8))


def test_every_digit_stays_mostly_visible(monkeypatch):
    monkeypatch.setattr(scenes, 'HEIGHT', (0.4, 0.5))  # big ones, so that they collide
    source = split_sources(0)['train']
    visible = [a['visible'] for i in range(30) for a in draw_scene(np.random.default_rng(i), source, 128)[2]]
    assert 0.75 <= min(visible) < 0.9 and max(visible) == 1


def test_made_again_is_left_alone(made):
    before = {path: path.stat().st_mtime_ns for path in made.rglob('*')}
    assert make_digits(made, **SMALL) is False
    assert {path: path.stat().st_mtime_ns for path in made.rglob('*')} == before


def test_other_data_are_never_overwritten(made, tmp_path):
    with pytest.raises(FileExistsError, match='seed 0 instead of 7'):
        make_digits(made, **SMALL, seed=7)
    damaged = tmp_path / 'damaged'
    shutil.copytree(made, damaged)
    (damaged / 'train' / '00003.png').unlink()
    with pytest.raises(FileExistsError, match='missing'):
        make_digits(damaged, **SMALL)
    foreign = tmp_path / 'foreign'
    foreign.mkdir()
    (foreign / 'thesis.txt').write_text('years of work')
    with pytest.raises(FileExistsError, match='was not created by make_digits'):
        make_digits(foreign, **SMALL)
    assert contents(foreign) == {'thesis.txt': b'years of work'}


def test_interrupted_leaves_nothing_and_an_empty_directory_is_filled(tmp_path):
    def interrupt(jobs):
        yield from jobs[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_digits(tmp_path / 'digits', **SMALL, track=interrupt)
    assert not any(tmp_path.iterdir())
    (tmp_path / 'digits').mkdir()
    assert make_digits(tmp_path / 'digits', num_train=1, num_val=1)


@pytest.mark.parametrize('nonsense', [dict(num_train=0), dict(num_val=-1), dict(image_size=8)])
def test_nonsense_is_refused(tmp_path, nonsense):
    with pytest.raises(ValueError, match=f'{next(iter(nonsense.values()))}'):
        make_digits(tmp_path / 'digits', **nonsense)


def test_the_tool(monkeypatch, capsys, tmp_path):
    def run(*options):
        monkeypatch.setattr('sys.argv', [
            'make_digits.py', '--root', str(tmp_path / 'd'), '--num-train', '2', '--num-val', '1', *options])
        runpy.run_path(str(ROOT / 'tools/dataset_converters/make_digits.py'), run_name='__main__')
        return capsys.readouterr().out

    assert 'created' in run()
    assert 'exists already' in run()
    with pytest.raises(SystemExit, match='seed 0 instead of 3'):
        run('--seed', '3')


def on_data(config: str, root: Path) -> Config:
    register_all_modules()
    config = Config.fromfile(ROOT / config)
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.data_root = str(root)
    return config


@pytest.mark.parametrize('config', [TEACHER, STUDENT])
def test_config_is_plain_mmdet_and_steps(config, made):
    config = on_data(config, made)
    assert 'mmkd_plugin' not in config.pretty_text
    assert len(DATASETS.build(config.val_dataloader.dataset)) == 12
    config.train_dataloader.dataset.pop('indices', None)  # more than are here
    loader = Runner.build_dataloader(config.train_dataloader, seed=0)
    assert len(loader.dataset) == 24 and loader.dataset.metainfo['classes'] == tuple('0123456789')
    model = MODELS.build(config.model).train()
    losses, _ = model.parse_losses(model(**model.data_preprocessor(next(iter(loader)), True), mode='loss'))
    losses.backward()
    assert torch.isfinite(losses)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_student_can_inherit_fpn_convs_and_head(made):
    teacher, student = (MODELS.build(on_data(config, made).model) for config in (TEACHER, STUDENT))
    for part in ('neck.fpn_convs', 'bbox_head'):
        weights = teacher.get_submodule(part).state_dict()
        assert weights and {name: value.shape for name, value in weights.items()} == {
            name: value.shape for name, value in student.get_submodule(part).state_dict().items()}


def test_student_sees_the_first_300_images():
    assert Config.fromfile(ROOT / STUDENT).train_dataloader.dataset.indices == 300
    assert 'indices' not in Config.fromfile(ROOT / TEACHER).train_dataloader.dataset
