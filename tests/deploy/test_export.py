"""A student as ONNX, and what is said of its costs."""
import copy
import sys

import numpy as np
import pytest
import torch
from conftest import classification_batch, classifier, detection_batch, retinanet
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope

from mmkd_plugin.compat import StackError
from mmkd_plugin.deploy.cost import measure
from mmkd_plugin.deploy.onnx_export import export_onnx
from mmkd_plugin.deploy.sample_batch import sample_batch
from mmkd_plugin.deploy.student import plain_config

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}


def test_a_classifier_is_whole(build, tmp_path):
    model, batch = build(classifier(8), 'mmpretrain').eval(), classification_batch(32, 3)
    found = export_onnx(model, batch, str(tmp_path / 'a.onnx'))
    assert found['outputs'] == ['scores'] and found['input']['shape'] == ['N', 3, 32, 32]
    pixels = np.stack([image.numpy() for image in batch['inputs']])[:, ::-1].astype(np.float32)  # BGR to RGB, by hand
    mean, std = (np.array(found['input'][key], np.float32)[:, None, None] for key in ('mean', 'std'))
    scores, = session(tmp_path / 'a.onnx').run(None, dict(images=(pixels - mean) / std))
    with torch.no_grad():
        expected = torch.stack([sample.pred_score for sample in model.test_step(copy.deepcopy(batch))])
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-4, atol=1e-6)
    assert scores.sum(1) == pytest.approx(1, abs=1e-5)
    props = metadata(tmp_path / 'a.onnx')
    assert props['channels'] == 'RGB' and props['mean'].startswith('[123.67') and props['std'].startswith('[58.39')


def small(name, **changes):
    cfg = get_config(name)
    cfg.model.backbone.init_cfg = None
    cfg.merge_from_dict({f'model.{key}': value for key, value in changes.items()})
    return dict(cfg.model)


@pytest.mark.parametrize('model, outputs', [
    (retinanet(), ['cls_scores', 'bbox_preds']),
    (dict(small('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'), backbone=retinanet()['backbone'], neck=dict(
        retinanet()['neck'], out_channels=256, num_outs=5)), ['cls_scores', 'bbox_preds', 'centernesses']),
    (small('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'), ['cls_scores', 'bbox_preds']),
], ids=['retinanet', 'fcos', 'rtmdet'])
def test_a_detector_gives_the_raw_outputs_of_its_head(build, tmp_path, model, outputs):
    model, batch = build(model).eval(), detection_batch(64)
    found = export_onnx(model, batch, str(tmp_path / 'a.onnx'))
    images = torch.randn(3, 3, 96, 128)  # other number and size than it was exported with
    with torch.no_grad():
        expected = model(images)
    names = [f'{name}_{level}' for name in outputs for level in range(len(expected[0]))]
    assert found['outputs'] == names
    for raw, values in zip(session(tmp_path / 'a.onnx').run(names, dict(images=images.numpy())),
                           [x for levels in expected for x in levels], strict=True):
        np.testing.assert_allclose(raw, values.numpy(), rtol=1e-3, atol=1e-4)
    assert found['input']['sides_multiple_of'] == 32
    assert found['largest_difference'] < 1e-4


def test_the_channel_order_is_the_models(build, tmp_path):
    batch = detection_batch(64)
    for samples in batch['data_samples']:
        samples.set_metainfo(dict(img_path='a.jpg'))  # which MMCV reads as BGR
    for reverse, order in ((True, 'RGB'), (False, 'BGR')):
        model = build(retinanet(bgr_to_rgb=reverse)).eval()
        assert export_onnx(model, batch, str(tmp_path / 'a.onnx'), overwrite=True)['input']['channels'] == order


def test_a_network_that_onnx_runtime_runs_otherwise_is_refused(build, tmp_path, monkeypatch):
    model = build(classifier(8), 'mmpretrain').eval()
    forward = model.head.fc.forward
    monkeypatch.setattr(model.head.fc, 'forward', lambda x: forward(x) + torch.rand(4))
    with pytest.raises(ValueError, match=r'scores of ONNX Runtime differs from PyTorch.s by .*nothing is written'):
        export_onnx(model, classification_batch(32), str(tmp_path / 'a.onnx'))
    assert not [*tmp_path.iterdir()]


def test_two_stages_are_refused(build, tmp_path):
    model = build(small('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'))
    with pytest.raises(ValueError, match='--onnx: FasterRCNN is neither .* MMDeploy exports such'):
        export_onnx(model.eval(), detection_batch(64), str(tmp_path / 'a.onnx'))


def test_what_is_there_or_missing_is_said(build, tmp_path, monkeypatch):
    model, batch = build(classifier(8), 'mmpretrain').eval(), classification_batch(32)
    (tmp_path / 'a.onnx').write_text('mine')
    with pytest.raises(ValueError, match='a.onnx.* exists'):
        export_onnx(model, batch, str(tmp_path / 'a.onnx'))
    assert (tmp_path / 'a.onnx').read_text() == 'mine'
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(StackError, match='pip install onnx onnxruntime'):
        export_onnx(model, batch, str(tmp_path / 'b.onnx'))


def test_costs_of_the_demos_student():
    cfg = Config.fromfile('configs/benchmarks/digits/retinanet_r18-c16_digits-300.py')
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model).eval()
    costs = measure(dict(student=(model, dict(inputs=torch.zeros(1, 3, 128, 128)))))['student']
    assert costs['params'] == 1_048_462 and costs['flops'] == 132_542_464  # MMEngine's get_model_complexity_info
    assert costs['latency_ms'] > 0


def test_two_stages_have_costs(build):
    model, batch = build(small('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')).eval(), detection_batch(64, 2)
    data = model.data_preprocessor({key: values[:1] for key, values in batch.items()}, False)
    costs = measure(dict(a=(model, data)))['a']
    assert costs['params'] == sum(parameter.numel() for parameter in model.parameters()) and costs['flops'] > 1e9


@pytest.mark.parametrize('config, size, channels', [
    ('configs/amd_resnet_imagenet.py', (224, 224), 'file'), ('configs/amd_retinanet_coco.py', (938, 800), 'file'),
    ('configs/sokd/cifar/sokd-fitnet_backbone_vgg13_vgg8_b64_cifar100.py', (32, 32), None)])
def test_without_data_a_photograph_goes_through_the_pipeline(config, size, channels, tmp_path, monkeypatch):
    cfg = plain_config(Config.fromfile(config))
    monkeypatch.chdir(tmp_path)  # no data here
    batch, images = sample_batch(cfg)
    assert images == 'a photograph of Matplotlib and its mirror image'
    one, mirrored = batch['inputs']
    assert one.dtype == torch.uint8 and tuple(one.shape[1:]) == size and one.float().std() > 20
    assert (one.flip(2).float() - mirrored.float()).abs().mean() < 5
    assert bool(batch['data_samples'][0].metainfo.get('img_path')) == bool(channels)
