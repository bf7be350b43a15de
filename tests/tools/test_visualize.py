"""Sheets of the demo's and of a classifier's distillation, and figures of logs."""
import json
import runpy
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import classifier
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from test_digits_configs import data, teacher  # noqa: F401  fixtures

from mmkd_plugin.visualization.distill_pictures import MapView, draw_predictions, draw_views, look, stack


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs a tool; returns what it says."""
    monkeypatch.syspath_prepend('tools')

    def tool(name, *args):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
        runpy.run_path(f'tools/{name}', run_name='__main__')
        return capsys.readouterr().out

    return tool


def test_a_sheet_of_the_demos_student(tool, data, teacher, tmp_path):  # noqa: F811
    config = 'configs/benchmarks/digits/amd_fpn_retinanet_r18-c32_retinanet_r18-c16_digits-300.py'
    init_default_scope('mmdet')
    student = MODELS.build(Config.fromfile(config).model.architecture)
    torch.save(dict(meta=dict(dataset_meta=dict(classes=tuple('abcdefghij'))), state_dict=student.state_dict()),
               tmp_path / 'student.pth')
    images = sorted((data / 'val').glob('*.png'))[:2]
    tool('visualize.py', config, tmp_path / 'student.pth', *images, '--out-dir', tmp_path / 'out', '--cfg-options',
         f'model.teacher_ckpt={teacher}')
    sheets = [cv2.imread(str(tmp_path / 'out' / image.name)) for image in images]
    assert all(sheet.shape[1] > 1500 and sheet.shape[0] > 1500 for sheet in sheets)
    assert sheets[0].shape != sheets[1].shape or (sheets[0] != sheets[1]).any()
    with pytest.raises(SystemExit, match=f"images: several are named '{images[0].stem}'"):
        tool('visualize.py', config, tmp_path / 'student.pth', images[0], images[0])
    with pytest.raises(SystemExit, match='images: .*none.png.* not found, or not an image'):
        tool('visualize.py', config, tmp_path / 'student.pth', 'none.png', '--cfg-options',
             f'model.teacher_ckpt={teacher}')


@pytest.mark.parametrize('headless', [False, True])
def test_a_classifier_teaches_the_demos_student(tool, data, tmp_path, headless):  # noqa: F811
    network = classifier(8)
    if headless:
        del network['head']
    cfg = Config.fromfile('configs/benchmarks/digits/amd_fpn_retinanet_r18-c32_retinanet_r18-c16_digits-300.py')
    cfg.model.teacher = network
    cfg.model.update(teacher_ckpt=None, allow_random_teacher=True, inherit=[])
    cfg.model.distiller.layers = ['backbone.layer3']
    config = tmp_path / 'config.py'
    cfg.dump(config)
    init_default_scope('mmdet')
    student = MODELS.build(cfg.model.architecture)
    torch.save(dict(meta=dict(dataset_meta=dict(classes=tuple('abcdefghij'))), state_dict=student.state_dict()),
               tmp_path / 'student.pth')
    image = min((data / 'val').glob('*.png'))
    tool('visualize.py', config, tmp_path / 'student.pth', image, '--out-dir', tmp_path / 'out')
    assert cv2.imread(str(tmp_path / 'out' / image.name)).shape[0] > 500


@pytest.mark.parametrize('scale_free', [False, True])
def test_amds_maps_are_those_of_its_loss(build, scale_free):
    model = build(dict(
        type='mmkd_plugin.TeacherStudentDistill', architecture=classifier(8), teacher=classifier(16),
        allow_random_teacher=True, distiller=dict(type='mmkd_plugin.AMDDistiller', layers=['backbone.layer1'],
                                                  amd=dict(margin=1.2, scale=8., scale_free=scale_free))), 'mmpretrain')
    image = torch.rand(1, 3, 32, 32)
    model.eval()
    with torch.no_grad():
        view, = look(model, image, None, (32, 32))
    energy = torch.from_numpy(view.s_attention).double()
    if scale_free:
        unit = energy / energy.square().mean().sqrt()
        cosine = unit / (unit.square() + 3).sqrt()
    else:
        cosine = energy / energy.norm()
    torch.testing.assert_close(torch.from_numpy(view.s_negative).double(), 1 - cosine, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(view.s_positive).double(), torch.cos(1.2 * torch.acos(cosine)),
                               rtol=1e-3, atol=1e-3)
    assert view.t_positive.shape == view.t_attention.shape and (view.t_positive != view.s_positive).any()
    picture = draw_views(np.full((32, 32, 3), 99, np.uint8), [view], 'title')
    plain = draw_views(np.full((32, 32, 3), 99, np.uint8), [MapView(*view[:4])], 'title')
    assert picture.shape[1] > plain.shape[1] + 4 * 200


def test_predictions_are_drawn():
    from mmdet.structures import DetDataSample
    from mmpretrain.structures import DataSample
    image = np.full((40, 80, 3), [200, 100, 0], np.uint8)
    found = DetDataSample(metainfo=dict(scale_factor=(2., 2.)), pred_instances=InstanceData(
        bboxes=torch.tensor([[10., 5, 30, 15], [0, 0, 40, 20]]), labels=torch.tensor([1, 0]),
        scores=torch.tensor([0.9, 0.2])))
    none = DetDataSample(pred_instances=found.pred_instances[:0])
    picture = draw_predictions(image, dict(teacher=found, student=none), dict(teacher=('a', 'b')))
    lime = (np.abs(picture.astype(int) - [0, 255, 0]).sum(2) < 60)
    columns = np.flatnonzero(lime.any(0))
    middle = picture.shape[1] // 2  # one box is above 0.3, twice as large as in the file, in the first panel
    assert len(columns) and columns[-1] < middle
    assert columns[-1] - columns[0] == pytest.approx(0.5 * 0.93 * middle, rel=0.15)
    scores = DataSample().set_pred_score(torch.tensor([0.1, 0.9]))
    bars = draw_predictions(image, dict(one=scores), {})
    assert (np.abs(bars.astype(int) - [31, 119, 180]).sum(2) < 30).sum() > 1000
    empty = draw_predictions(image, dict(one=DataSample()), {})  # of a network without a head
    assert (np.abs(empty.astype(int) - [31, 119, 180]).sum(2) < 30).sum() == 0
    assert stack([picture, bars]).shape == (picture.shape[0] + bars.shape[0], max(picture.shape[1], bars.shape[1]), 3)


def write(run, start, lines):
    log = run / start / 'vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('\n'.join(json.dumps(line) for line in lines) + '\n')


def losses(steps, value):
    return [dict(loss=value, lr=0.1, step=step, iter=step) for step in steps]


def test_resumed_runs_are_joined(tool, tmp_path):
    read = runpy.run_path('tools/plot_log.py')['read']
    write(tmp_path / 'a', '20260101_000000', losses([1, 2, 3, 4, 6], 5.) + [{'coco/bbox_mAP': 0.1, 'step': 1}])
    write(tmp_path / 'a', '20260101_000100', losses([3, 4, 5], 7.) + [{'coco/bbox_mAP': 0.2, 'step': 2}])
    with (tmp_path / 'a/20260101_000100/vis_data/scalars.json').open('a') as file:
        file.write('{"loss": 3.0, "st')  # killed while it wrote
    write(tmp_path / 'b', '20260101_000000', losses([1, 2], 2.))
    curves = read(tmp_path / 'a')
    assert curves == {'loss': {1: 5., 2: 5., 3: 7., 4: 7., 5: 7.}, 'coco/bbox_mAP': {1: 0.1, 2: 0.2}}
    said = tool('plot_log.py', tmp_path / 'a', tmp_path / 'b', '--out', tmp_path / 'log.png')
    assert said.endswith('log.png: loss, coco/bbox_mAP\n')
    picture = cv2.imread(str(tmp_path / 'log.png'))[..., ::-1].astype(int)
    assert all((np.abs(picture - colour).sum(2) < 30).sum() > 100 for colour in ([31, 119, 180], [255, 127, 14]))
    with pytest.raises(SystemExit, match='no logged value is named los;.* loss'):
        tool('plot_log.py', tmp_path / 'a', '--keys', 'los')
    with pytest.raises(SystemExit, match='no log of MMEngine found'):
        tool('plot_log.py', tmp_path / 'c')
