"""What layers that write in place may do while something is recorded."""
import pytest
import torch
from conftest import classifier, retinanet

from mmkd_plugin.models.algorithms import TeacherStudentDistill


def distill(student, recorders, teacher=None):
    """The student, with L2 losses on what the recorders of both record."""
    both = [dict(recorder=name, from_student=side, **({'data_idx': 0} if 'Inputs' in recorder['type'] else {}))
            for name, recorder in recorders.items() for side in (True, False)]
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student, teacher=teacher or student,
                allow_random_teacher=True, distiller=dict(
        type='ConfigurableDistiller', student_recorders=recorders, teacher_recorders=recorders,
        distill_losses={f'loss_{name}': dict(type='L2Loss') for name in recorders},
        loss_forward_mappings={f'loss_{name}': dict(s_feature=s, t_feature=t)
                               for name, s, t in zip(recorders, both[::2], both[1::2])}))


def outputs(source):
    return dict(feature=dict(type='ModuleOutputs', source=source))


def in_place(model):
    return {name.split('.')[0] for name, layer in model.named_modules() if getattr(layer, 'inplace', False)}


def test_backbones_go_on_in_place_under_whole_stages(build):
    model = build(distill(retinanet(), outputs('backbone.layer3')))
    assert in_place(model.student) == in_place(model.teacher) == {'backbone'}
    assert in_place(build(retinanet())) == {'backbone', 'bbox_head'}
    model = build(dict(distill(retinanet(), {}), distiller=dict(
        type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=dict(scale_free=True))))
    assert in_place(model.student) == in_place(model.teacher) == {'backbone'}


@pytest.mark.parametrize('recorders', [
    outputs('backbone.layer1.0.bn1'), dict(feature=dict(type='ModuleInputs', source='backbone.layer1.0.relu')),
    dict(feature=dict(type='MethodInputs', source='mmpretrain.models.necks.GlobalAveragePooling.forward'))],
    ids=lambda recorders: recorders['feature']['type'])
def test_what_would_be_written_over_is_recorded_as_it_was(build, recorders):
    model = build(distill(classifier(), recorders), 'mmpretrain')
    assert in_place(model.student) == in_place(model.teacher) == set()


def test_the_record_of_a_norm_is_not_rectified(build):
    model = build(distill(classifier(), outputs('backbone.layer1.0.bn1')), 'mmpretrain').eval()
    with model.distiller.student_recorders, torch.no_grad():
        model.student(torch.randn(2, 3, 64, 64))
        assert (model.distiller.get_record('feature', True) < 0).any()


def test_a_record_that_the_model_adds_to_is_refused(build):
    with pytest.raises(ValueError, match=r"distiller.student_recorders: ImageClassifier goes on to write over what "
                                         r"'backbone.layer1.0.bn2' puts out, by an operation such as \+="):
        build(distill(classifier(), outputs('backbone.layer1.0.bn2')), 'mmpretrain')


def test_dropout_does_not_write_in_place(build):
    student = build(classifier(), 'mmpretrain')
    student.backbone.layer4.add_module('drop', torch.nn.Dropout(inplace=True))
    TeacherStudentDistill(student, build(classifier(), 'mmpretrain'),
                          distill(classifier(), outputs('backbone.layer3'))['distiller'])
    assert not student.backbone.layer4.drop.inplace and student.backbone.relu.inplace
