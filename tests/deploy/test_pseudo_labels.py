import json
import runpy
import sys
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from conftest import classifier, retinanet
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmkd_plugin.deploy.pseudo_labels import best_threshold, images_in

TOOL = Path(__file__).parents[2] / 'tools/pseudo_label.py'
OTHER = dict(mean=[10.0, 120.0, 200.0], std=[20.0, 60.0, 90.0])


def test_the_threshold_of_the_largest_f1_by_hand():
    # Kept ones and F1 of 4 wanted: .9 right 2/5, .8 right 4/6, .7 wrong 4/7, .6 right 6/8, .5 wrong 6/9
    scores, hits = np.array([.5, .9, .6, .7, .8]), np.array([False, True, True, False, True])
    assert best_threshold(scores, hits, 4) == (.6, .75)
    # a threshold cannot part equal scores: with .6 comes a wrong one, 6/9, and .8 has 4/6
    assert best_threshold(np.append(scores, .6), np.append(hits, False), 4) == (.8, pytest.approx(2 / 3))
    for nothing in (np.zeros(0), np.array([.3])):
        with pytest.raises(ValueError, match='^--score-thr: auto found no correct prediction'):
            best_threshold(nothing, nothing > 1, 4)


def images(folder, count=4, size=(64, 96)):
    rng = np.random.default_rng(0)
    for i in range(count):
        mmcv.imwrite(rng.integers(0, 256, (*size, 3), np.uint8), str(folder / f'{"deep/" * (i % 2)}{i}.png'))
    return folder


def write(folder, scope, model, dataset, weights_of):
    loader = dict(batch_size=1, num_workers=0, dataset=dataset, sampler=dict(type='DefaultSampler', shuffle=False))
    Config(dict(default_scope=scope, model=model, val_dataloader=loader, test_dataloader=loader)).dump(
        folder / 'config.py')
    init_default_scope(scope)
    torch.manual_seed(0)
    teacher = MODELS.build(Config(dict(model=weights_of)).model)
    teacher.init_weights()
    return teacher


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name='__main__')
    return capsys.readouterr().out


def detections(teacher, path):
    """What the teacher says of an image file, by its own preprocessor."""
    from mmdet.apis import inference_detector
    from mmengine.dataset import Compose
    steps = Compose([dict(type='LoadImageFromFile'), dict(type='mmdet.Resize', scale_factor=1.0),
                     dict(type='mmdet.PackDetInputs')])
    teacher.cfg = Config(dict(model=dict()))
    return inference_detector(teacher, str(path), test_pipeline=steps).pred_instances


def test_of_a_detector(monkeypatch, capsys, tmp_path):
    """The teacher's own detections become the validation set, so that the least of their scores has an F1 of 1."""
    folder = images(tmp_path / 'images')
    truth = tmp_path / 'truth.json'
    names = [(3, 'a'), (7, 'b'), (9, 'c')]
    truth.write_text(json.dumps(dict(
        images=[dict(id=0, file_name='0.png', height=64, width=96)], annotations=[],
        categories=[dict(id=i, name=n) for i, n in names])))
    teacher = retinanet(16, **OTHER)
    teacher['test_cfg'].update(score_thr=0.0)
    network = write(tmp_path, 'mmdet', dict(
        type='mmkd_plugin.TeacherStudentDistill', architecture=retinanet(8), teacher=teacher,
        distiller=dict(type='mmkd_plugin.FeatureDistiller', layers=['neck'], base='pkd')), dict(
        type='CocoDataset', ann_file=str(truth), data_prefix=dict(img=str(folder)), metainfo=dict(classes=tuple('abc')),
        test_mode=True, pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale=(96, 64), keep_ratio=True),
                                  dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs', meta_keys=(
                                      'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]), teacher)
    with torch.no_grad():
        network.bbox_head.retina_cls.weight.mul_(30)  # scores that differ
    torch.save(network.state_dict(), tmp_path / 'teacher.pth')
    arguments = tmp_path / 'config.py', tmp_path / 'teacher.pth', folder
    expected = {path: detections(network.eval(), folder / path) for path in ('0.png', '2.png', 'deep/1.png',
                                                                           'deep/3.png')}
    threshold = float(torch.cat([found.scores for found in expected.values()]).quantile(.7))

    out = run(monkeypatch, capsys, *arguments, '-o', truth, '--score-thr', threshold, '--overwrite')
    written = json.loads(truth.read_text())
    assert [file['file_name'] for file in written['images']] == sorted(expected)
    assert all((file['height'], file['width']) == (64, 96) for file in written['images'])
    assert f'truth.json: {len(written["annotations"])} labels of 4 images' in out
    for file in written['images']:
        found = expected[file['file_name']]
        found = found[found.scores >= threshold]
        mine = [each for each in written['annotations'] if each['image_id'] == file['id']]
        assert [each['category_id'] for each in mine] == [names[label][0] for label in found.labels.tolist()]
        x, y, w, h = torch.tensor([each['bbox'] for each in mine]).reshape(-1, 4).unbind(1)
        torch.testing.assert_close(torch.stack([x, y, x + w, y + h], 1), found.bboxes)
    assert 4 < len(written['annotations']) < 20

    out = run(monkeypatch, capsys, *arguments, '-o', tmp_path / 'auto.json')
    least = min(each['score'] for each in written['annotations'])
    assert f'--score-thr: {least:.4f}, with an F1 of 1.000' in out
    again = json.loads((tmp_path / 'auto.json').read_text())
    assert {key: again[key] for key in ('images', 'annotations', 'categories')} == {
        key: written[key] for key in ('images', 'annotations', 'categories')}
    truth.unlink()
    with pytest.raises(SystemExit, match='--score-thr auto: val_dataloader.dataset.ann_file not found'):
        run(monkeypatch, capsys, *arguments, '-o', tmp_path / 'other.json')


def test_of_a_classifier(monkeypatch, capsys, tmp_path):
    folder, teacher = images(tmp_path / 'images', 8, (32, 32)), classifier(8)
    listed = tmp_path / 'val.txt'
    network = write(tmp_path, 'mmpretrain', teacher, dict(
        type='CustomDataset', ann_file=str(listed), data_prefix=str(folder), metainfo=dict(classes=tuple('abcd')),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]), teacher)
    with torch.no_grad():
        network.head.fc.weight.mul_(100)
    torch.save(network.state_dict(), tmp_path / 'teacher.pth')
    arguments = tmp_path / 'config.py', tmp_path / 'teacher.pth', folder
    assert 'all.txt: 8 labels of 8 images' in run(
        monkeypatch, capsys, *arguments, '-o', tmp_path / 'all.txt', '--score-thr', '0')
    lines = (tmp_path / 'all.txt').read_text().splitlines()
    labels = {name: int(label) for name, label in (line.split() for line in lines)}
    assert list(labels) == sorted(labels) and '0.png' in labels and 'deep/1.png' in labels
    scores = {}
    for name, label in labels.items():
        batch = dict(inputs=[torch.from_numpy(mmcv.imread(str(folder / name))).permute(2, 0, 1)])
        logits = network.eval()(network.data_preprocessor(batch)['inputs'])
        assert int(logits.argmax()) == label
        scores[name] = float(logits.softmax(1).max())
    ranked = sorted(scores, key=scores.get)
    wrong = ranked[:3]  # the least sure are wrong: without them F1 is 10 / 13, with them 10 / 16
    listed.write_text(''.join(f'{name} {(label + (name in wrong)) % 4}\n' for name, label in labels.items()))
    out = run(monkeypatch, capsys, *arguments, '-o', tmp_path / 'auto.txt')
    assert f'--score-thr: {scores[ranked[3]]:.4f}, with an F1 of {10 / 13:.3f}' in out
    assert (tmp_path / 'auto.txt').read_text().splitlines() == [
        line for line in lines if line.split()[0] not in wrong]


