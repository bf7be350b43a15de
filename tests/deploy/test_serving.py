"""docs/serve.py, where there is nothing of OpenMMLab and no torch."""
import importlib
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import retinanet
from mmcv.transforms import Compose
from test_onnx_export import lively

from mmkd_plugin.deploy.onnx_export import export_onnx

pytest.importorskip('onnxruntime')

SERVE = Path('docs/serve.py')
ABSENT = '''
import runpy, sys
class Absent:
    def find_spec(self, name, *_):
        if name.startswith(('torch', 'mm')):  # mmcv, mmengine, mmdet, mmpretrain, mmrazor, mmkd_plugin
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def test_the_page_shows_the_script():
    assert f'```python\n{SERVE.read_text()}```' in Path('docs/deploy.md').read_text()


RESIZE = dict(type='Resize', scale=(64, 64), keep_ratio=True)


@pytest.fixture
def preparation(monkeypatch):
    monkeypatch.syspath_prepend('tools')
    return importlib.import_module('export_student').preparation


@pytest.mark.parametrize('steps', [
    [dict(RESIZE, scale=(64, 48))],
    [RESIZE, dict(type='Pad', size=(96, 64), pad_val=dict(img=(114, 10, 200)))],
    [RESIZE, dict(type='mmdet.Pad', pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0)))],
    [RESIZE, dict(type='Pad', size=(64, 96), pad_val=114)],
], ids=['keep_ratio', 'RTMDet', 'YOLOX', 'number'])
def test_the_script_finds_what_mmdetection_finds(build, preparation, tmp_path, steps):
    image = np.random.default_rng(0).integers(0, 256, (80, 60, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    pipeline = Compose([dict(type='mmdet.LoadImageFromFile'), *steps, dict(type='mmdet.PackDetInputs', meta_keys=(
        'img_path', 'img_shape', 'ori_shape', 'scale_factor'))])
    packed = pipeline(dict(img_path=str(tmp_path / 'image.png')))
    batch = dict(inputs=[packed['inputs']], data_samples=[packed['data_samples']])
    model = lively(build(retinanet()))
    export_onnx(model, batch, str(tmp_path / 'a.onnx'), about=dict(
        preparation(steps), classes=['cat', 'dog', 'cow']))
    done = subprocess.run([sys.executable, '-c', ABSENT, SERVE, tmp_path / 'a.onnx', tmp_path / 'image.png'],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model.test_step(batch)[0].pred_instances
    expected = expected[expected.scores > 0.3]
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected) > 0
    for line, box, score, label in zip(lines, expected.bboxes, expected.scores, expected.labels):
        name, given, found = re.fullmatch(r'(\w+) ([\d.]+) \[(.*)\]', line).groups()
        assert name == ['cat', 'dog', 'cow'][label] and abs(float(given) - score) < 0.006
        np.testing.assert_allclose([float(x) for x in found.split(', ')], box.numpy(), atol=0.06)
