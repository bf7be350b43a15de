"""A student as ONNX against plain MMDetection and MMPretrain, and what is said of its costs."""
import copy
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import classification_batch, classifier, detection_batch, retinanet
from mmdet.models import YOLOX
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from mmengine.runner import Runner
from test_digits_configs import load

from mmkd_plugin.compat import StackError
from mmkd_plugin.datasets.digits import make_digits
from mmkd_plugin.deploy.cost import measure
from mmkd_plugin.deploy.evaluation import evaluate
from mmkd_plugin.deploy.onnx_export import export_onnx
from mmkd_plugin.deploy.onnx_model import OnnxModel
from mmkd_plugin.deploy.pixels import Pixels
from mmkd_plugin.deploy.sample_batch import sample_batch
from mmkd_plugin.deploy.student import plain_config
from mmkd_plugin.deploy.two_stage_graph import roi_features

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}


def small(name):
    """A model of MMDetection's zoo on the tests' backbone, with heads of 16 channels for 3 classes."""
    model = get_config(name).model
    model.bbox_head.update(num_classes=3, in_channels=16, feat_channels=16, norm_cfg=None)
    model.update(backbone=retinanet()['backbone'], neck=dict(retinanet()['neck'], num_outs=5))
    model.test_cfg.update(score_thr=0.1, max_per_img=20)
    return dict(model)


def yolo_like(name):
    """RTMDet or YOLOX, whose own backbone and neck are small."""
    model = get_config(name).model
    model.backbone.update(deepen_factor=0.167, widen_factor=0.125, init_cfg=None)
    model.neck.update(in_channels=[32, 64, 128], out_channels=16, num_csp_blocks=1)
    model.bbox_head.update(num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1)
    model.test_cfg.update(score_thr=0.1)
    return dict(model)


def faster_rcnn(**box_head):
    """Faster R-CNN whose proposals are of all levels, and its regions of four."""
    model = get_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py').model
    model.backbone = ConfigDict(retinanet()['backbone'])
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    model.roi_head.bbox_roi_extractor.update(out_channels=16, finest_scale=14)
    model.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32, num_classes=3, **box_head)
    model.test_cfg.rpn.update(nms_pre=100, max_per_img=60)
    model.test_cfg.rcnn.update(score_thr=0.3, max_per_img=20)
    return model


def faster_rcnn_c4():
    """Faster R-CNN of one level, with boxes for all classes alike, and RoIAlign of a fixed grid as it was."""
    model = get_config('mmdet::faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py').model
    model.data_preprocessor.std = [58.395, 57.12, 57.375]
    model.backbone.update(depth=18, init_cfg=None)
    model.rpn_head.update(in_channels=256, feat_channels=16)
    model.roi_head.shared_head.update(depth=18, init_cfg=None)
    model.roi_head.bbox_roi_extractor.update(out_channels=256)
    model.roi_head.bbox_roi_extractor.roi_layer.update(sampling_ratio=2, aligned=False)
    model.roi_head.bbox_head.update(in_channels=512, num_classes=3, reg_class_agnostic=True)
    model.test_cfg.rpn.update(nms_pre=100, max_per_img=60)
    model.test_cfg.rcnn.update(score_thr=0.1, nms=dict(type='nms', iou_threshold=0.8), max_per_img=20)
    return model


DETECTORS = dict(
    retinanet=lambda: dict(retinanet(), bbox_head=dict(retinanet()['bbox_head'], anchor_generator=dict(
        type='mmdet.AnchorGenerator', octave_base_scale=4, scales_per_octave=2, ratios=[0.5, 1.0],
        strides=[8, 16, 32, 64]))),
    fcos=lambda: small('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'),
    atss=lambda: small('mmdet::atss/atss_r50_fpn_1x_coco.py'),
    gfl=lambda: small('mmdet::gfl/gfl_r50_fpn_1x_coco.py'),
    rtmdet=lambda: yolo_like('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'),
    yolox=lambda: yolo_like('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'),
    faster_rcnn=faster_rcnn,
    faster_rcnn_c4=faster_rcnn_c4,
)