def test_files_that_are_no_images_are_named_and_linked_folders_read(monkeypatch, capsys, tmp_path):
    folder = images(tmp_path / 'images')
    (tmp_path / 'elsewhere').mkdir()
    images(tmp_path / 'elsewhere', 1)
    (folder / 'link').symlink_to(tmp_path / 'elsewhere')
    (folder / 'deep/up').symlink_to(folder)  # a cycle
    (folder / '.thumbnails').mkdir()
    images(folder / '.thumbnails', 1)
    (folder / 'broken.PNG').write_text('x')
    names = [path.relative_to(folder).as_posix() for path in images_in(folder)]
    assert names == ['0.png', '2.png', 'broken.PNG', 'deep/1.png', 'deep/3.png', 'link/0.png']
    dataset = dict(type='CustomDataset', data_root=str(folder), ann_file='', pipeline=[
        dict(type='LoadImageFromFile'), dict(type='PackInputs')])
    network = write(tmp_path, 'mmpretrain', classifier(8), dataset, classifier(8))
    torch.save(network.state_dict(), tmp_path / 'teacher.pth')
    out = run(monkeypatch, capsys, tmp_path / 'config.py', tmp_path / 'teacher.pth', folder, '-o', tmp_path / 'a.txt',
              '--score-thr', '0')
    assert 'broken.PNG\' cannot be read as an image. It is left out' in out and '5 labels of 6 images' in out
    assert [line.split()[0] for line in (tmp_path / 'a.txt').read_text().splitlines()] == [
        name for name in names if name != 'broken.PNG']


def test_a_teacher_of_other_classes_needs_its_own_config(monkeypatch, capsys, tmp_path):
    student, teacher = classifier(8), classifier(8)
    teacher['head']['num_classes'] = 5
    network = write(tmp_path, 'mmpretrain', dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student,
                                                 teacher=teacher), dict(type='CustomDataset'), teacher)
    torch.save(network.state_dict(), tmp_path / 'teacher.pth')
    with pytest.raises(SystemExit, match=r"CONFIG: .*has \[5\] classes and the student \[4\]"):
        run(monkeypatch, capsys, tmp_path / 'config.py', tmp_path / 'teacher.pth', images(tmp_path / 'images'), '-o',
            tmp_path / 'a.txt')


def test_what_is_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / 'there.json').write_text('kept')
    (tmp_path / 'empty').mkdir()
    for arguments, message in (
            (['-o', tmp_path / 'there.json'], "--out: .*there.json' exists"),
            (['-o', tmp_path / 'new.json'], 'IMAGES: no images in the folder'),
            (['-o', tmp_path / 'new.json', '--score-thr', '2'], '2')):
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, capsys, 'config.py', 'teacher.pth', tmp_path / 'empty', *arguments)
    assert (tmp_path / 'there.json').read_text() == 'kept' and not (tmp_path / 'new.json').exists()
