"""The converters of public data and weights, on a few files in the same layout."""
import importlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from miniature import make_bccd, make_cifar10_images

TOOLS = Path(__file__).parents[2] / 'tools'


@pytest.fixture
def converter(monkeypatch):
    """Imports a converter by its path in ``tools``."""
    def load(path):
        folder, name = path.split('/')
        monkeypatch.syspath_prepend(TOOLS / folder)
        return importlib.import_module(name)
    return load


def call(module, monkeypatch, *arguments):
    monkeypatch.setattr('sys.argv', [module.__name__, *map(str, arguments)])
    module.main()


def test_bccd_becomes_coco_at_half_its_size(converter, monkeypatch, tmp_path, capsys):
    bccd, source, out = converter('dataset_converters/bccd'), make_bccd(tmp_path / 'BCCD'), tmp_path / 'data/bccd'
    call(bccd, monkeypatch, source, '--out', out)
    said = capsys.readouterr().out
    assert 'BloodImage_00000.xml: skips a box of RBC without area, (8, 9) to (8, 9)' in said
    assert 'train: 4 images, 16 boxes' in said and 'val: 4 images, 16 boxes' in said
    books = {split: json.loads((out / f'annotations/{split}.json').read_text()) for split in ('train', 'val', 'test')}
    names = {split: [image['file_name'][-6:-4] for image in book['images']] for split, book in books.items()}
    assert names['val'] == ['01', '04', '07', '10'] and names['test'] == ['02', '05', '08', '11']
    assert sorted(names['train']) == ['00', '03', '06', '09'] != names['train']  # in a random order
    book = books['val']
    assert [category['name'] for category in book['categories']] == ['RBC', 'WBC', 'Platelets']
    assert [one['id'] for one in book['annotations']] == [*range(1, 17)]
    sizes = {0: 50, 1: 100, 2: 20}  # half of 100, 200 and 40
    for one in book['annotations']:
        left, top, width, height = one['bbox']
        assert width == height == sizes[one['category_id']] and one['area'] == width * height
        image = cv2.imread(str(out / f'val/{book["images"][one["image_id"]]["file_name"]}'))
        assert image.shape == (240, 320, 3)
    box = [round(x) for x in book['annotations'][3]['bbox']]  # the last drawn of the first image, so nothing covers it
    image = cv2.imread(str(out / 'val/BloodImage_00001.png')).astype(int)
    inside = image[box[1] + 2:box[1] + box[3] - 2, box[0] + 2:box[0] + box[2] - 2]
    assert np.abs(inside - (160, 40, 90)).max() < 40


def test_bccd_is_the_same_each_time_and_overwrites_nothing(converter, monkeypatch, tmp_path):
    bccd, source = converter('dataset_converters/bccd'), make_bccd(tmp_path / 'BCCD')
    for out in ('a', 'b'):
        call(bccd, monkeypatch, source, '--out', tmp_path / out)
    assert (tmp_path / 'a/annotations/train.json').read_bytes() == (tmp_path / 'b/annotations/train.json').read_bytes()
    with pytest.raises(SystemExit, match=f'{tmp_path}/a is not empty'):
        call(bccd, monkeypatch, source, '--out', tmp_path / 'a')


@pytest.mark.parametrize('harm, message', [
    (lambda root: (root / 'ImageSets/Main/val.txt').unlink(), 'val.txt'),
    (lambda root: (root / 'JPEGImages/BloodImage_00004.jpg').write_text(''), 'BloodImage_00004.jpg is missing or no'),
    (lambda root: (root / 'Annotations/BloodImage_00004.xml').write_text('<anno'), '00004.xml is not valid XML'),
    (lambda root: (root / 'Annotations/BloodImage_00004.xml').write_text(
        '<a><object><name>RBG</name></object></a>'), "unknown class 'RBG', expected one of RBC"),
])
def test_damaged_bccd_is_named_and_leaves_nothing(converter, monkeypatch, tmp_path, harm, message):
    bccd, source = converter('dataset_converters/bccd'), make_bccd(tmp_path / 'BCCD')
    harm(source)
    with pytest.raises(SystemExit, match=message):
        call(bccd, monkeypatch, source, '--out', tmp_path / 'data/bccd')
    assert not list((tmp_path / 'data').iterdir())


