"""Teacher and student may be anywhere when they are joined, and a step waits for no device.

``meta`` is a second device that every machine has: a computation on it and the CPU at once raises.
"""
import copy

import pytest
import torch
from conftest import classifier, detection_batch, retinanet
from test_odd_data import samples

from mmkd_plugin.models.recording import random_stream_kept

AMD = dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=dict(scale_free=True))
FITNET = dict(
    type='ConfigurableDistiller', student_recorders=dict(neck=dict(type='ModuleOutputs', source='neck')),
    teacher_recorders=dict(neck=dict(type='ModuleOutputs', source='neck')),
    connectors=dict(adapter=dict(type='ConvModuleConnector', in_channel=16, out_channel=16)),
    distill_losses=dict(loss_l2=dict(type='L2Loss')), loss_forward_mappings=dict(loss_l2=dict(
        s_feature=dict(recorder='neck', from_student=True, data_idx=0, connector='adapter'),
        t_feature=dict(recorder='neck', from_student=False, data_idx=0))))
OTHER = dict(pad_size_divisor=64, mean=[100., 110., 120.], std=[1., 2., 3.], bgr_to_rgb=False)


@pytest.fixture
def meta_copies(monkeypatch):
    """What is on ``meta`` can be copied to the CPU, as it can be from a GPU: as zeros."""
    plain = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda x: torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else plain(x))


def join(build, student, teacher, distiller):
    return build(dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student, teacher=teacher,
                      allow_random_teacher=True, distiller=distiller))


@pytest.mark.parametrize('distiller', [AMD, FITNET], ids=['amd', 'fitnet'])
@pytest.mark.parametrize('moved', ['student', 'teacher', 'both'])
def test_they_are_joined_wherever_they_are(build, monkeypatch, meta_copies, distiller, moved):
    from mmkd_plugin.models.algorithms import TeacherStudentDistill
    warned = []
    monkeypatch.setattr('mmkd_plugin.models.algorithms.dry_run.print_log', lambda text, **_: warned.append(text))
    models = dict(student=build(retinanet(8)), teacher=build(retinanet(8, **OTHER)))
    for name, model in models.items():
        if moved in (name, 'both'):
            model.to('meta')
    TeacherStudentDistill(models['student'], models['teacher'], copy.deepcopy(distiller))
    assert moved == 'student' or not warned  # of the trial at an odd size; from meta to the CPU nothing can be copied


def test_a_step_of_the_teacher_stays_on_its_device(build):
    model = join(build, retinanet(8, pad_size_divisor=1), retinanet(8, **OTHER), AMD)
    data = model.data_preprocessor(samples([[3, 3, 20, 20]], sizes=[(61, 97), (33, 130)]), True)
    model.to('meta')
    with model.distiller.student_recorders, torch.no_grad():
        model.student.extract_feat(data['inputs'].to('meta'))
    model.teachers[''].record(data['inputs'].to('meta'), data['data_samples'])
    model.teachers[''].align()
    for level in range(4):
        s_map, t_map = (model.distiller.get_record('neck', side, data_idx=level) for side in (True, False))
        assert s_map.is_meta and t_map.is_meta and s_map.shape == t_map.shape


def test_the_random_stream_is_kept():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with random_stream_kept():
        torch.rand(5)
    assert torch.equal(torch.rand(2), expected)


def test_a_deterministic_run_takes_our_backward_passes(build):
    model = join(build, retinanet(8, pad_size_divisor=1), retinanet(8, **OTHER), AMD)
    torch.use_deterministic_algorithms(True)
    try:
        data = model.data_preprocessor(samples([[3, 3, 20, 20]], sizes=[(61, 97), (33, 130)]), True)
        losses = model(**data, mode='loss')
        sum(value for name, value in losses.items() if name.startswith('distill')).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    gradients = [p.grad for p in model.student.neck.parameters() if p.grad is not None]
    assert gradients and all(x.isfinite().all() for x in gradients) and any(x.any() for x in gradients)


@pytest.mark.gpu
@pytest.mark.parametrize('precision', ['auto', 'float32', 'bfloat16', 'float16'])
def test_on_a_gpu_nothing_waits(build, precision):
    """Of our part of a step: the teacher, the records, the losses and the log."""
    from mmkd_plugin.engine.hooks.non_finite_loss_hook import _Step
    model = join(build, retinanet(8, pad_size_divisor=1), retinanet(8, **OTHER), AMD)
    model.teachers[''].forward.precision = precision
    model.cuda().train()
    plain = model.student.forward

    def forward(*args, **kwargs):
        torch.cuda.set_sync_debug_mode('default')  # MMDetection's assigners wait
        try:
            return plain(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode('error')

    model.student.forward = forward
    data = model.data_preprocessor(samples([[3, 3, 20, 20]], sizes=[(61, 97), (33, 130)]), True)
    model(**data, mode='loss')  # decides the precision, and waits for it
    try:
        torch.cuda.set_sync_debug_mode('error')
        losses = model(**data, mode='loss')
        total, log = model.parse_losses(losses)
        step = _Step(losses, data)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    total.backward()
    torch.cuda.synchronize()
    assert step.finite() and all(torch.as_tensor(value).isfinite() for value in log.values())


@pytest.mark.gpu
def test_on_a_gpu_the_default_is_half_and_close(build):
    model = join(build, retinanet(8), retinanet(8), AMD).cuda()
    data = model.data_preprocessor(detection_batch(), True)
    model.teachers[''].record(data['inputs'], data['data_samples'])
    found = [model.distiller.get_record('neck', False, data_idx=level) for level in range(4)]
    with torch.no_grad():
        expected = model.teacher.extract_feat(data['inputs'])
    assert {form.dtype for form in model.teachers[''].forward.forms.values()} == {torch.float16}
    for x, y in zip(found, expected):
        assert x.dtype == torch.float32 and x.is_contiguous() and 0 < (x - y).norm() < 0.01 * y.norm()


@pytest.mark.gpu
def test_on_a_gpu_the_students_random_stream_is_its_own(build):
    torch.cuda.manual_seed(3)
    expected = torch.rand(2, device='cuda')
    torch.cuda.manual_seed(3)
    with random_stream_kept():
        torch.rand(5, device='cuda')
    assert torch.equal(torch.rand(2, device='cuda'), expected)


@pytest.mark.gpu
def test_on_a_gpu_they_are_joined_wherever_they_are(build):
    from mmkd_plugin.models.algorithms import TeacherStudentDistill
    for devices in (('cpu', 'cuda'), ('cuda', 'cpu'), ('cuda', 'cuda')):
        student, teacher = (build(classifier(8), 'mmpretrain').to(device) for device in devices)
        model = TeacherStudentDistill(student, teacher, dict(AMD, layers=['backbone.layer3'])).cuda()
        assert all(p.is_cuda for network in (model, model.teacher) for p in network.parameters())