@torch.no_grad()
def lively(model):
    """Makes the boxes and scores of a random head differ from place to place, as a trained one's do."""
    heads = [head for name, head in model.named_children() if name.endswith('_head')]
    for name, parameter in [pair for head in heads for pair in head.named_parameters()]:
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel()**-0.5)
        elif name.endswith('bias'):
            torch.nn.init.normal_(parameter, std=0.3)
    for branch in getattr(heads[0], 'rtm_reg', []):
        branch.bias += 2  # whose distances are not positive by themselves
    if isinstance(model, YOLOX):  # computes with pixels, and with the exponent of sides
        model.backbone.stem.conv.conv.weight *= 0.01
        for branches in ('reg', 'cls', 'obj'):
            for branch in getattr(model.bbox_head, f'multi_level_conv_{branches}'):
                branch.weight *= 0.05 if branches == 'reg' else 0.2
    return model.eval()


def images(*sizes, path='a.jpg', seed=0):
    """A batch of images of given heights and widths, as a data loader gives it."""
    generator = torch.Generator().manual_seed(seed)
    samples = [DetDataSample(metainfo=dict(img_path=path, img_shape=size, ori_shape=size, scale_factor=(1., 1.)))
               for size in sizes]
    return dict(inputs=[torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes],
                data_samples=samples)


@pytest.mark.parametrize('name', DETECTORS)
def test_a_detector_finds_what_mmdetection_finds(build, tmp_path, name):
    model = lively(build(DETECTORS[name]()))
    even = name in ('rtmdet', 'yolox')  # whose pipelines pad to multiples of 32
    found = export_onnx(model, images((64, 64)), str(tmp_path / 'a.onnx'))
    assert found['outputs'] == ['boxes', 'scores', 'labels'] and found['agreement']['unmatched'] == 0
    # another number and other sizes than it was exported with, each image with padding of its own
    batch = images(*([(96, 64), (96, 64)] if even else [(70, 90), (100, 64), (33, 47)]))
    runtime = OnnxModel(tmp_path / 'a.onnx')
    limit = getattr(model, 'roi_head', model).test_cfg.get('max_per_img', 300)  # YOLOX has none of its own
    assert runtime.run(batch)[0].shape == (len(batch['inputs']), limit, 4)
    assert min(compare(model, runtime, batch)) > 5


def compare(model, runtime, batch):
    """Compares a graph with MMDetection; returns how many detections each image has."""
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    with torch.no_grad():
        expected = model.predict(data['inputs'], data['data_samples'], rescale=False)
    counts = []
    for one, score, label, sample in zip(*runtime.run(batch), expected, strict=True):
        wanted = sample.pred_instances[:len(score)]
        counts.append(len(wanted))
        count = counts[-1]
        np.testing.assert_allclose(score[:count], wanted.scores.numpy(), atol=1e-4)
        np.testing.assert_allclose(one[:count], wanted.bboxes.numpy(), atol=1e-2)
        np.testing.assert_array_equal(label[:count], wanted.labels.numpy())
        assert (score[count:] == 0).all() and (label[count:] == -1).all() and (one[count:] == 0).all()
    return counts


def test_two_stages_without_proposals_or_detections(build, tmp_path):
    batch = images((70, 90), (33, 47), (100, 64))
    model = lively(build(faster_rcnn()))
    model.rpn_head.test_cfg.min_bbox_size = 34  # for which the second image is too low
    export_onnx(model, batch, str(tmp_path / 'a.onnx'))
    first, second, third = compare(model, OnnxModel(tmp_path / 'a.onnx'), batch)
    assert first and third and not second
    assert compare(model, OnnxModel(tmp_path / 'a.onnx'), images((33, 47))) == [0]  # no proposal in the whole batch
    model.roi_head.test_cfg.score_thr = 1
    export_onnx(model, batch, str(tmp_path / 'b.onnx'))
    assert compare(model, OnnxModel(tmp_path / 'b.onnx'), batch) == [0, 0, 0]


@pytest.mark.slow
def test_two_stages_are_as_accurate_in_onnx_runtime(tmp_path):
    root = tmp_path / 'digits'
    make_digits(root, num_train=8, num_val=4)
    cfg = load('configs/benchmarks/digits/retinanet_r18-c16_digits-300.py', root, None, tmp_path)
    cfg.model = faster_rcnn()
    train = {'ann_file': 'annotations/train.json', 'data_prefix.img': 'train/'}  # learnt by heart
    cfg.merge_from_dict({
        'model.roi_head.bbox_head.num_classes': 10, 'model.rpn_head.anchor_generator.scales': [4],
        'model.test_cfg.rcnn.score_thr': 0.05, 'train_cfg.max_epochs': 30, 'param_scheduler': [],
        'model.train_cfg.rcnn.sampler.num': 64, 'model.train_cfg.rpn_proposal': dict(nms_pre=100, max_per_img=60),
        'test_evaluator.ann_file': f'{root}/annotations/train.json',
        **{f'test_dataloader.dataset.{key}': value for key, value in train.items()}})
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.train()
    model, plain = runner.model.eval(), plain_config(cfg)
    accuracy = evaluate(plain, model)
    found = export_onnx(model, sample_batch(plain)[0], str(tmp_path / 'a.onnx'), evaluate=partial(evaluate, plain),
                        accuracy=accuracy)
    assert accuracy['coco/bbox_mAP'] > 0.01
    assert found['accuracy']['coco/bbox_mAP'] == pytest.approx(accuracy['coco/bbox_mAP'], abs=1e-3)


