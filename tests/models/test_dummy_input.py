"""What a model is tried on when it is built: as many channels, and of a size, as it takes."""
import pytest
import torch
from conftest import classifier, retinanet

from mmkd_plugin.models.dummy_input import check_size, dummy_inputs, input_channels, set_dummy_sizes

AMD = dict(type='mmkd_plugin.AMDDistiller', layers=['backbone.layer3'])


def yolox(**backbone):
    return dict(
        type='mmdet.YOLOX', data_preprocessor=dict(type='mmdet.DetDataPreprocessor', pad_size_divisor=32),
        backbone=dict(type='mmdet.CSPDarknet', deepen_factor=0.33, widen_factor=0.125),
        neck=dict(type='mmdet.YOLOXPAFPN', in_channels=[32, 64, 128], out_channels=16, num_csp_blocks=1),
        bbox_head=dict(type='mmdet.YOLOXHead', num_classes=3, in_channels=16, feat_channels=16),
        train_cfg=dict(assigner=dict(type='mmdet.SimOTAAssigner', center_radius=2.5)),
        test_cfg=dict(score_thr=0.01, nms=dict(type='nms', iou_threshold=0.65)))


def swin_v2(size=256):
    return dict(type='mmpretrain.ImageClassifier', backbone=dict(
        type='mmpretrain.SwinTransformerV2', img_size=size, window_size=[8, 8, 8, 8], pretrained_window_sizes=[0] * 4,
        arch=dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], extra_norm_every_n_blocks=0)))


def mixer(size):
    return dict(type='mmpretrain.ImageClassifier', backbone=dict(
        type='mmpretrain.MlpMixer', img_size=size, patch_size=16,
        arch=dict(embed_dims=16, num_layers=1, tokens_mlp_dims=8, channels_mlp_dims=8)))


def test_channels(build):
    assert input_channels(build(retinanet())) == 3
    assert input_channels(build(yolox())) == 3  # its first convolution has 12, of blocks of 2 x 2
    grey = retinanet(mean=[120.], std=[60.], bgr_to_rgb=False)
    assert input_channels(build(grey)) == 3  # one mean serves any number of channels
    grey['backbone']['in_channels'] = 1
    assert input_channels(build(grey)) == 1
    many = classifier()
    many['data_preprocessor'].update(mean=[0.] * 12, std=[1.] * 12, to_rgb=False)
    assert input_channels(build(many, 'mmpretrain')) == 12


def test_a_yolox_pair_builds(build):
    model = build(dict(type='mmkd_plugin.TeacherStudentDistill', architecture=yolox(), teacher=yolox(),
                       allow_random_teacher=True, distiller=dict(AMD, layers=['neck'])))
    assert len(model.distiller.distill_losses) == 3  # one for each level


def sizes(student, teacher, **options):
    set_dummy_sizes(student, teacher, options.get('input_size'), options.get('teacher_size'))
    return tuple(dummy_inputs(model)[0].shape[2:] for model in (student, teacher))


def test_sizes_are_padded_as_both_preprocessors_pad(build):
    assert sizes(build(retinanet()), build(retinanet())) == ((256, 256), ) * 2
    plain = build(classifier(), 'mmpretrain')
    assert sizes(plain, plain) == ((224, 224), ) * 2
    assert sizes(plain, build(retinanet(pad_size_divisor=128))) == ((256, 256), ) * 2
    assert sizes(plain, plain, input_size=(96, 64)) == ((96, 64), ) * 2
    assert sizes(plain, build(classifier(), 'mmpretrain'), teacher_size=(96, 96)) == ((224, 224), (96, 96))


def test_networks_of_fixed_input_are_tried_at_theirs(build, monkeypatch):
    messages = []
    monkeypatch.setattr('mmkd_plugin.models.dummy_input.print_log', lambda text, **_: messages.append(text))
    free, fixed = build(classifier(), 'mmpretrain'), build(mixer(96), 'mmpretrain')
    assert sizes(free, fixed) == ((96, 96), ) * 2
    assert '224 x 224, but they do on one of 96 x 96' in messages.pop()
    assert sizes(fixed, free) == ((96, 96), ) * 2
    messages.clear()
    assert sizes(free, fixed, input_size=(96, 96)) == ((96, 96), ) * 2
    assert sizes(free, fixed, teacher_size=(96, 96)) == ((224, 224), (96, 96))
    assert not messages


def test_a_teacher_of_fixed_input_builds(build):
    model = build(dict(type='mmkd_plugin.TeacherStudentDistill', architecture=swin_v2(), teacher=swin_v2(),
                       allow_random_teacher=True, distiller=dict(AMD, layers=['backbone'])), 'mmpretrain')
    assert len(model.distiller.distill_losses) == 1


@pytest.mark.parametrize('size', [0, (3, ), (3, 4.), 'large', True, (5, -1)])
def test_a_size_is_two_whole_numbers(build, size):
    with pytest.raises(ValueError, match='input_size: not a size in pixels'):
        check_size('input_size', size)
    with pytest.raises(ValueError, match='teacher_input_size: not a size in pixels'):
        build(dict(type='mmkd_plugin.TeacherStudentDistill', architecture=classifier(), teacher=classifier(),
                   allow_random_teacher=True, distiller=AMD, teacher_input_size=size), 'mmpretrain')


def test_an_odd_size_is_tried_and_its_failure_said(build, monkeypatch):
    messages = []
    monkeypatch.setattr('mmkd_plugin.models.algorithms.dry_run.print_log', lambda text, **_: messages.append(text))
    free, fixed = classifier(), mixer(224)
    recorders = dict(x=dict(type='ModuleOutputs', source='backbone'))
    distiller = dict(
        type='ConfigurableDistiller', student_recorders=dict(x=dict(recorders['x'], source='neck')),
        teacher_recorders=recorders,
        distill_losses=dict(loss_l2=dict(type='L2Loss')), loss_forward_mappings=dict(loss_l2=dict(
            s_feature=dict(recorder='x', from_student=True, data_idx=0),
            t_feature=dict(recorder='x', from_student=False, data_idx=0))))
    free['backbone'].update(base_channels=2, stem_channels=2)
    fixed['neck'] = dict(type='mmpretrain.GlobalAveragePooling', dim=1)
    distiller['teacher_recorders']['x']['source'] = 'neck'
    fields = dict(type='mmkd_plugin.TeacherStudentDistill', architecture=free, teacher=fixed,
                  allow_random_teacher=True, distiller=distiller)
    build(fields, 'mmpretrain')
    assert any('Distillation fails on an image of 150 x 101' in text for text in messages)
    messages.clear()
    build(dict(fields, input_size=224), 'mmpretrain')
    assert not any('150' in text for text in messages)


def test_dummy_inputs_are_where_the_model_is(build):
    model = build(retinanet()).to('meta')
    assert dummy_inputs(model)[0].is_meta
    assert dummy_inputs(build(classifier(), 'mmpretrain').to(torch.float64))[0].dtype == torch.float64
