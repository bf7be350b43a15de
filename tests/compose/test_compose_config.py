import argparse
import subprocess
import sys
from pathlib import Path

import miniature
import pytest
import torch
from conftest import classifier, retinanet
from mmengine.config import Config
from mmpretrain.datasets import CIFAR10

from mmkd_plugin.compose import compose
from mmkd_plugin.compose.composer import make_plan
from mmkd_plugin.compose.network import Network
from mmkd_plugin.compose.wiring import propose_inherit, propose_layers
from mmkd_plugin.config.cfg_path import build_cfg_path, read_cfg_path
from mmkd_plugin.config.classes import class_names
from mmkd_plugin.deploy.student import plain_config
from mmkd_plugin.utils import in_words

ROOT = Path(__file__).parents[2]
ADDRESS = 'https://example.org/teacher.pth'  # of which nothing is loaded


@pytest.fixture(autouse=True)
def nothing_is_downloaded(monkeypatch):
    def refuse(address, file):
        raise AssertionError(address)
    monkeypatch.setattr('mmkd_plugin.checkpoints.reading._download', refuse)


def write(path, model, scope='mmdet', classes='abc', **fields):
    """Writes a plain config with all that composing reads."""
    dataset = dict(type='CocoDataset' if scope == 'mmdet' else 'CustomDataset', metainfo=dict(classes=list(classes)))
    fields = dict(dict(default_scope=scope, model=model, train_dataloader=dict(dataset=dataset),
                       train_cfg=dict(by_epoch=True, max_epochs=12),
                       optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01))), **fields)
    path.write_text(''.join(f'{key} = {value!r}\n' for key, value in fields.items()))
    return str(path)


def detectors(tmp_path, **teacher):
    return write(tmp_path / 's.py', retinanet(8)), write(tmp_path / 't.py', retinanet(16, **teacher))


def composed(student, teacher, tmp_path, method='amd', **options):
    out = tmp_path / 'composed.py'
    report = compose(student, teacher, method, options.pop('teacher_ckpt', ADDRESS), str(out), **options)
    lint = [sys.executable, '-m', 'ruff', 'check', '--config', ROOT / 'pyproject.toml', out]
    done = subprocess.run(lint, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return Config.fromfile(out), report, out.read_text()


def written(config):
    cfg = Config.fromfile(ROOT / 'configs' / config)
    return cfg, cfg.model.teacher_ckpt


@pytest.mark.parametrize('config, pair, method', [
    ('amd_retinanet_coco.py', ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
                               'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py'), 'amd'),
    ('sokd_retinanet_coco.py', ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
                                'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py'), 'sokd'),
    ('amd_resnet_imagenet.py', ('mmpretrain::resnet/resnet18_8xb32_in1k.py',
                                'mmpretrain::resnet/resnet34_8xb32_in1k.py'), 'amd'),
    ('sokd_resnet_imagenet.py', ('mmpretrain::resnet/resnet18_8xb32_in1k.py',
                                 'mmpretrain::resnet/resnet34_8xb32_in1k.py'), 'sokd'),
])
def test_it_writes_the_config_that_we_wrote(config, pair, method, tmp_path):
    ours, ckpt = written(config)
    cfg, report, _ = composed(*pair, tmp_path, method, teacher_ckpt=ckpt)
    if config == 'sokd_resnet_imagenet.py':
        ours.custom_hooks[0].search_epochs = 17  # a sixth of 100; the paper has 5
        ours.model.distiller.base = 'reviewkd'  # with its own width, as DAM
        ours.model.distiller.dam = dict(anchor='attention')
    assert cfg.to_dict() == ours.to_dict()
    assert f'The step used a teacher with random weights. {ckpt} is downloaded' in report


def test_sokd_keeps_the_students_constructor(tmp_path):
    student = write(tmp_path / 's.py', retinanet(8), optim_wrapper=dict(
        constructor='DefaultOptimWrapperConstructor', optimizer=dict(type='SGD', lr=0.01),
        paramwise_cfg=dict(bias_lr_mult=2.0)))
    cfg, _, _ = composed(student, write(tmp_path / 't.py', retinanet(16)), tmp_path, 'sokd')
    assert cfg.optim_wrapper.constructor == 'mmkd_plugin.PolicyOptimWrapperConstructor'
    assert cfg.optim_wrapper.student_constructor == 'DefaultOptimWrapperConstructor'
    assert plain_config(cfg).optim_wrapper == Config.fromfile(student).optim_wrapper


