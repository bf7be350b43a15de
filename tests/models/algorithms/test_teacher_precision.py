"""The teacher runs in half precision, and nothing outside its forward notices but by speed."""
import copy

import pytest
import torch
from conftest import classification_batch, classifier, detection_batch, retinanet
from mmengine.model import ExponentialMovingAverage

from mmkd_plugin.models.algorithms import teacher_precision as module
from mmkd_plugin.models.algorithms.teacher_precision import suitable_dtype
from mmkd_plugin.models.recording import PartialForward

MSE = dict(
    type='ConfigurableDistiller',
    student_recorders=dict(neck=dict(type='ModuleOutputs', source='neck')),
    teacher_recorders=dict(neck=dict(type='ModuleOutputs', source='neck')),
    distill_losses=dict(loss_mse=dict(type='L2Loss', normalize=False, div_element=True)),
    loss_forward_mappings=dict(loss_mse=dict(s_feature=dict(recorder='neck', from_student=True, data_idx=0),
                                             t_feature=dict(recorder='neck', from_student=False, data_idx=0))))


@pytest.fixture
def log(monkeypatch):
    messages = []
    monkeypatch.setattr(module, 'print_log', lambda text, **_: messages.append(text))
    return messages


def distill(precision, student=None, teacher=None, distiller=MSE):
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student or retinanet(8),
                teacher=teacher or retinanet(8), allow_random_teacher=True, distiller=distiller,
                teacher_precision=precision)


def records(model, batch):
    """What the losses read of the teacher."""
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    model.teachers[''].record(data['inputs'], data['data_samples'])
    return [model.distiller.get_record('neck', False, data_idx=level) for level in range(4)]


def relative(x, y):
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize('device, autocast, bfloat16, expected', [
    ('cuda', None, False, torch.float16), ('cuda', torch.bfloat16, False, torch.bfloat16),
    ('cuda', torch.float16, True, torch.float16), ('cpu', None, True, torch.bfloat16),
    ('cpu', None, False, torch.float32), ('cpu', torch.bfloat16, False, torch.float32),
    ('meta', None, True, torch.float32)])
def test_auto_suits_the_device(monkeypatch, device, autocast, bfloat16, expected):
    monkeypatch.setattr(module, 'cpu_computes_bfloat16', lambda: bfloat16)
    assert suitable_dtype(torch.device(device), autocast) == expected


def test_the_cpu_is_asked_for_its_instructions(monkeypatch):
    for flags, expected in (('fpu avx512f', False), ('fpu avx512_bf16', True), ('fpu amx_bf16 amx_tile', True)):
        monkeypatch.setattr(module.Path, 'read_text', lambda _, flags=flags: f'flags : {flags}\n')
        assert module.cpu_computes_bfloat16.__wrapped__() is expected


def test_auto_is_bfloat16_on_a_cpu_made_for_it(build, log, monkeypatch):
    monkeypatch.setattr(module, 'cpu_computes_bfloat16', lambda: True)
    records(build(distill('auto')), detection_batch())
    assert 'bfloat16 and channels_last on cpu' in log[0]


def test_float32_is_to_the_bit_what_it_is(build, log):
    model, batch = build(distill('float32')), detection_batch()
    with torch.no_grad():
        expected = model.teacher.extract_feat(model.data_preprocessor(copy.deepcopy(batch))['inputs'])
    assert all(torch.equal(x, y) for x, y in zip(records(model, batch), expected)) and not log


def test_half_comes_close_and_reaches_the_losses_as_float32(build, log):
    model, batch = build(distill('bfloat16')), detection_batch()
    state = copy.deepcopy(model.teacher.state_dict())
    seen = {}
    model.teacher.backbone.conv1.register_forward_hook(
        lambda layer, inputs, output: seen.update(x=inputs[0], weight=layer.weight))
    model.teacher.backbone.bn1.register_forward_hook(lambda layer, inputs, output: seen.update(norm=layer.weight))
    found = records(model, batch)
    assert seen['x'].dtype == seen['weight'].dtype == torch.bfloat16 and seen['norm'].dtype == torch.float32
    assert seen['x'].is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model.teacher.extract_feat(model.data_preprocessor(copy.deepcopy(batch))['inputs'])
    assert seen['x'].dtype == seen['weight'].dtype == torch.float32  # outside a step the teacher is what it was
    assert all(torch.equal(value, state[key]) and value.dtype == state[key].dtype
               for key, value in model.teacher.state_dict().items())
    for x, y in zip(found, expected):
        assert x.dtype == torch.float32 and x.is_contiguous() and 0 < relative(x, y) < 0.05
    assert len(log) == 1 and 'bfloat16 and channels_last on cpu. The largest relative error' in log[0]


