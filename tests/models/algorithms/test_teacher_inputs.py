"""The teacher sees what its own preprocessor would have made of the images."""
import copy

import pytest
import torch
from conftest import classification_batch, classifier, detection_batch, retinanet
from test_odd_data import samples

from mmkd_plugin.models.algorithms.teacher_inputs import TeacherInputs

AMD = dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=dict(scale_free=True))
MSE = dict(
    type='ConfigurableDistiller',
    student_recorders=dict(x=dict(type='ModuleOutputs', source='backbone.layer3')),
    teacher_recorders=dict(x=dict(type='ModuleOutputs', source='backbone.layer3')),
    distill_losses=dict(loss_mse=dict(type='L2Loss', normalize=False, div_element=True)),
    loss_forward_mappings=dict(loss_mse=dict(s_feature=dict(recorder='x', from_student=True),
                                             t_feature=dict(recorder='x', from_student=False))))


def distill(student, teacher, distiller=AMD, **fields):
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student, teacher=teacher,
                allow_random_teacher=True, distiller=distiller, **fields)


def losses_of(model, batch):
    return model(**model.data_preprocessor(copy.deepcopy(batch), True), mode='loss')


def seen_by(teacher):
    given = []
    teacher.backbone.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    return given


@pytest.mark.parametrize('teacher', [
    dict(), dict(pad_size_divisor=64), dict(pad_value=7), dict(pad_size_divisor=128, pad_value=-3, bgr_to_rgb=False),
    dict(mean=[100., 110., 120.], std=[1., 2., 3.], pad_value=114, pad_size_divisor=16)], ids=str)
def test_as_its_own_preprocessor_makes_it(build, teacher):
    """Of a student that pads nothing, images of other sizes in a batch."""
    model = build(distill(retinanet(8, pad_size_divisor=1), retinanet(8, **teacher)))
    batch = samples([[3, 3, 20, 20]], sizes=[(61, 97), (33, 130)])
    expected = model.teacher.data_preprocessor(copy.deepcopy(batch))['inputs']
    given = seen_by(model.teacher)
    losses = losses_of(model, batch)
    torch.testing.assert_close(given[0], expected, atol=1e-4, rtol=1e-5)
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in losses.values() if torch.is_tensor(value))


def test_nothing_to_do_is_nothing(build):
    model = build(distill(retinanet(8), retinanet(8, pad_size_divisor=16)))
    assert model.teachers[''].inputs is None
    batch = torch.zeros(1, 3, 32, 32)
    assert model.teachers[''].batch(batch, None) == (batch, None)


def floor_classifier():
    """A ConvNeXt, whose maps are rounded down."""
    return dict(
        type='mmpretrain.ImageClassifier', data_preprocessor=classifier()['data_preprocessor'],
        backbone=dict(type='mmpretrain.ConvNeXt', arch=dict(depths=[1, 1, 1, 1], channels=[8, 8, 32, 8]),
                      out_indices=(2, )), neck=dict(type='mmpretrain.GlobalAveragePooling'),
        head=dict(type='mmpretrain.LinearClsHead', num_classes=4, in_channels=8))


@pytest.mark.parametrize('size', [64, 50, 75])
def test_networks_that_round_differently_are_compared_on_common_cells(build, size):
    distiller = copy.deepcopy(MSE)
    distiller['teacher_recorders']['x']['source'] = 'backbone.stages.2'
    model = build(distill(classifier(8), floor_classifier(), distiller), 'mmpretrain').eval()
    batch = classification_batch(size=size)
    loss = losses_of(model, batch)['distill.loss_mse']
    with torch.no_grad():
        inputs = model.data_preprocessor(copy.deepcopy(batch))['inputs']
        s_map = model.student.backbone.layer3[0](model.student.backbone.layer2(model.student.backbone.layer1(
            model.student.backbone.maxpool(model.student.backbone.relu(model.student.backbone.norm1(
                model.student.backbone.conv1(inputs)))))))
        s_map = model.student.backbone.layer3[1](s_map)
        t_map = model.teacher.backbone.stages[2](model.teacher.backbone.downsample_layers[2](
            model.teacher.backbone.stages[1](model.teacher.backbone.downsample_layers[1](
                model.teacher.backbone.stages[0](model.teacher.backbone.downsample_layers[0](inputs))))))
    cells = min(s_map.shape[2], t_map.shape[2])
    assert s_map.shape[2] - t_map.shape[2] == (size != 64)
    expected = (s_map[..., :cells, :cells] - t_map[..., :cells, :cells]).square().mean()
    torch.testing.assert_close(loss, expected)