def test_layers_of_other_names_and_widths(tmp_path):
    cfg, report, _ = composed('mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py',
                              'mmpretrain::resnet/resnet50_8xb32_in1k.py', tmp_path)
    assert cfg.model.distiller.layers == [
        ('backbone.layer3', 'backbone.layer2'), ('backbone.layer5', 'backbone.layer3'),
        ('backbone.conv2', 'backbone.layer4')]
    row = next(line.split() for line in report.splitlines() if line.startswith('loss_amd_backbone_layer3'))
    assert row[1:6] == ['backbone.layer3', 'backbone.layer2', '8', '32,', '512'] and float(row[6]) > 0


def test_the_students_hooks_and_optimiser_stay(tmp_path):
    student = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
    cfg, _, text = composed(student, 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py', tmp_path, 'sokd')
    base = Config.fromstring(f'_base_ = [{student!r}]', '.py')
    assert cfg.custom_hooks[:-1] == base.custom_hooks and len(base.custom_hooks) == 2
    assert cfg.custom_hooks[-1] == dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=50)
    assert {**base.optim_wrapper, 'constructor': 'mmkd_plugin.PolicyOptimWrapperConstructor'} == cfg.optim_wrapper
    assert cfg.model.distiller.base == 'fitnet'  # of 96 and 128 channels
    assert 'inherit' not in cfg.model and "layers=['neck'],  # stride 8, 16, 32\n" in text


def test_a_students_file_is_inherited_from_where_the_config_lies(tmp_path):
    (tmp_path / 'models').mkdir()
    student, teacher = detectors(tmp_path / 'models')
    torch.save(build_cfg_path(teacher, '').state_dict(), tmp_path / 't.pth')
    cfg, report, text = composed(student, teacher, tmp_path, 'sokd', base='at', teacher_ckpt=f'{tmp_path}/t.pth')
    assert "_base_ = ['models/s.py']" in text and f'cfg_path={teacher!r}),  # relative to the working' in text
    assert cfg.model.architecture == Config.fromfile(student).model
    assert cfg.model.distiller.base == 'at'
    assert cfg.model.inherit == ['neck.fpn_convs', 'bbox_head'] and 'random weights' not in report
    assert f'Next: python tools/train.py {tmp_path}/composed.py' in report


def test_the_students_own_run_is_left_alone(tmp_path):
    teacher = write(tmp_path / 't.py', retinanet(16))
    own = dict(work_dir='work_dirs/small', resume=True, load_from='a.pth')
    cfg, *_ = composed(write(tmp_path / 's.py', retinanet(8), **own), teacher, tmp_path)
    assert (cfg.work_dir, cfg.resume, cfg.load_from) == (None, False, None) and cfg.model.inherit
    cfg, report, _ = composed(write(tmp_path / 's.py', retinanet(8), load_from='small.pth'), teacher, tmp_path,
                              overwrite=True)
    assert cfg.load_from == 'small.pth' and 'inherit' not in cfg.model and 'work_dir' not in cfg
    assert "The student starts from its load_from, 'small.pth', so it inherits nothing" in report


def test_a_config_in_a_linked_folder(tmp_path):
    (tmp_path / 'disk/deep').mkdir(parents=True)
    (tmp_path / 'work_dirs').symlink_to(tmp_path / 'disk/deep')
    student, teacher = detectors(tmp_path)
    out = tmp_path / 'work_dirs/composed.py'
    compose(student, teacher, 'amd', ADDRESS, str(out))
    assert Config.fromfile(out).model.architecture == Config.fromfile(student).model


def test_iterations_instead_of_epochs(tmp_path):
    student = write(tmp_path / 's.py', retinanet(8), train_cfg=dict(type='IterBasedTrainLoop', max_iters=180000))
    teacher = write(tmp_path / 't.py', retinanet(16))
    cfg, *_ = composed(student, teacher, tmp_path, 'sokd', base='reviewkd')
    assert cfg.custom_hooks == [dict(type='mmkd_plugin.FreezePolicyHook', search_iters=30000)]
    assert cfg.model.loss_schedules == {'loss_reviewkd*': dict(start_factor=0.0, end=1800)}


def networks(tmp_path, student, teacher, scope='mmdet', **fields):
    s_network = Network(write(tmp_path / 's.py', student, scope), 'STUDENT')
    return s_network, Network(write(tmp_path / 't.py', teacher, scope, **fields), 'TEACHER', s_network)


def pyramid(start_level, **options):
    model = retinanet(16, **options)
    model['neck'].update(start_level=start_level)
    return model