def test_cifar10_becomes_lists_of_which_any_beginning_is_balanced(converter, monkeypatch, tmp_path, capsys):
    cifar10, source = converter('dataset_converters/cifar10'), make_cifar10_images(tmp_path / 'images')
    for out in ('a', 'b'):
        call(cifar10, monkeypatch, source, '--out', tmp_path / out)
    assert 'train: 27 images of 3 classes\nval: 3 images of 3 classes\ntest: 6 images' in capsys.readouterr().out
    lists = {split: (tmp_path / f'a/{split}.txt').read_text().splitlines() for split in ('train', 'val', 'test')}
    assert lists['train'] == (tmp_path / 'b/train.txt').read_text().splitlines()
    assert [line.split()[1] for line in lists['train']] == ['0', '1', '2'] * 9
    numbers = [line[:-2] for line in lists['train'] if line.startswith('bird')]
    assert numbers != sorted(numbers)
    assert len({*lists['train'], *lists['val']}) == 30
    for split, folder in (('train', 'train'), ('val', 'train'), ('test', 'test')):
        for line in lists[split]:
            name, label = line.split()
            assert (tmp_path / f'a/images/{folder}/{name}').exists()
            assert ['airplane', 'bird', 'cat'][int(label)] == name.split('/')[0]
    with pytest.raises(SystemExit, match='is not empty'):
        call(cifar10, monkeypatch, source, '--out', tmp_path / 'a')


def test_incomplete_cifar10_is_named(converter, monkeypatch, tmp_path):
    cifar10, source = converter('dataset_converters/cifar10'), make_cifar10_images(tmp_path / 'images')
    (source / 'test/dog').mkdir()
    with pytest.raises(SystemExit, match='images/test has no images of dog'):
        call(cifar10, monkeypatch, source, '--out', tmp_path / 'a')
    (source / 'test/dog/0.jpg').write_text('')
    with pytest.raises(SystemExit, match='train and test differ in their classes'):
        call(cifar10, monkeypatch, source, '--out', tmp_path / 'a')
    with pytest.raises(SystemExit, match='nowhere/train not found'):
        call(cifar10, monkeypatch, tmp_path / 'nowhere', '--out', tmp_path / 'a')
    assert not (tmp_path / 'a').exists()


def test_a_converted_mobilenet_computes_the_same(converter, monkeypatch, tmp_path):
    """The features of torchvision's blocks at the ends of four strides."""
    from mmdet.models.backbones import MobileNetV2
    from torchvision.models import mobilenet_v2
    tool = converter('model_converters/mobilenet_v2')
    original = mobilenet_v2(weights=None).eval()
    for module in original.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    torch.save(original.state_dict(), tmp_path / 'original.pth')
    call(tool, monkeypatch, tmp_path / 'original.pth', '--out', tmp_path / 'new/converted.pth')
    backbone = MobileNetV2(out_indices=(1, 2, 4, 6, 7))
    backbone.eval()
    backbone.load_state_dict(torch.load(tmp_path / 'new/converted.pth')['state_dict'])
    x, expected = torch.rand(2, 3, 64, 64), []
    with torch.no_grad():
        found, y = backbone(x), x
        for i, block in enumerate(original.features):
            y = block(y)
            if i in (3, 6, 13, 17, 18):
                expected.append(y)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_other_weights_are_no_mobilenet(converter, monkeypatch, tmp_path):
    tool = converter('model_converters/mobilenet_v2')
    torch.save({'layer1.0.conv1.weight': torch.zeros(1)}, tmp_path / 'resnet.pth')
    with pytest.raises(SystemExit, match="'layer1.0.conv1.weight' is not a name in torchvision's MobileNetV2"):
        call(tool, monkeypatch, tmp_path / 'resnet.pth', '--out', tmp_path / 'out.pth')
    assert not (tmp_path / 'out.pth').exists()