def test_regions_come_from_the_level_of_their_size(build):
    model = build(faster_rcnn()).eval()
    extractor = model.roi_head.bbox_roi_extractor
    features = [torch.rand(2, 16, 64 // 2**level, 64 // 2**level) for level in range(5)]
    sides = torch.tensor([0., 20., 27.9, 28.1, 50., 60., 113., 200.])  # levels begin at 28, 56 and 112
    boxes = torch.stack([torch.tensor([3., 5., 3., 5.]) + side * torch.tensor([0., 0., 1., 1.]) for side in sides])
    boxes = torch.stack([boxes, boxes.flip(0)])
    wanted = extractor(features[:4], bbox2roi(list(boxes)))
    assert extractor.map_roi_levels(bbox2roi(list(boxes)), 4).unique().tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(roi_features(extractor, features, boxes), wanted, rtol=0, atol=1e-6)


def test_what_lies_in_the_padding_does_not_matter_and_channels_are_rgb(build, tmp_path):
    model = lively(build(DETECTORS['retinanet']()))
    found = export_onnx(model, images((64, 64)), str(tmp_path / 'a.onnx'))
    assert found['input']['channels'] == 'RGB' and metadata(tmp_path / 'a.onnx')['dtype'] == 'uint8'
    batch = images((50, 64), (64, 50))
    feeds = OnnxModel(tmp_path / 'a.onnx').feeds(batch)
    np.testing.assert_array_equal(feeds['images'][0, :, :50], batch['inputs'][0].numpy()[::-1])  # BGR from a file
    wanted = session(tmp_path / 'a.onnx').run(None, feeds)
    feeds['images'] = feeds['images'].copy()
    feeds['images'][0, :, 50:] = 200
    feeds['images'][1, :, :, 50:] = 7
    for one, other in zip(session(tmp_path / 'a.onnx').run(None, feeds), wanted):
        np.testing.assert_array_equal(one, other)
    feeds['image_sizes'] = np.array([[50, 64], [50, 64]])  # the second is cut there
    assert session(tmp_path / 'a.onnx').run(None, feeds)[0][1][:, 1::2].max() <= 50


def test_equal_scores_are_taken_in_the_order_of_level_row_anchor_and_label(build, tmp_path):
    model = build(retinanet(levels=4)).eval()
    for parameter in model.bbox_head.parameters():
        torch.nn.init.zeros_(parameter)  # every score is 0.5, every box its anchor
    export_onnx(model, images((64, 64)), str(tmp_path / 'a.onnx'))
    boxes, scores, labels = OnnxModel(tmp_path / 'a.onnx').run(images((64, 64)))
    assert (scores == 0.5).all() and labels[0, :6].tolist() == [0, 1, 2, 0, 1, 2]
    # 32 x 32 around (0, 0), (8, 0), (16, 0), cut at the border; the second overlaps the first by 0.67, the third by 0.5
    assert boxes[0, :4].tolist() == [[0, 0, 16, 16]] * 3 + [[0, 0, 32, 16]]


def test_channel_order_and_normalisation_are_the_models(build):
    batch = images((32, 32))
    for reverse in (True, False):
        model = build(retinanet(bgr_to_rgb=reverse)).eval()
        expected = model.data_preprocessor(copy.deepcopy(batch), False)['inputs']
        found = Pixels(model.data_preprocessor, 3, True)(*OnnxModel.inputs_of(batch))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    memory = images((32, 32), path=None)  # RGB already
    assert torch.equal(OnnxModel.inputs_of(memory)[0][0], memory['inputs'][0])


@pytest.mark.parametrize('name', ['retinanet', 'fcos'])
def test_raw_outputs_of_the_head(build, tmp_path, name):
    model = lively(build(DETECTORS[name]()))
    found = export_onnx(model, images((64, 64)), str(tmp_path / 'a.onnx'), raw=True)
    batch = images((96, 128), (90, 128))
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    with torch.no_grad():
        expected = model(data['inputs'])
    kinds = ['cls_scores', 'bbox_preds', 'centernesses'][:len(expected)]
    assert found['outputs'] == [f'{kind}_{level}' for kind in kinds for level in range(len(expected[0]))]
    for one, other in zip(OnnxModel(tmp_path / 'a.onnx').run(batch), [x for levels in expected for x in levels],
                          strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-3, atol=1e-4)


def test_a_classifier_is_whole(build, tmp_path):
    model, batch = build(classifier(8), 'mmpretrain').eval(), classification_batch(32, 3)
    for sample in batch['data_samples']:
        sample.set_metainfo(dict(img_path='a.jpg'))
    found = export_onnx(model, batch, str(tmp_path / 'a.onnx'))
    assert found['outputs'] == ['scores'] and found['input']['images'] == ['N', 3, 32, 32]
    pixels = np.stack([image.numpy() for image in batch['inputs']])[:, ::-1]  # BGR to RGB, by hand
    scores, = session(tmp_path / 'a.onnx').run(None, dict(images=np.ascontiguousarray(pixels[:2])))
    with torch.no_grad():
        expected = torch.stack([sample.pred_score for sample in model.test_step(copy.deepcopy(batch))])
    np.testing.assert_allclose(scores, expected[:2].numpy(), rtol=1e-4, atol=1e-6)
    sample = OnnxModel(tmp_path / 'a.onnx').test_step(batch)[2]
    assert sample.pred_label.item() == expected[2].argmax() and found['input']['channels'] == 'RGB'


def test_a_graph_that_onnx_runtime_runs_otherwise_is_refused(build, tmp_path, monkeypatch):
    model = build(classifier(8), 'mmpretrain').eval()
    forward = model.head.fc.forward
    monkeypatch.setattr(model.head.fc, 'forward', lambda x: forward(x) + torch.rand(4))
    with pytest.raises(ValueError, match=r'scores \(4, 4\) of ONNX Runtime differs from PyTorch.s by .*No file was'):
        export_onnx(model, classification_batch(32), str(tmp_path / 'a.onnx'))
    assert not [*tmp_path.iterdir()]


def test_a_graph_of_another_accuracy_is_refused(build, tmp_path):
    model, batch = build(classifier(8), 'mmpretrain').eval(), classification_batch(32)
    with pytest.raises(ValueError, match='top1 is 70.20 with ONNX.*and 70.00 with PyTorch.*at most 0.1 points'):
        export_onnx(model, batch, str(tmp_path / 'a.onnx'), evaluate=lambda graph: {'accuracy/top1': 70.2},
                    accuracy={'accuracy/top1': 70.0})
    assert not [*tmp_path.iterdir()]


def two_stages(**changes):
    """Faster R-CNN with other values of fields that are named as in ``--cfg-options``."""
    config = Config(dict(model=faster_rcnn()))
    config.merge_from_dict({f'model.{key}': value for key, value in changes.items()})
    return config.model


def from_zoo(name):
    model = get_config(f'mmdet::{name}').model
    model.backbone.init_cfg = None
    return model


def fast_rcnn():
    model = faster_rcnn()
    del model['rpn_head']
    return dict(model, type='FastRCNN')


SOFT = dict(type='soft_nms', iou_threshold=0.5)
TWO_STAGES = {
    'masks': (lambda: from_zoo('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'),
              'the masks of MaskRCNN are not supported.*with MMDeploy'),
    'cascade': (lambda: from_zoo('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'),
                'the prediction of CascadeRoIHead is not supported'),
    'cascaded proposals': (lambda: from_zoo('cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py'),
                           'the prediction of CascadeRPNHead is not supported'),
    'no proposals': (fast_rcnn, 'FastRCNN has no rpn_head'),
    'two heads': (lambda: from_zoo('double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py'),
                  'the prediction of DoubleHeadRoIHead is not supported'),
    'buckets': (lambda: from_zoo('sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py'),
                'the post-processing of SABLHead is not supported'),
    'own scores': (lambda: two_stages(**{'roi_head.bbox_head.loss_cls': dict(
        _delete_=True, type='SeesawLoss', num_classes=3)}), 'the scores of SeesawLoss are not supported'),
    'own boxes': (lambda: two_stages(**{'rpn_head.bbox_coder': dict(_delete_=True, type='TBLRBBoxCoder')}),
                  'the boxes of TBLRBBoxCoder are not supported'),
    'all levels': (lambda: two_stages(**{'roi_head.bbox_roi_extractor': dict(
        _delete_=True, type='GenericRoIExtractor', out_channels=16, featmap_strides=[4, 8],
        roi_layer=dict(type='RoIAlign', output_size=7))}),
                   'the regions of GenericRoIExtractor are not supported, expected a SingleRoIExtractor'),
    'maximum': (lambda: two_stages(**{'roi_head.bbox_roi_extractor.roi_layer.pool_mode': 'max'}),
                "roi_layer is RoIAlign.*pool_mode=max.*, expected RoIAlign with pool_mode='avg'"),
    'no limit': (lambda: two_stages(**{'test_cfg.rpn.max_per_img': -1}), 'test_cfg.rpn.max_per_img is -1, expected'),
    'soft NMS': (lambda: two_stages(**{'test_cfg.rcnn.nms': SOFT}), 'test_cfg.rcnn.nms is .*soft_nms'),
    'soft NMS of proposals': (lambda: two_stages(**{'test_cfg.rpn.nms': SOFT}), 'test_cfg.rpn.nms is .*soft_nms'),
}


@pytest.mark.parametrize('name', TWO_STAGES)
def test_two_stages_that_have_no_graph_are_refused(build, tmp_path, name):
    model, message = TWO_STAGES[name]
    with pytest.raises(ValueError, match=f'^--onnx: {message}'):
        export_onnx(build(model()).eval(), images((64, 64)), str(tmp_path / 'a.onnx'))
    assert not [*tmp_path.iterdir()]


def test_two_stages_have_no_raw_outputs(build, tmp_path):
    with pytest.raises(ValueError, match='--onnx-raw: FasterRCNN has two stages.*Leave out --onnx-raw'):
        export_onnx(build(faster_rcnn()).eval(), images((64, 64)), str(tmp_path / 'a.onnx'), raw=True)


def multi_task():
    heads = {name: dict(type='LinearClsHead', num_classes=4) for name in 'ab'}
    return dict(classifier(8), head=dict(type='MultiTaskHead', in_channels=64, task_heads=heads))


@pytest.mark.parametrize('model, scope, message', [
    (lambda: from_zoo('detr/detr_r50_8xb2-150e_coco.py'), 'mmdet', 'DETR is neither .*with MMDeploy'),
    (lambda: small('mmdet::paa/paa_r50_fpn_1x_coco.py'), 'mmdet', 'PAAHead is not supported.*--onnx-raw'),
    (lambda: dict(retinanet(), test_cfg=dict(nms=dict(type='soft_nms', iou_threshold=0.5), max_per_img=10)), 'mmdet',
     "test_cfg.nms is .*soft_nms.*type='nms'"),
    (lambda: small('mmdet::vfnet/vfnet_r50_fpn_1x_coco.py'), 'mmdet', 'the model uses mmcv::.*, which ONNX does'),
    (multi_task, 'mmpretrain', 'ImageClassifier with MultiTaskHead does not have one score per class'),
], ids=['transformer', 'own post-processing', 'soft NMS', 'deformable', 'several tasks'])
def test_what_has_no_graph_is_said_in_one_sentence(build, tmp_path, model, scope, message):
    with pytest.raises(ValueError, match=f'--onnx: .*{message}'):
        export_onnx(build(model(), scope).eval(), images((64, 64)), str(tmp_path / 'a.onnx'))
    assert not [*tmp_path.iterdir()]


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
    model, batch = build(faster_rcnn()).eval(), detection_batch(64, 2)
    data = model.data_preprocessor({key: values[:1] for key, values in batch.items()}, False)
    costs = measure(dict(a=(model, data)))['a']
    assert costs['params'] == sum(parameter.numel() for parameter in model.parameters()) and costs['flops'] > 1e6


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


def test_a_data_set_that_fails_is_not_replaced_by_the_photograph(tmp_path):
    (tmp_path / 'cats').mkdir()
    (tmp_path / 'cats/one.jpg').touch()

    @TRANSFORMS.register_module(force=True)
    class Torn:
        def __call__(self, results):
            if 'one.jpg' in str(results):
                raise RuntimeError('a torn file')
            return results

    cfg = Config(dict(default_scope='mmpretrain', test_dataloader=dict(dataset=dict(
        type='CustomDataset', data_root=str(tmp_path), pipeline=[dict(type='Torn')]))))
    with pytest.raises(RuntimeError, match='a torn file'):
        sample_batch(cfg)