def without_neck(base_channels):
    model = retinanet(base_channels, levels=1)
    model['backbone'].update(out_indices=[3])
    model['neck'] = None
    model['bbox_head'].update(in_channels=base_channels * 8)
    model['bbox_head']['anchor_generator'].update(strides=[32])
    return model


STAGES = [(f'backbone.layer{i}', f'backbone.layer{i}') for i in (1, 2, 3, 4)]


@pytest.mark.parametrize('teacher, expected', [
    (retinanet(16, levels=4), [('neck', 'neck')]),
    (pyramid(0), [(f'neck.fpn_convs.{i}', f'neck.fpn_convs.{i + 1}') for i in range(3)]),  # the fourth is stride 64
    (retinanet(16, levels=3), [(f'neck.fpn_convs.{i}', f'neck.fpn_convs.{i}') for i in range(3)]),
    (without_neck(16), STAGES[1:]),
], ids=['equal', 'a level finer', 'fewer levels', 'no neck'])
def test_layers_are_matched_by_stride(teacher, expected, tmp_path):
    assert propose_layers(*networks(tmp_path, retinanet(8), teacher), slice(-3, None), False) == expected


def yolo(out_channels):
    channels = [2 * x for x in out_channels]
    return dict(type='mmdet.YOLOV3',
                backbone=dict(type='mmdet.ResNet', depth=18, base_channels=4, out_indices=(1, 2, 3)),
                neck=dict(type='mmdet.YOLOV3Neck', num_scales=3, in_channels=[32, 16, 8], out_channels=out_channels),
                bbox_head=dict(type='mmdet.YOLOV3Head', num_classes=3, in_channels=out_channels, out_channels=channels))


def test_levels_of_other_widths_are_named_one_by_one_where_an_adapter_needs_it(tmp_path):
    both = networks(tmp_path, yolo([16, 8, 4]), yolo([32, 16, 8]))
    assert propose_layers(*both, slice(-3, None), one_width=False) == [('neck', 'neck')]
    assert propose_layers(*both, slice(-3, None), one_width=True) == [(f'neck.detect{i}', ) * 2 for i in (1, 2, 3)]
    plan = make_plan(*both, 'feature', ADDRESS, tmp_path / 'out.py', None, (), False)
    assert plan.base == 'fitnet' and plan.layers == [f'neck.detect{i}' for i in (1, 2, 3)]


def test_fitnet_has_another_weight_for_classifiers(tmp_path):
    student, teacher = (write(tmp_path / name, classifier(width), 'mmpretrain') for name, width in (
        ('s.py', 8), ('t.py', 16)))
    cfg, *_ = composed(student, teacher, tmp_path, 'feature', base='fitnet')
    assert cfg.model.distiller.loss_weight == 100


def test_names_of_classes(tmp_path):
    def network(name, **dataset):
        return Network(write(tmp_path / name, classifier(8), 'mmpretrain', train_dataloader=dict(dataset=dataset)), 'X')
    for given in (dict(type='CustomDataset', classes=['b', 'a']), dict(type='CustomDataset', metainfo=dict(
            classes=['b', 'a']))):
        assert class_names(network('s.py', **given).cfg) == ('b', 'a')
    assert class_names(network('s.py', type='CIFAR10').cfg)[0] == 'airplane'
    teacher = network('s.py', type='CustomDataset')
    teacher.cfg.train_dataloader.dataset.type = CIFAR10  # as in configs in the pure Python style
    assert class_names(teacher.cfg)[0] == 'airplane'


def transformer(**options):
    return dict(type='mmpretrain.ImageClassifier', backbone=dict(
        type='mmpretrain.VisionTransformer', arch=dict(embed_dims=8, num_layers=1, num_heads=2, feedforward_channels=8),
        img_size=224, patch_size=16, **options), head=dict(
            type='mmpretrain.VisionTransformerClsHead', num_classes=4, in_channels=8))


def paired(tmp_path, student, teacher, stages=slice(-3, None)):
    return propose_layers(*networks(tmp_path, student, teacher, 'mmpretrain'), stages, False)


def backbone_of(width, **backbone):
    return dict(classifier(8), backbone=backbone, head=dict(
        type='mmpretrain.LinearClsHead', num_classes=4, in_channels=width))


def test_tokens_are_maps_of_their_stride(tmp_path):
    assert paired(tmp_path, transformer(), classifier(8)) == [('backbone.layers.0', 'backbone.layer3')]
    maps = transformer(out_type='featmap')
    assert paired(tmp_path, classifier(8), maps) == [('backbone.layer3', 'backbone.layers.0')]