def test_a_training_step_reaches_the_student(build):
    model = build(distill('bfloat16'))
    data = model.data_preprocessor(detection_batch(), True)
    model(**data, mode='loss')['distill.loss_mse'].backward()
    assert model.student.backbone.conv1.weight.grad.abs().sum() > 0


def test_a_model_that_mixes_precisions_runs_by_autocast(build, log):
    swin = dict(type='mmpretrain.ImageClassifier', data_preprocessor=classifier()['data_preprocessor'], backbone=dict(
        type='mmpretrain.SwinTransformer', img_size=64, window_size=2, pad_small_map=True,
        arch=dict(embed_dims=8, depths=[2, 1, 1, 1], num_heads=[1, 1, 2, 2]), out_indices=(0, 1, 2, 3)))
    distiller = copy.deepcopy(MSE)
    for side in ('student_recorders', 'teacher_recorders'):
        distiller[side]['neck']['source'] = 'backbone'
    model = build(distill('bfloat16', swin, swin, distiller), 'mmpretrain')
    batch = classification_batch()
    found = records(model, batch)
    with torch.no_grad():
        expected = model.teacher.backbone(model.data_preprocessor(copy.deepcopy(batch))['inputs'])
    assert all(x.dtype == torch.float32 and 0 < relative(x, y) < 0.05 for x, y in zip(found, expected))
    assert len(log) == 1 and 'runs in bfloat16 by autocast on cpu (bfloat16 and channels_last fails: ' in log[0]


def test_where_half_is_too_coarse_float32_is_taken(build, log, monkeypatch):
    monkeypatch.setattr(module, 'TOLERANCE', 1e-6)
    model, batch = build(distill('bfloat16')), detection_batch()
    reference = build(distill('float32'))
    assert all(torch.equal(x, y) for x, y in zip(records(model, batch), records(reference, batch)))
    assert len(log) == 1 and 'runs in float32 on cpu instead of bfloat16: ' in log[0]


def test_an_error_without_text_is_no_end(build, log, monkeypatch):
    run = module._Form.__call__

    def only_float32(form, *args):
        if form.dtype:
            raise NotImplementedError
        run(form, *args)
    monkeypatch.setattr(module._Form, '__call__', only_float32)
    records(build(distill('bfloat16')), detection_batch())
    assert len(log) == 1 and 'fails: NotImplementedError: in only_float32 of test_teacher_precision.py' in log[0]


def test_what_is_not_finite_is_too_coarse():
    good, bad = torch.ones(3), torch.tensor([1., float('nan'), 1.])
    assert module._relative_error([bad], [good]) == module._relative_error([], [good]) == float('inf')
    assert module._relative_error([good * float('inf')], [good]) == float('inf')
    assert module._relative_error([good * 1.5], [good]) == pytest.approx(0.5)
    assert module._relative_error([good * 0], [good * 0]) == 0


def test_moved_or_loaded_anew_it_is_converted_anew(build):
    model, batch = build(distill('bfloat16')), detection_batch()
    before = records(model, batch)
    model.teacher.load_state_dict(build(retinanet(8), seed=5).state_dict())
    assert not torch.equal(before[0], records(model, batch)[0])
    model.to(torch.float64)
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    model.teachers[''].record(data['inputs'].double(), data['data_samples'])
    assert model.distiller.get_record('neck', False, data_idx=0).dtype == torch.float64


def test_an_ema_copy_shares_it(build):
    model = build(distill('bfloat16'))
    assert ExponentialMovingAverage(model).module.teachers[''].forward is model.teachers[''].forward


def test_under_autocast_it_follows_or_stays_as_stated(build, monkeypatch):
    batch = detection_batch()
    with torch.autocast('cpu', torch.bfloat16):
        found = records(build(distill('float32')), batch)
        assert found[0].dtype == torch.float32
        monkeypatch.setattr(module, 'cpu_computes_bfloat16', lambda: True)
        found = records(build(distill('auto')), batch)
    assert found[0].dtype == torch.bfloat16 and found[0].is_contiguous()


def test_what_is_recorded_in_the_loss_runs_as_the_student_does(build):
    recorder = dict(type='MethodOutputs', source='mmdet.models.necks.FPN.forward')
    distiller = copy.deepcopy(MSE)
    distiller.update(student_recorders=dict(neck=recorder), teacher_recorders=dict(neck=recorder))
    model = build(distill('bfloat16', distiller=distiller))
    seen = []
    model.teacher.backbone.conv1.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].dtype))
    records(model, detection_batch())
    assert seen == [torch.float32]
    assert isinstance(model.teachers[''].forward.forward, PartialForward)
