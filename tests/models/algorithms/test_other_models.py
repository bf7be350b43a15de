"""Nothing is tied to RetinaNet: library configs of other kinds, with small backbones, one step each."""
import copy

import pytest
import torch
from conftest import classification_batch, classifier, detection_batch, retinanet
from mmengine.hub import get_config

AMD = dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=dict(scale_free=True))


def library_model(name):
    model = get_config(f'mmdet::{name}').model
    if model.backbone.type == 'ResNet':
        model.backbone.update(depth=18, base_channels=8, init_cfg=None)
        model.backbone.update(style='pytorch', norm_cfg=dict(type='BN', requires_grad=True), norm_eval=False)
        model.neck.update(in_channels=[8, 16, 32, 64])
    else:
        model.backbone.init_cfg = None
    return model


def distill(student, teacher, **fields):
    return dict(dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student, teacher=teacher,
                     allow_random_teacher=True, distiller=AMD), **fields)


def losses_of(model, batch):
    return model(**model.data_preprocessor(batch, True), mode='loss')


@pytest.mark.parametrize('name', ['faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
                                  'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', 'gfl/gfl_r50_fpn_1x_coco.py',
                                  'rtmdet/rtmdet_tiny_8xb32-300e_coco.py'])
def test_one_step_of_another_detector(build, name):
    student, teacher = library_model(name), library_model(name)
    student.data_preprocessor.pop('batch_augments', None)
    model = build(distill(student, teacher))
    losses = losses_of(model, detection_batch(size=128, num_classes=80))
    distilled = [value for key, value in losses.items() if 'distill' in key]
    assert distilled and all(value.isfinite() for value in distilled) and sum(distilled) > 0
    sum(distilled).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.student.backbone.parameters())


def test_a_teacher_of_raw_images_gets_raw_images(build):
    teacher = retinanet(16)
    teacher['data_preprocessor'] = dict(type='mmdet.DetDataPreprocessor', pad_size_divisor=32)  # as YOLOX has
    model = build(distill(retinanet(8), teacher))
    batch = detection_batch()
    expected = model.teacher.data_preprocessor(copy.deepcopy(batch))['inputs'].float()
    given = []
    model.teacher.backbone.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    losses_of(model, batch)
    torch.testing.assert_close(given[0], expected, atol=1e-3, rtol=1e-5)


def test_a_teacher_that_states_no_preprocessor_is_taken_for_the_students(build):
    teacher = classifier(16)
    del teacher['data_preprocessor']
    model = build(distill(classifier(8), teacher, distiller=dict(AMD, layers=['backbone.layer3'])), 'mmpretrain')
    assert model.teachers[''].inputs is None


def test_normalisation_in_an_old_teacher_file_is_not_a_weight(build, tmp_path):
    state = build(retinanet(16)).state_dict()
    state['data_preprocessor.mean'] = state['data_preprocessor.std'] = torch.ones(3, 1, 1)
    torch.save(state, tmp_path / 'old.pth')
    model = build(distill(retinanet(8), retinanet(16), teacher_ckpt=str(tmp_path / 'old.pth')), seed=1)
    assert torch.equal(model.teacher.neck.fpn_convs[0].conv.weight, state['neck.fpn_convs.0.conv.weight'])


def test_a_student_by_cfg_path_keeps_its_own_preprocessor(build):
    model = build(distill(dict(cfg_path='mmpretrain::resnet/resnet18_8xb32_in1k.py'),
                          dict(cfg_path='mmpretrain::resnet/resnet18_8xb32_in1k.py'),
                          distiller=dict(AMD, layers=['backbone.layer4']),
                          data_preprocessor=dict(num_classes=1000, mean=[0, 0, 0], std=[1, 1, 1], to_rgb=True)),
                  'mmpretrain')
    assert type(model.data_preprocessor).__name__ == 'ClsDataPreprocessor'
    assert model.data_preprocessor.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])


def test_inheriting_a_container_of_a_head_for_other_classes_is_refused(build):
    student, teacher = (library_model('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py') for _ in range(2))
    student.roi_head.bbox_head.num_classes = 20
    with pytest.raises(ValueError, match=r"inherit: 'roi_head' has num_classes \[20\] in the student and \[80\]"):
        build(distill(student, teacher, inherit=['roi_head']))


def test_deliveries_run_the_teachers_loss_and_end_with_the_distillation(build):
    delivery = dict(type='MethodOutputs', max_keep_data=10,
                    method_path='mmpretrain.models.LinearClsHead.pre_logits')
    model = build(distill(classifier(8), classifier(8), distiller=dict(
        type='ConfigurableDistiller', distill_deliveries=dict(features=delivery))), 'mmpretrain')
    teacher_features = []
    model.teacher.head.fc.register_forward_pre_hook(lambda _, inputs: teacher_features.append(inputs[0]))
    student_features = []
    model.student.head.fc.register_forward_pre_hook(lambda _, inputs: student_features.append(inputs[0]))
    losses_of(model, classification_batch())
    assert torch.equal(teacher_features[0], student_features[0])  # delivered
    model.distillation_stopped = True
    losses_of(model, classification_batch())


def test_mmrazors_crd_wiring_builds(build):
    """It records the model's own inputs, for the data samples that only training has."""
    samples = dict(type='ModuleInputs', source='')
    feature = dict(type='ModuleOutputs', source='neck')
    model = build(distill(classifier(8), classifier(8), distiller=dict(
        type='ConfigurableDistiller', student_recorders=dict(neck_s=feature, data_samples=samples),
        teacher_recorders=dict(neck_t=feature),
        distill_losses=dict(loss_crd=dict(type='CRDLoss', neg_num=4, sample_n=16, dim_out=64)),
        loss_forward_mappings=dict(loss_crd=dict(
            s_feats=dict(from_student=True, recorder='neck_s', data_idx=0),
            t_feats=dict(from_student=False, recorder='neck_t', data_idx=0),
            data_samples=dict(from_student=True, recorder='data_samples', data_idx=1))))), 'mmpretrain')
    assert list(model.distiller.distill_losses) == ['loss_crd']


def test_an_ema_copy_does_not_move_the_teacher(build):
    model = build(distill(retinanet(8), retinanet(16)))
    copy.deepcopy(model).to(torch.float64)
    assert {p.dtype for p in model.teacher.parameters()} == {torch.float32}