def test_a_position_embedding_is_no_feature(tmp_path):
    xcit = backbone_of(8, type='mmpretrain.XCiT', embed_dims=8, depth=1, cls_attn_layers=1, num_heads=2, patch_size=16)
    xcit['neck'] = None
    xcit['head']['type'] = 'mmpretrain.LinearClsHead'
    s_network, _ = both = networks(tmp_path, xcit, classifier(8), 'mmpretrain')
    assert not s_network.layers['backbone.pos_embed'].depends
    assert propose_layers(*both, slice(-3, None), False) == [('backbone.ca_layers.0', 'backbone.layer3')]


def tiny_vit(width):
    arch = dict(channels=[width, 2 * width, 4 * width, 8 * width], num_heads=[1] * 4, window_sizes=[7, 7, 14, 7],
                depths=[1] * 4)
    model = backbone_of(8 * width, type='mmpretrain.TinyViT', arch=arch, gap_before_final_norm=True)
    model['neck'] = None
    return model


def test_deep_layers_are_compared_and_not_the_stem(tmp_path):
    names = ['backbone.stages.0', 'backbone.stages.1', 'backbone.stages.3']
    assert paired(tmp_path, tiny_vit(8), tiny_vit(16)) == [(name, name) for name in names]


def test_layers_that_do_not_train_are_skipped(tmp_path):
    student = classifier(8)
    student['backbone']['frozen_stages'] = 1
    assert paired(tmp_path, student, classifier(16), slice(-4, None)) == STAGES[1:]
    assert paired(tmp_path, classifier(8), student, slice(-4, None)) == STAGES  # a teacher's may be frozen


def test_strides_that_agree_nowhere_are_paired_by_the_nearest(tmp_path):
    patches = transformer()
    patches['backbone'].update(patch_size=14)
    assert paired(tmp_path, classifier(8), patches) == [('backbone.layer3', 'backbone.layers.0')]


def test_named_layers_of_other_strides_are_interpolated(tmp_path):
    _, report, text = composed(*detectors(tmp_path), tmp_path, layers=['backbone.layer2=backbone.layer3'])
    remark = "The maps of 'backbone.layer2' (stride 8) and of the teacher's 'backbone.layer3' (stride 16) differ"
    assert remark in report and f'# {remark}' in text


def test_layers_of_one_name_and_other_strides_are_interpolated(tmp_path):
    patches = transformer()
    patches['backbone']['patch_size'] = 32
    student, teacher = (write(tmp_path / name, model, 'mmpretrain') for name, model in (
        ('s.py', patches), ('t.py', transformer())))
    cfg, report, _ = composed(student, teacher, tmp_path)
    assert cfg.model.distiller.layers == [('backbone.layers.0', 'backbone.layers.0')] and '(stride 16)' in report


def test_logits_that_begin_with_zeros_are_distilled(tmp_path):
    zero = classifier(8)
    zero['head']['init_cfg'] = dict(type='Constant', layer='Linear', val=0)
    student = write(tmp_path / 's.py', zero, 'mmpretrain')
    assert "source='head.fc'" in composed(student, student, tmp_path)[2]


def test_a_teacher_that_needs_larger_images_than_the_student(tmp_path):
    teacher = zoo_detector(tmp_path, 'ssd/ssd300_coco.py', 320)
    dataset = dict(type='CocoDataset', pipeline=[dict(type='Resize', scale=(320, 320)), dict(type='PackDetInputs')])
    student = write(tmp_path / 'small.py', retinanet(8), train_dataloader=dict(dataset=dataset))
    assert Network(student, 'STUDENT').images == [256, 320]
    s_network = Network(student, 'STUDENT')
    assert Network(teacher, 'TEACHER', s_network).image == s_network.image == 320
    assert s_network.sizes('backbone.layer4') == [(10, 10)]


def test_the_logits_are_what_the_loss_reads(tmp_path):
    arc = dict(classifier(8), head=dict(type='mmpretrain.ArcFaceClsHead', num_classes=4, in_channels=64))
    smooth, sigmoid, stacked = (classifier(8) for _ in range(3))
    stacked['head'].update(type='mmpretrain.StackedLinearClsHead', mid_channels=[4])
    smooth['head']['loss'] = dict(type='mmpretrain.LabelSmoothLoss', label_smooth_val=0.1)
    sigmoid['head']['loss'] = dict(type='mmpretrain.CrossEntropyLoss', use_sigmoid=True)
    for model, expected in ((classifier(8), 'head.fc'), (smooth, 'head.fc'), (sigmoid, None), (arc, None),
                            (stacked, 'head.layers.1'), (transformer(), 'head.layers.head')):
        assert Network(write(tmp_path / 's.py', model, 'mmpretrain'), 'STUDENT').logits() == expected


