"""What layers that write in place may do while something is recorded."""
import pytest
import torch
from conftest import classification_batch, classifier, retinanet
from mmcv.cnn import ConvModule

from mmkd_plugin.models import recording
from mmkd_plugin.models.algorithms import TeacherStudentDistill


def distill(student, recorders):
    """The student, with L2 losses on what the recorders of both record."""
    both = [dict(recorder=name, from_student=side, **({'data_idx': 0} if 'Inputs' in recorder['type'] else {}))
            for name, recorder in recorders.items() for side in (True, False)]
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student, teacher=student,
                allow_random_teacher=True, distiller=dict(
        type='ConfigurableDistiller', student_recorders=recorders, teacher_recorders=recorders,
        distill_losses={f'loss_{name}': dict(type='L2Loss') for name in recorders},
        loss_forward_mappings={f'loss_{name}': dict(s_feature=s, t_feature=t)
                               for name, s, t in zip(recorders, both[::2], both[1::2])}))


def outputs(source):
    return dict(feature=dict(type='ModuleOutputs', source=source))


def in_place(model):
    return {name.split('.')[0] for name, layer in model.named_modules()
            if getattr(layer, 'inplace', False) and not isinstance(layer, ConvModule)}


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(recording, 'print_log', lambda text, **_: messages.append(text))
    return messages


@pytest.mark.parametrize('distiller', [
    distill(retinanet(), outputs('backbone.layer3'))['distiller'],
    dict(type='mmkd_plugin.AMDDistiller', layers=['backbone.layer2', 'neck'], amd=dict(scale_free=True))],
    ids=lambda distiller: distiller['type'])
def test_layers_write_in_place_as_without_distillation(build, warnings, distiller):
    model = build(dict(distill(retinanet(), {}), distiller=distiller))
    assert in_place(model.student) == in_place(model.teacher) == in_place(build(retinanet())) == {
        'backbone', 'bbox_head'}
    assert warnings == []


@pytest.mark.parametrize('recorders', [
    outputs('backbone.layer1.0.bn1'), dict(feature=dict(type='ModuleInputs', source='backbone.layer1.0.relu')),
    dict(feature=dict(type='MethodInputs', source='mmpretrain.models.necks.GlobalAveragePooling.forward'))],
    ids=lambda recorders: recorders['feature']['type'])
def test_no_layer_does_where_a_record_would_change(build, warnings, recorders):
    model = build(distill(classifier(), recorders), 'mmpretrain')
    assert in_place(model.student) == in_place(model.teacher) == set()
    assert warnings == []


def test_nor_where_the_model_cannot_be_tried(build, warnings):
    student = build(classifier(), 'mmpretrain')
    student.neck = torch.nn.Conv2d(5, 5, 1)  # a neck that does not take the image, after what is recorded
    TeacherStudentDistill(student, build(classifier(), 'mmpretrain'),
                          distill(classifier(), outputs('backbone.layer3'))['distiller'])
    assert in_place(student) == set() and warnings == []


def test_the_loss_and_its_gradients_are_those_of_copies(build):
    """Of layers whose outputs are rectified at once, and of whole stages; the negative half of a norm is read."""
    found, data = [], classification_batch()
    for stopped in (False, True):
        model = build(distill(classifier(), {**outputs('backbone.layer1.0.bn1'),
                                             'stage': outputs('backbone.layer3')['feature']} if stopped else
                              {'stage': outputs('backbone.layer3')['feature']}), 'mmpretrain').train()
        losses = model(**model.data_preprocessor(data, True), mode='loss')
        sum(value for name, value in losses.items() if name in ('distill.loss_stage', 'student.loss')).backward()
        found.append([losses['distill.loss_stage'].detach(), *(p.grad for p in model.student.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    with torch.no_grad(), model.distiller.student_recorders:
        model.student(torch.randn(2, 3, 64, 64))
        assert (model.distiller.get_record('feature', True) < 0).any()


def test_a_record_that_the_model_adds_to_is_said(build, warnings):
    build(distill(classifier(), outputs('backbone.layer1.0.bn2')), 'mmpretrain')
    assert warnings == ['ImageClassifier seems to overwrite the recorded output of backbone.layer1.0.bn2 with an '
                        'in-place operation such as +=. The loss would read the changed values. Record the layer that '
                        'ends with this operation.'] * 2


def test_dropout_does_not_write_in_place(build):
    student = build(classifier(), 'mmpretrain')
    student.backbone.layer4.add_module('drop', torch.nn.Dropout(inplace=True))
    TeacherStudentDistill(student, build(classifier(), 'mmpretrain'),
                          distill(classifier(), outputs('backbone.layer3'))['distiller'])
    assert not student.backbone.layer4.drop.inplace and student.backbone.relu.inplace
