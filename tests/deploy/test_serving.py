"""docs/serve.py, where there is nothing of OpenMMLab and no torch."""
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import retinanet
from mmdet.structures import DetDataSample
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


def test_the_script_finds_what_mmdetection_finds(build, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (80, 60, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    resized = cv2.resize(image, (48, 64))  # as Resize(scale=(64, 48), keep_ratio=True) does
    sample = DetDataSample(metainfo=dict(img_path='image.png', img_shape=(64, 48), ori_shape=(80, 60),
                                         scale_factor=(0.8, 0.8)))
    batch = dict(inputs=[torch.from_numpy(resized.transpose(2, 0, 1).copy())], data_samples=[sample])
    model = lively(build(retinanet()))
    export_onnx(model, batch, str(tmp_path / 'a.onnx'), about=dict(scale=[64, 48], classes=['cat', 'dog', 'cow']))
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