def test_size_of_the_pipeline(tmp_path):
    dataset = dict(type='CustomDataset', pipeline=[dict(type='RandomResizedCrop', scale=96), dict(type='PackInputs')])
    config = write(tmp_path / 's.py', classifier(8), 'mmpretrain', train_dataloader=dict(dataset=dataset))
    network = Network(config, 'STUDENT')
    assert network.image == 96 and network.sizes('backbone.layer4') == [(3, 3)]


def zoo_detector(tmp_path, name, side):
    """Writes the config of a detector of mmdet, with a small backbone if it has an FPN, for images of this side."""
    model = read_cfg_path(f'mmdet::{name}', 'student').model.to_dict()
    if model['neck']['type'] == 'FPN':
        model['backbone'] = retinanet(8)['backbone']
        model['neck']['in_channels'] = retinanet(8)['neck']['in_channels']
    pipeline = [dict(type='Resize', scale=(side, side)), dict(type='PackDetInputs')]
    return write(tmp_path / 's.py', model, classes='a' * 80, train_dataloader=dict(
        dataset=dict(type='CocoDataset', pipeline=pipeline)))


def test_a_head_that_needs_larger_images_than_the_rest(tmp_path):
    config = zoo_detector(tmp_path, 'ddod/ddod_r50_fpn_1x_coco.py', 512)  # has deformable convolutions of 3x3
    assert Network(config, 'STUDENT').images == [256, 512]
    assert 'neck' in composed(config, config, tmp_path)[1]


def test_a_head_that_reads_the_proposals_of_the_data_set(tmp_path):
    config = zoo_detector(tmp_path, 'fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py', 256)
    assert 'neck' in composed(config, config, tmp_path)[1]


def test_what_is_pooled_is_no_map(tmp_path):
    model = dict(type='mmpretrain.ImageClassifier', backbone=dict(
        type='mmpretrain.ConvNeXt', arch=dict(depths=[1] * 4, channels=[8, 16, 32, 64])), head=dict(
            type='mmpretrain.LinearClsHead', num_classes=4, in_channels=64))  # its last norm is after the pooling
    assert propose_layers(*networks(tmp_path, model, classifier(8), 'mmpretrain'), slice(-3, None), False) == [
        (f'backbone.stages.{i - 1}', f'backbone.layer{i}') for i in (2, 3, 4)]


def fcos(base_channels):
    model = retinanet(base_channels)
    model['type'] = 'mmdet.FCOS'
    model['bbox_head'] = dict(type='mmdet.FCOSHead', num_classes=3, in_channels=16, strides=[8, 16, 32, 64])
    return model


def deeper(base_channels):
    model = retinanet(base_channels)
    model['bbox_head'].update(stacked_convs=2)
    return model


@pytest.mark.parametrize('teacher, fields, expected', [
    (retinanet(8), {}, ['neck', 'bbox_head']),
    (retinanet(16), {}, ['neck.fpn_convs', 'bbox_head']),
    (retinanet(16, fpn_channels=24), {}, []),
    (pyramid(0), {}, ['bbox_head']),  # its convolutions are of other strides
    (fcos(8), {}, []),  # its neck serves another kind of head
    (deeper(8), {}, ['neck', 'bbox_head.retina_cls', 'bbox_head.retina_reg']),
    (retinanet(8, num_classes=5), dict(classes='abcde'), ['neck']),
    (retinanet(8), dict(classes='abd'), ['neck']),
], ids=['same', 'wider backbone', 'wider neck', 'other strides', 'other head', 'other depth', 'more classes',
        'other classes'])
def test_what_is_inherited(teacher, fields, expected, tmp_path):
    assert propose_inherit(*networks(tmp_path, retinanet(8), teacher, **fields)) == expected


def test_a_module_of_which_half_fits_is_not_worth_a_line(tmp_path):
    both = [retinanet(width, levels=2) for width in (8, 16)]
    for model in both:
        model['neck'].update(start_level=3)  # fpn_convs: one of two reads the backbone
    assert propose_inherit(*networks(tmp_path, *both)) == ['bbox_head']


