import pytest
from conftest import classifier, retinanet

AMD = dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=dict(scale_free=True))
LOSS = 'num_classes: the student has [4] classes, the teacher [5]; '


@pytest.fixture
def warnings(monkeypatch):
    from mmkd_plugin.models.algorithms import dry_run
    messages = []
    monkeypatch.setattr(dry_run, 'print_log', lambda text, **_: messages.append(text))
    return messages


def distill(student, teacher, distiller):
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student, teacher=teacher,
                allow_random_teacher=True, distiller=distiller)


def kd(**recorder):
    return dict(type='ConfigurableDistiller', student_recorders=dict(logits=recorder),
                teacher_recorders=dict(logits=recorder), distill_losses=dict(loss_kd=dict(type='KLDivergence')),
                loss_forward_mappings=dict(loss_kd=dict(
                    preds_S=dict(from_student=True, recorder='logits', data_idx=0),
                    preds_T=dict(from_student=False, recorder='logits', data_idx=0))))


@pytest.mark.parametrize('recorder', [
    dict(type='ModuleInputs', source='head.loss_module'),
    dict(type='MethodInputs', source='mmpretrain.models.losses.CrossEntropyLoss.forward'),
])
def test_of_what_only_the_loss_shows_nothing_is_promised(build, warnings, recorder):
    build(distill(classifier(8), classifier(8, num_classes=5), kd(**recorder)), 'mmpretrain')
    assert warnings == [LOSS + 'these losses may compare classes, which only training shows: loss_kd.']


def test_features_alone_are_said_to_be_features_alone(build, warnings):
    build(distill(classifier(8), classifier(8, num_classes=5), dict(AMD, layers=['backbone.layer3'])), 'mmpretrain')
    assert warnings == [LOSS + 'only features are distilled.']


def test_equal_classes_are_no_news(build, warnings):
    build(distill(retinanet(8), retinanet(8), AMD))
    assert warnings == []


def test_maps_of_classes_within_a_head_are_compared(build):
    with pytest.raises(ValueError, match=r'retina_cls_0 compares outputs of heads.*\[3\] classes.*\[5\]'):
        build(distill(retinanet(8), retinanet(8, num_classes=5), dict(AMD, layers=['bbox_head.retina_cls'])))