def test_a_pair_of_different_strides_is_interpolated_and_said(build, monkeypatch):
    messages = []
    monkeypatch.setattr('mmkd_plugin.models.algorithms.dry_run.print_log', lambda text, **_: messages.append(text))
    distiller = copy.deepcopy(MSE)
    distiller['teacher_recorders']['x']['source'] = 'backbone.layer4'
    teacher = classifier(8)
    teacher['backbone'].update(base_channels=4, stem_channels=4)  # 32 channels, too
    teacher['head']['in_channels'] = 32
    model = build(distill(classifier(8), teacher, distiller), 'mmpretrain')
    assert any('backbone.layer3 and backbone.layer4 have different strides' in text for text in messages)
    assert losses_of(model, classification_batch(size=75))['distill.loss_mse'] > 0


def test_a_teacher_at_its_own_resolution(build):
    model = build(distill(retinanet(8), retinanet(16), teacher_input_size=(96, 160)))
    given = seen_by(model.teacher)
    batch = detection_batch()
    losses = losses_of(model, batch)
    assert given[0].shape[2:] == (96, 160)
    assert all(losses[f'distill.loss_amd_neck_{level}'].isfinite() for level in range(3))
    model.data_preprocessor(batch, True)
    inputs, data_samples = model.teachers[''].batch(torch.zeros(2, 3, 64, 64), batch['data_samples'])
    assert data_samples[0].img_shape == (96, 160) and data_samples[0].batch_input_shape == (96, 160)
    before = batch['data_samples'][0].scale_factor  # of the width, of the height
    assert data_samples[0].scale_factor == pytest.approx((before[0] * 2.5, before[1] * 1.5))
    assert batch['data_samples'][0].img_shape == (64, 64)


def test_a_teacher_of_fixed_input_beside_a_student_of_another_size(build):
    teacher = dict(
        type='mmpretrain.ImageClassifier', data_preprocessor=classifier()['data_preprocessor'],
        backbone=dict(type='mmpretrain.SwinTransformerV2', img_size=64, window_size=[4, 4, 2, 2],
                      pretrained_window_sizes=[0] * 4, arch=dict(
                          embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], extra_norm_every_n_blocks=0)))
    distiller = dict(AMD, layers=[('backbone.layer4', 'backbone')])
    model = build(distill(classifier(8), teacher, distiller, teacher_input_size=64), 'mmpretrain')
    losses = losses_of(model, classification_batch(size=96))
    assert losses['distill.loss_amd_backbone_layer4'].isfinite()


def test_what_runs_in_the_loss_only_has_no_resolution_of_its_own(build):
    recorder = dict(x=dict(type='MethodOutputs', source='mmdet.models.necks.FPN.forward'))
    distiller = dict(MSE, student_recorders=recorder, teacher_recorders=recorder)
    crosskd = dict(type='mmkd_plugin.FeatureDistiller', layers=[], base='crosskd')
    with pytest.raises(ValueError, match="teacher_input_size: base 'crosskd' compares predictions"):
        build(distill(retinanet(8), retinanet(8), crosskd, teacher_input_size=64))
    with pytest.raises(ValueError, match='teacher_input_size: the recorded layers run only in .* RetinaNet'):
        build(distill(retinanet(8), retinanet(8), distiller, teacher_input_size=64))


def test_a_preprocessor_without_images_takes_no_size():
    with pytest.raises(ValueError, match='teacher_input_size: the teacher has no preprocessor for images'):
        TeacherInputs.between(torch.nn.Identity(), torch.nn.Identity(), (64, 64))


def test_samples_of_a_padded_batch_know_its_size(build):
    model = build(distill(retinanet(8, pad_size_divisor=1), retinanet(8, pad_size_divisor=64)))
    batch = samples([[3, 3, 20, 20]], sizes=[(61, 97), (33, 130)])
    data = model.data_preprocessor(batch, True)
    inputs, data_samples = model.teachers[''].batch(data['inputs'], data['data_samples'])
    assert inputs.shape[2:] == (64, 192)
    assert [sample.batch_input_shape for sample in data_samples] == [(64, 192)] * 2
    assert data_samples[1].img_shape == (33, 130) and data['data_samples'][0].batch_input_shape == (61, 130)