def test_features_of_a_teacher_with_other_classes_alone_are_distilled(tmp_path):
    student, teacher = detectors(tmp_path, num_classes=5)
    cfg, report, text = composed(student, teacher, tmp_path)
    said = 'The teacher has other classes (5) than the student (3). Only features are distilled, and no head is'
    assert cfg.model.inherit == ['neck.fpn_convs'] and said in report and f'# {said}' in text
    student = write(tmp_path / 's.py', classifier(8), 'mmpretrain')
    teacher = write(tmp_path / 't.py', classifier(16, num_classes=5), 'mmpretrain')
    cfg, report, text = composed(student, teacher, tmp_path, overwrite=True)
    assert list(cfg.model.distiller) == ['type', 'layers', 'amd'] and said.replace('(3)', '(4)') in report
    assert cfg.model.architecture.head.loss.loss_weight == 1.0


def test_a_head_that_scales_its_logits(tmp_path):
    teacher = dict(classifier(16), head=dict(type='mmpretrain.ArcFaceClsHead', num_classes=4, in_channels=128))
    cfg, report, text = composed(write(tmp_path / 's.py', classifier(8), 'mmpretrain'),
                                 write(tmp_path / 't.py', teacher, 'mmpretrain'), tmp_path)
    assert 'The logits are not distilled' in report and '# The logits are not distilled' in text
    assert 'student_recorders' not in cfg.model.distiller


def test_a_loss_that_the_students_config_leaves_to_its_head(tmp_path):
    student = classifier(8)
    del student['head']['loss']
    cfg, report, _ = composed(write(tmp_path / 's.py', student, 'mmpretrain'),
                              write(tmp_path / 't.py', classifier(16), 'mmpretrain'), tmp_path)
    assert cfg.model.architecture.head.loss == dict(type='CrossEntropyLoss', loss_weight=0.1)
    assert 'loss_kd                   head.fc          head.fc                  4, 4 ' in report


def test_one_class_masks_stuff_and_other_normalisation(tmp_path):
    name = 'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py'
    (tmp_path / 's.py').write_text(f"""_base_ = [{name!r}]
model = dict(
    data_preprocessor=dict(mean=[0, 0, 0], std=[255, 255, 255]),
    backbone=dict(depth=18, base_channels=8), neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=16), mask_roi_extractor=dict(out_channels=16),
                  bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=1),
                  mask_head=dict(num_convs=1, in_channels=16, conv_out_channels=16, num_classes=1)),
    semantic_head=dict(num_things_classes=1, in_channels=16, inner_channels=32))""")
    cfg, report, _ = composed(str(tmp_path / 's.py'), name, tmp_path)
    assert 'loss_amd_neck_4  neck     neck     64      16, 256   ' in report
    assert 'expects another normalisation' in report and 'The teacher has other classes' in report


def swin(width):
    return backbone_of(8 * width, type='mmpretrain.SwinTransformer', arch=dict(
        embed_dims=width, depths=[1] * 4, num_heads=[1] * 4))


@pytest.mark.parametrize('flat', ['student', 'teacher'])
def test_maps_of_the_same_energy_everywhere_are_remarked(flat, tmp_path):
    models = dict(student=classifier(8), teacher=classifier(8)) | {flat: swin(8)}
    files = [write(tmp_path / f'{name}.py', model, 'mmpretrain') for name, model in models.items()]
    layers = dict(student='backbone=backbone.layer4', teacher='backbone.layer4=backbone')[flat]
    cfg, report, text = composed(*files, tmp_path, layers=[layers])
    remark = f"maps of backbone in {tmp_path / flat}.py have the same energy at every position"
    assert remark in report and remark.split(' in ')[0] in text
    cfg, report, text = composed(*files, tmp_path, overwrite=True)
    assert 'same energy' not in report  # the stages before the normalisation


def test_norms_of_several_processes_and_several_tasks(tmp_path):
    student, teacher = retinanet(8), retinanet(16)
    student['backbone']['norm_cfg'] = dict(type='MMSyncBN', requires_grad=True)
    teacher['backbone']['norm_cfg'] = dict(type='SyncBN', requires_grad=True)
    cfg, *_ = composed(write(tmp_path / 's.py', student), write(tmp_path / 't.py', teacher), tmp_path)
    assert cfg.model.architecture.backbone.norm_cfg.type == 'MMSyncBN'
    tasks = dict(classifier(8), head=dict(
        type='mmpretrain.MultiTaskHead', in_channels=64, task_heads={
            name: dict(type='mmpretrain.LinearClsHead', num_classes=count) for name, count in (('a', 2), ('b', 3))}))
    cfg, report, _ = composed(write(tmp_path / 's.py', tasks, 'mmpretrain'),
                              write(tmp_path / 't.py', classifier(8), 'mmpretrain'), tmp_path, overwrite=True)
    assert 'loss_amd_backbone_layer4' in report and 'other classes (4) than the student (2, 3)' in report


