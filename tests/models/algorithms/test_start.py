"""What the student starts from, and whose layers a config names."""
import pytest
import torch
from conftest import classifier
from mmengine.runner import load_checkpoint


def distil(**fields):
    return dict(dict(type='mmkd_plugin.TeacherStudentDistill', architecture=classifier(8), teacher=classifier(8),
                     allow_random_teacher=True, inherit=['backbone.layer4'],
                     distiller=dict(type='mmkd_plugin.AMDDistiller', layers=['backbone.layer3'])), **fields)


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_a_random_teacher_is_initialised_before_it_is_inherited_from(build):
    """With weights as PyTorch leaves them, a Sparse R-CNN has boxes of no size."""
    teacher = classifier(8)
    teacher['backbone']['init_cfg'] = dict(type='Constant', layer='Conv2d', val=0.25)
    model = build(distil(teacher=teacher), 'mmpretrain')
    model.init_weights()
    assert (model.teacher.backbone.layer4[0].conv1.weight == 0.25).all()
    assert (model.student.backbone.layer4[0].conv1.weight == 0.25).all()
    assert not (model.student.backbone.layer3[0].conv1.weight == 0.25).any()


def test_a_teacher_with_weights_keeps_them(build, tmp_path):
    teacher = build(classifier(8), 'mmpretrain', seed=4)
    torch.save(teacher.state_dict(), tmp_path / 't.pth')
    model = build(distil(teacher_ckpt=str(tmp_path / 't.pth')), 'mmpretrain')
    model.init_weights()
    assert same(model.teacher, teacher)


def test_a_random_teacher_does_not_change_the_students_start(build):
    plain, model = build(classifier(8), 'mmpretrain'), build(distil(inherit=[]), 'mmpretrain')
    for each in (plain, model):
        torch.manual_seed(1)
        each.init_weights()
    assert same(plain, model.student)


@pytest.mark.parametrize('content', ['plain', 'distillation'])
def test_load_from_comes_before_what_is_inherited(build, tmp_path, content):
    """Weights of the plain student, by ``load_from``, are no reason not to inherit; a distillation's are."""
    model = build(distil(), 'mmpretrain')
    other = build(distil(), 'mmpretrain', seed=9)
    other.init_weights()
    torch.save(dict(state_dict=(other.student if content == 'plain' else other).state_dict()), tmp_path / 'x.pth')
    model.init_weights()
    load_checkpoint(model, str(tmp_path / 'x.pth'))  # as Runner.train does after it has initialised
    layer4 = model.student.backbone.layer4
    assert same(model.student.backbone.layer3, other.student.backbone.layer3)
    assert same(layer4, (model.teacher if content == 'plain' else other.student).backbone.layer4)
    assert not same(layer4, (other.student if content == 'plain' else model.teacher).backbone.layer4)


def test_what_is_only_tested_is_what_was_loaded(build, tmp_path):
    model, other = build(distil(), 'mmpretrain'), build(distil(), 'mmpretrain', seed=9)
    torch.save(other.student.state_dict(), tmp_path / 'x.pth')
    load_checkpoint(model, str(tmp_path / 'x.pth'))  # as Runner.test does, which does not initialise
    assert same(model.student, other.student)
    model.init_weights()
    load_checkpoint(model.eval(), str(tmp_path / 'x.pth'))  # to be drawn
    assert same(model.student, other.student)


def test_a_student_for_other_classes_is_shown_to_load_from(build, tmp_path):
    other = build(classifier(8, num_classes=7), 'mmpretrain', seed=9)
    torch.save(other.state_dict(), tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='(?s)^student_ckpt: .*head.fc.*other classes, set load_from to the file'):
        build(distil(inherit=[], student_ckpt=str(tmp_path / 'x.pth')), 'mmpretrain')
    with pytest.raises(ValueError, match='^student_ckpt: cannot load .*none.pth') as error:
        build(distil(inherit=[], student_ckpt='none.pth'), 'mmpretrain')
    assert 'load_from' not in str(error.value)
    model = build(distil(inherit=[]), 'mmpretrain')
    load_checkpoint(model, str(tmp_path / 'x.pth'))
    assert same(model.student.backbone, other.backbone)


@pytest.mark.parametrize('grey', ['teacher', 'student'])
def test_a_grey_and_a_colour_network_are_refused(build, grey):
    one = classifier(8)
    one['backbone']['in_channels'] = 1
    one['data_preprocessor'] = dict(type='mmpretrain.ClsDataPreprocessor', mean=[33.3], std=[78.6])
    pair = dict(teacher=one) if grey == 'teacher' else dict(architecture=one)
    with pytest.raises(ValueError, match='^teacher: the number of image channels.*got {}, expected {}. Use'.format(
            *((1, 3) if grey == 'teacher' else (3, 1)))):
        build(distil(**pair), 'mmpretrain')
    build(distil(architecture=one, teacher=one), 'mmpretrain')


def test_whose_layer_is_unknown(build):
    for layers, whose in ((('backbone.conv2', 'backbone.layer3'), 'student'),
                          (('backbone.layer3', 'backbone.conv2'), 'teacher')):
        model = distil(inherit=[], distiller=dict(type='mmkd_plugin.AMDDistiller', layers=[layers]))
        with pytest.raises(ValueError, match=rf"ImageClassifier has no 'backbone.conv2'.* This is the {whose}$"):
            build(model, 'mmpretrain')


def test_a_layer_of_the_other_network(build):
    """A pair in the wrong order."""
    mobile = classifier(8)
    mobile['backbone'] = dict(type='mmpretrain.MobileNetV2', widen_factor=0.25)
    mobile['head']['in_channels'] = 1280
    pair = ('backbone.layer3.1.conv2', 'backbone.layer3.0.conv.0.conv')
    student = "This is the student. The teacher, ImageClassifier, has it. In a pair"
    for layers, distiller in (([pair], 'mmkd_plugin.AMDDistiller'), ([pair[::-1]], 'mmkd_plugin.AMDDistiller')):
        swapped = layers == [pair]
        model = distil(inherit=[], distiller=dict(type=distiller, layers=layers),
                       **dict(architecture=mobile if swapped else classifier(8),
                              teacher=classifier(8) if swapped else mobile))
        with pytest.raises(ValueError, match=student):
            build(model, 'mmpretrain')
    recorders = dict(student_recorders=dict(x=dict(type='ModuleOutputs', source='backbone.layer3.1.conv2')))
    with pytest.raises(ValueError, match=rf'^distiller.student_recorders.x: .*{student}'):
        build(distil(inherit=[], architecture=mobile, distiller=dict(type='ConfigurableDistiller', **recorders)),
              'mmpretrain')
