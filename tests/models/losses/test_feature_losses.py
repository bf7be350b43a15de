import pytest
import torch
from mmrazor.registry import MODELS as RAZOR_MODELS
from operations import count_operations, devices_of

from mmkd_plugin.registry import MODELS

RAZORS = {'FitNetLoss': dict(type='L2Loss', normalize=False, div_element=True), 'PKDLoss': dict(type='PKDLoss')}
OPERATIONS = {'FitNetLoss': 2, 'PKDLoss': 9}  # forward and backward, of one map


def value_and_gradient(loss, student, teacher):
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher)
    return value.detach(), *torch.autograd.grad(value, student)


def losses(name):
    return MODELS.build(dict(type=f'mmkd_plugin.{name}')), RAZOR_MODELS.build(dict(RAZORS[name]))


@pytest.mark.parametrize('shape', [(2, 8, 16, 12), (1, 3, 5, 1), (4, 5, 3, 3)], ids=str)
@pytest.mark.parametrize('scale, shift', [(1., 0.), (0.1, 0.), (30., 100.)])
@pytest.mark.parametrize('name', RAZORS)
def test_agrees_with_mmrazor(name, shape, scale, shift):
    ours, razors = losses(name)
    student = scale * torch.randn(shape) + shift
    teacher = student + scale * torch.randn(shape)
    expected = value_and_gradient(razors, student.double(), teacher.double())
    for found, value in zip(value_and_gradient(ours, student, teacher), expected):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), value, rtol=1e-4, atol=1e-4 * value.abs().max().item())


def test_pkd_of_channels_without_variance_teaches_nothing():
    loss, _ = losses('PKDLoss')
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    student[:, 0], teacher[:, :2] = 2., -1.
    value, gradient = value_and_gradient(loss, student, teacher)
    assert value.isfinite() and gradient.isfinite().all() and gradient[:, 2].any()
    value, gradient = value_and_gradient(loss, torch.randn(1, 3, 1, 1), torch.randn(1, 3, 1, 1))
    assert value == 0 and not gradient.any()  # one value a channel


@pytest.mark.parametrize('name', RAZORS)
def test_computes_in_float32(name):
    loss, _ = losses(name)
    student, teacher = torch.randn(2, 4, 8, 8).bfloat16(), torch.randn(2, 4, 8, 8).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        value, gradient = value_and_gradient(loss, student, teacher)
    assert value.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert value == value_and_gradient(loss, student.float(), teacher.float())[0]


@pytest.mark.parametrize('name', RAZORS)
def test_takes_few_operations_on_one_device(name):
    loss, _ = losses(name)
    maps = [torch.randn(2, 4, 8, 8, device='meta', requires_grad=needs) for needs in (True, False)]
    assert devices_of(lambda: loss(*maps).backward()) == {'meta'}
    student, teacher = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8)
    counts = count_operations(lambda: torch.autograd.grad(loss(student, teacher), student))
    assert sum(counts.values()) <= OPERATIONS[name] + counts['ones_like'], counts