def test_a_classifier_teaches_a_detector_and_plain_bases(tmp_path):
    student, teacher = write(tmp_path / 's.py', retinanet(8)), write(tmp_path / 't.py', classifier(16), 'mmpretrain')
    cfg, *_ = composed(student, teacher, tmp_path, 'feature', base='mgd')
    assert cfg.model.distiller == dict(type='mmkd_plugin.FeatureDistiller', base='mgd', layers=[
        f'backbone.layer{i}' for i in (2, 3, 4)])
    with pytest.raises(ValueError, match=r"base: 'pkd' compares channel with channel.*\[16\].*--base fitnet"):
        composed(student, teacher, tmp_path, 'feature', base='pkd', overwrite=True)


def test_an_error_without_a_message_says_where():
    def check():
        assert not [0]
    with pytest.raises(AssertionError) as caught:
        check()
    caught.value.args = ()
    assert in_words(caught.value).startswith('AssertionError: in check of test_compose_config.py, line ')
    assert in_words(KeyError('a\n b')) == "KeyError: 'a\\n b'" and len(in_words(ValueError('x' * 1000))) < 420


def test_weights_that_could_run_code_are_loaded_on_trust_only(tmp_path):
    student, teacher = detectors(tmp_path)
    weights, out = tmp_path / 'exotic.pth', str(tmp_path / 'o.py')
    torch.save(dict(state_dict=build_cfg_path(teacher, '').state_dict(), args=argparse.Namespace()), weights)
    with pytest.raises(ValueError, match='teacher_ckpt: .*refused because of argparse.Namespace.*--trust-checkpoint'):
        compose(student, teacher, 'amd', str(weights), out)
    compose(student, teacher, 'amd', str(weights), out, trust_checkpoint=True)
    assert Config.fromfile(out).model.trust_checkpoint is True


@pytest.mark.parametrize('change, message', [
    (dict(student='mmdet::retinanet/retinanet_r18_fpn_1x_cooc.py'),
     'STUDENT: no config.*retinanet_r18_fpn_1x_coco.py'),
    (dict(teacher='TMP/tt.py'), 'TEACHER: no config.*tt.py.*t.py'),
    (dict(student='mmpretrain::hivit/hivit-tiny-p16_16xb64_in1k.py',
          teacher='mmpretrain::hivit/hivit-small-p16_16xb64_in1k.py'), 'does not run on one image of 224 x 224, .*'),
    (dict(student='mmdet::gn+ws/faster-rcnn_r50_fpn_gn-ws-all_1x_coco.py'),
     'STUDENT: MMEngine does not read the name .*gn.*Use the path of the file'),
    (dict(student='configs/amd_retinanet_coco.py'), 'STUDENT: .* is a TeacherStudentDistill with a model inside'),
    (dict(student='mmpretrain::simclr/simclr_resnet50_8xb32-coslr-200e_in1k.py'),
     'STUDENT: .*SimCLR, expected a detector'),
    (dict(student='TMP/no_training.py'), 'cannot be trained, it has no train_cfg, optim_wrapper'),
    (dict(teacher_ckpt='no/teacher.pth'), "teacher_ckpt: no file 'no/teacher.pth'"),
    (dict(teacher_ckpt='TMP/other.pth'), 'teacher_ckpt: .* does not fit RetinaNet'),
    (dict(out='TMP/s.py'), r'out: .*s.py. exists.*--overwrite'),
    (dict(out='TMP/no/o.py'), 'out: expected a .py file in an existing directory'),
    (dict(out='TMP/o.txt'), 'out: expected a .py file'),
    (dict(base='fitnet'), "base: method amd has no base, got 'fitnet'"),
    (dict(layers=['nekc']), "layers.*no 'nekc'.*neck"),
    (dict(layers=['a=b=c']), 'layers: expected a list of names, or of pairs'),
    (dict(layers=['bbox_head']), 'did not run bbox_head'),
    (dict(teacher='TMP/five.py', layers=['bbox_head.retina_cls']), r'\[3\] classes, the teacher \[5\]'),
    (dict(student='TMP/frozen.py', layers=['backbone.layer1']),
     "loss_amd_backbone_layer1 does not reach the student: 'backbone.layer1' depends"),
    (dict(student='mmdet::ld/ld_r18-gflv1-r101_fpn_1x_coco.py'), 'STUDENT: .*KnowledgeDistillation.* teacher_config'),
    (dict(teacher='TMP/timm.py'), 'TEACHER: .*timm.py. cannot be built here: ImportError: TIMMBackbone requires timm'),
    (dict(teacher='TMP/small.py'), 'TEACHER: .*small.py. does not run on the student.s images of 256 x 256: '),
    (dict(student='TMP/lazy.py'), 'STUDENT: .* cannot be inherited'),
    (dict(student='TMP/broken.py'), 'one step on synthetic data fails: ValueError: avg_factor can not be used'),
], ids=lambda value: ' '.join(map(str, value.values())) if isinstance(value, dict) else '')
def test_mistakes_are_found_and_leave_nothing(change, message, tmp_path, monkeypatch):
    student, teacher = detectors(tmp_path)
    frozen, broken = retinanet(8), retinanet(8)
    frozen['backbone']['frozen_stages'] = 1
    broken['bbox_head']['loss_bbox'].update(reduction='sum')
    timm, small = retinanet(8), backbone_of(8, type='mmpretrain.BEiTViT', img_size=64, arch=dict(
        embed_dims=8, num_layers=1, num_heads=2, feedforward_channels=8))
    timm['backbone'] = dict(type='mmpretrain.TIMMBackbone', model_name='resnet18')
    write(tmp_path / 'five.py', retinanet(16, num_classes=5), classes='abcde')
    write(tmp_path / 'frozen.py', frozen)
    write(tmp_path / 'broken.py', broken)
    write(tmp_path / 'no_training.py', retinanet(8), train_cfg=None, optim_wrapper=None)
    write(tmp_path / 'timm.py', timm)
    write(tmp_path / 'small.py', small, 'mmpretrain')
    (tmp_path / 'lazy.py').write_text('from mmdet.models import RetinaNet\n' + Path(student).read_text())
    torch.save(build_cfg_path(student, '').state_dict(), tmp_path / 'other.pth')
    there = sorted(tmp_path.iterdir())
    arguments = dict(student=student, teacher=teacher, method='amd', teacher_ckpt=ADDRESS, out='TMP/o.py') | change
    with pytest.raises(ValueError, match=f'(?s){message}'):
        compose(**{key: value.replace('TMP', str(tmp_path)) if isinstance(value, str) else value
                   for key, value in arguments.items()})
    assert sorted(tmp_path.iterdir()) == there


