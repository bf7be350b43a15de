"""Maps of student and teacher meet on the cells that cover the same pixels."""
import pytest
import torch
from conftest import retinanet
from mmrazor.models.task_modules import RecorderManager

from mmkd_plugin.models.alignment import Alignment, Place, compared_maps, crop_to_common, resize, stride_ratio


def ramp(height, width, channels=1):
    return (torch.arange(height)[:, None] * 100. + torch.arange(width)).expand(1, channels, height, width)


def test_crop_keeps_the_upper_left_cells_of_both():
    s_map, t_map = crop_to_common(ramp(5, 7), ramp(8, 4, channels=3))
    assert torch.equal(s_map, ramp(5, 4)) and torch.equal(t_map, ramp(5, 4, channels=3))
    assert s_map.is_contiguous() and t_map.is_contiguous()


def test_crop_leaves_equal_maps_alone():
    maps = ramp(4, 6), ramp(4, 6)
    assert all(new is old for new, old in zip(crop_to_common(*maps), maps))


def test_resize_averages_what_it_leaves_out():
    checkered = torch.tensor([0., 1.]).repeat(8)[None, :].repeat(16, 1)[None, None]
    assert resize(checkered, (16, 4))[..., 1:-1].sub(0.5).abs().max() < 0.01  # sampling alone would give 0 or 1
    x = torch.randn(1, 2, 4, 4, dtype=torch.bfloat16)
    assert resize(x, (4, 4)) is x and resize(x, (8, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize('lengths, ratio', [
    ((28, 28, 224, 224), 1), ((28, 14, 224, 224), 2), ((14, 28, 224, 224), 0.5),
    ((4, 3, 224, 224), 1),  # stride 64, rounded up and down
    ((28, 48, 224, 384), 1), ((28, 24, 224, 384), 2), ((16, 7, 224, 224), 16 / 7), ((2, 1, 256, 256), 2),
])
def test_ratio_of_strides(lengths, ratio):
    assert stride_ratio(*lengths) == pytest.approx(ratio)


def full(*values):
    """Recorders that hold these values."""
    manager = RecorderManager({str(i): dict(type='ModuleOutputs', source='') for i in range(len(values))})
    manager.initialize(torch.nn.Identity())
    for i, value in enumerate(values):
        manager.get_recorder(str(i)).data_buffer.append(value)
    return [manager.get_recorder(str(i)) for i in range(len(values))]


def test_alignment_within_a_pyramid_and_of_maps_in_several_pairs():
    student, first, second = full((ramp(5, 5), ramp(3, 3)), (ramp(5, 6), ramp(4, 3)), ramp(4, 4))
    places = [Place(student, (0, 0)), Place(student, (0, 1))]
    Alignment({(places[0], Place(first, (0, 0))): (1., 1.), (places[1], Place(first, (0, 1))): (1., 1.),
               (places[0], Place(second, (0,))): (1., 1.)})()
    assert [x.shape[2:] for x in student.data_buffer[0]] == [(4, 4), (3, 3)]
    assert [x.shape[2:] for x in first.data_buffer[0]] == [(4, 4), (3, 3)]  # also with what second has left of it
    assert isinstance(first.data_buffer[0], tuple)


def test_alignment_enlarges_by_the_ratio_and_then_crops():
    student, teacher = full(ramp(5, 7), ramp(4, 4, channels=2))
    pair = Place(student, (0,)), Place(teacher, (0,))
    Alignment({pair: (2., 2.)})()
    assert torch.equal(student.data_buffer[0], ramp(5, 7))
    torch.testing.assert_close(teacher.data_buffer[0], resize(ramp(4, 4, channels=2), (8, 8))[:, :, :5, :7])


def test_alignment_with_a_resized_teacher_keeps_the_student_whole():
    student, teacher = full(ramp(5, 7), ramp(12, 12))
    Alignment({(Place(student, (0,)), Place(teacher, (0,))): None})()
    assert student.data_buffer[0].shape == teacher.data_buffer[0].shape == (1, 1, 5, 7)


def test_compared_maps_are_found_once_each(build):
    model = build(dict(type='mmkd_plugin.TeacherStudentDistill', architecture=retinanet(8), teacher=retinanet(8),
                       allow_random_teacher=True,
                       distiller=dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=dict(scale_free=True))))
    batch = torch.zeros(1, 3, 64, 64)
    with model.distiller.student_recorders, model.distiller.teacher_recorders, torch.no_grad():
        model.student.extract_feat(batch)
        model.teacher.extract_feat(batch)
    pairs = compared_maps(model.distiller)
    assert [(student.path, teacher.path) for student, teacher in pairs] == [((0, i), (0, i)) for i in range(4)]