def run(*command, ok=True):
    command = [sys.executable, '-W', 'ignore', *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_composed_and_trained_by_command(tmp_path):
    for name, width in (('s', 8), ('t', 16)):
        (tmp_path / f'{name}.py').write_text(f"""_base_ = ['mmpretrain::resnet/resnet18_8xb32_in1k.py']
model = dict(backbone=dict(base_channels={width}, stem_channels={width}), head=dict(in_channels={8 * width}))""")
    torch.save(build_cfg_path(str(tmp_path / 't.py'), '').state_dict(), tmp_path / 't.pth')
    out = tmp_path / 'distill.py'
    pair = (tmp_path / 's.py', tmp_path / 't.py', '--method', 'sokd', '--base', 'reviewkd', '--layers',
            'backbone.layer3', 'backbone.layer4=backbone.layer4', '--teacher-ckpt', tmp_path / 't.pth', '-o', out)
    data = miniature.make_imagenet(tmp_path / 'imagenet')
    said = run('tools/distill.py', *pair, '--work-dir', tmp_path / 'work', '--cfg-options', 'train_cfg.max_epochs=1',
               'model.distiller.dam.num_areas=2', 'default_hooks.logger.interval=1', *miniature.imagenet_options(data))
    report, _, log = said.partition(f'{out}: written.')
    assert 'mmengine' not in report and log  # no chatter of the libraries
    assert 'distill.loss_dam_area_backbone_layer4' in log and 'num_areas=2' in log
    assert (tmp_path / 'work/epoch_1.pth').is_file()
    assert run('tools/compose_config.py', *pair, ok=False) == (
        f"compose_config: out: '{out}' exists; choose another name, or overwrite it with --overwrite\n")
    other = run('tools/distill.py', *pair[:-1], tmp_path / 'none.py', '--resume', ok=False)
    assert f"--resume: no config '{tmp_path / 'none.py'}'" in other


def test_the_students_own_config_is_not_written_over(tmp_path):
    config, weights = tmp_path / 'small.py', tmp_path / 'w.pth'
    config.write_text("_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']")
    weights.touch()
    before = config.read_text()
    with pytest.raises(ValueError, match='out: .* is the STUDENT. Choose another name'):
        compose(str(config), 'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py', 'feature', str(weights), str(config),
                overwrite=True)
    assert config.read_text() == before
