import doctest
import math

import numpy as np
import pytest
import torch
from operations import count_operations, devices_of
from torch.nn.functional import cosine_similarity

from mmkd_plugin.models.losses import AMDLoss, amd_logits, amd_loss

# Inputs are features(shape, k), student k = 0.7, teacher k = 1.1. Columns: the value of the global loss in float64
# and the norm of its gradient; what the authors' released code (jeunsom/AMD_loss, commit 7169f62) gives in float32;
# 0.8 global + 0.2 local on a 2 x 2 grid; the global loss for margin 1.1 and scale 30.
REFERENCE = [
    ((2, 4, 4, 4), (2, 4, 4, 4), 0.007550382234036445, 0.008862857500296696, 0.007550383452326059,
     0.01122792563481245, 0.016224360305707546),
    ((2, 8, 8, 8), (2, 16, 8, 8), 0.0002596163287775161, 7.030061500364141e-05, 0.0002596162084955722,
     0.0003703979246441884, 0.006298539021091644),
    ((2, 3, 13, 9), (2, 7, 13, 9), 0.0002392317994976637, 2.6051549198861466e-05, 0.00023923178378026932,
     0.00035048558555327323, 0.0023329671492511683),
    ((2, 16, 28, 28), (2, 16, 28, 28), 4.659681780576781e-07, 6.893430178279075e-08, 4.6596815650445933e-07,
     7.378117211003287e-07, 4.4321143762349135e-06),
]
SIZES = [(8, 8), (16, 16), (56, 56), (100, 168)]
PYRAMID = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]  # of a RetinaNet
FORMS = [dict(), dict(local_grid=2), dict(scale_free=True), dict(scale_free=True, local_grid=3, local_weight=0.4)]


def features(shape, k, dtype=torch.float64):
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(k * i + 0.3 * k) + 0.5 * torch.cos(0.013 * i * k)).clamp(min=0).reshape(shape).to(dtype)


def noise(size, dtype=torch.float64, channels=64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, *size, generator=generator, dtype=torch.float64).relu().to(dtype)
            for _ in range(2)]


def value_and_gradient(loss, student, teacher):
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    return value, torch.autograd.grad(value, student)[0]


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('row', REFERENCE, ids=lambda row: 'x'.join(map(str, row[0])))
def test_paper_form_has_the_reference_values(row, dtype):
    s_shape, t_shape, value, gradient_norm, authors, local, other = row
    student, teacher = features(s_shape, 0.7, dtype), features(t_shape, 1.1, dtype)
    got, gradient = value_and_gradient(AMDLoss(), student, teacher)
    assert got.item() == pytest.approx(value, rel=1e-5)
    assert got.item() == pytest.approx(authors, rel=1e-5)
    assert gradient.norm().item() == pytest.approx(gradient_norm, rel=1e-5)
    assert AMDLoss(local_grid=2)(student, teacher).item() == pytest.approx(local, rel=1e-5)
    assert AMDLoss(margin=1.1, scale=30.)(student, teacher).item() == pytest.approx(other, rel=1e-5)
    assert AMDLoss(loss_weight=3.)(student, teacher).item() == pytest.approx(3 * value, rel=1e-5)


def by_hand(student, teacher, margin=1.35, scale=64., grid=1, scale_free=False):
    """Both forms in float64 NumPy, with loops over samples and patches."""

    def project(attention):
        if scale_free:
            u = attention / (np.sqrt((attention**2).mean()) + 1e-6)
            return u / np.sqrt(u**2 + 3)
        return attention / (np.sqrt((attention**2).sum()) + 1e-6)

    def logits(q):
        positive = scale * np.cos(margin * np.arccos(np.clip(q, -1 + 1e-7, 1 - 1e-7)))
        negative = scale * (1 - q)
        return positive - np.logaddexp(positive, negative), positive, negative

    def distance(q_s, q_t):
        squares = [((s / np.linalg.norm(s) - t / np.linalg.norm(t))**2) for s, t in zip(logits(q_s), logits(q_t))]
        return np.mean([x.sum() if scale_free else x.mean() for x in squares])

    total = []
    for s, t in zip((student.numpy()**2).sum(1), (teacher.numpy()**2).sum(1)):
        g_h, g_w = min(grid, s.shape[0]), min(grid, s.shape[1])
        rows = [slice(i * (s.shape[0] // g_h), None if i == g_h - 1 else (i + 1) * (s.shape[0] // g_h))
                for i in range(g_h)]
        columns = [slice(i * (s.shape[1] // g_w), None if i == g_w - 1 else (i + 1) * (s.shape[1] // g_w))
                   for i in range(g_w)]
        if scale_free:
            patches = [(project(s[r, c]), project(t[r, c])) for r in rows for c in columns]
        else:
            q_s, q_t = project(s), project(t)
            patches = [(q_s[r, c], q_t[r, c]) for r in rows for c in columns]
        total.append(np.mean([distance(q_s, q_t) for q_s, q_t in patches]))
    return np.mean(total)


@pytest.mark.parametrize('scale_free', [False, True])
@pytest.mark.parametrize('grid', [1, 2, 3, 5, 50])
def test_any_grid_on_sizes_it_does_not_divide(grid, scale_free):
    student, teacher = features((2, 3, 13, 9), 0.7), features((2, 5, 13, 9), 1.1)
    expected = by_hand(student, teacher, scale_free=scale_free)
    if grid > 1:
        expected = 0.7 * expected + 0.3 * by_hand(student, teacher, grid=grid, scale_free=scale_free)
    loss = AMDLoss(local_grid=grid, local_weight=0.3, scale_free=scale_free)
    # a patch of one position is compared up to its sign only; there rounding may matter
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('size', [(28, 28), (56, 56), (100, 168)])
@pytest.mark.parametrize('scale_free', [False, True])
def test_float32_agrees_with_float64_on_large_maps(size, scale_free):
    loss = AMDLoss(scale_free=scale_free, local_grid=2)
    value, gradient = value_and_gradient(loss, *noise(size))
    value_32, gradient_32 = value_and_gradient(loss, *noise(size, torch.float32))
    assert value_32.item() == pytest.approx(value.item(), rel=1e-5)
    assert (gradient_32 - gradient).norm() < 1e-4 * gradient.norm()


@pytest.mark.parametrize('scale', [64., 1e-4], ids=['', 'norms below the bound of hats'])
@pytest.mark.parametrize('options', FORMS, ids=str)
def test_gradient_is_the_derivative(options, scale):
    students = [features((2, 3, *size), 0.7) + 0.1 for size in ((5, 4), (3, 3))]
    teachers = [features((2, 4, *size), 1.1) for size in ((5, 4), (2, 6))]
    loss = AMDLoss(scale=scale, **options)
    assert torch.autograd.gradcheck(lambda *x: loss(x, teachers), [x.requires_grad_() for x in students],
                                    atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize('options', FORMS, ids=str)
def test_the_loss_of_several_maps_is_the_sum_of_their_losses(options):
    shapes = [((2, 3, 13, 9), (2, 5, 13, 9)), ((2, 4, 6, 8), (2, 4, 4, 9)), ((2, 2, 1, 1), (2, 2, 1, 1)),
              ((2, 3, 1, 7), (2, 3, 2, 7)), ((2, 3, 0, 5), (2, 3, 0, 5))]
    students, teachers = zip(*((features(s, 0.7).requires_grad_(), features(t, 1.1)) for s, t in shapes))
    loss = AMDLoss(**options)
    together = loss(students, list(teachers))
    each = loss.per_map(students, teachers)
    torch.testing.assert_close(each, torch.stack([loss(*pair) for pair in zip(students, teachers)]))
    factors = torch.arange(1., 6., dtype=torch.float64)
    weighted = sum(factor * loss(*pair) for factor, pair in zip(factors, zip(students, teachers)))
    for got, expected in zip(torch.autograd.grad((each * factors).sum(), students),
                             torch.autograd.grad(weighted, students)):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-15)
    apart = sum(map(loss, students, teachers))
    assert together.shape == () and together.item() == pytest.approx(apart.item(), rel=1e-12)
    for got, expected in zip(torch.autograd.grad(together, students), torch.autograd.grad(apart, students)):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-15)


def test_the_function_is_the_module_without_its_weight():
    student, teacher = features((2, 3, 13, 9), 0.7), features((2, 5, 13, 9), 1.1)
    options = dict(margin=1.2, scale=32., local_grid=3, local_weight=0.3, scale_free=True)
    value, = amd_loss(student, teacher, **options)
    assert torch.equal(AMDLoss(**options, loss_weight=2.)(student, teacher), 2 * value)


@pytest.mark.parametrize('scale_free', [False, True])
def test_logits_are_those_of_the_equations(scale_free):
    attention = features((2, 13, 9), 0.7)
    norm = attention.flatten(1).norm(dim=1)[:, None, None]
    u = attention / (norm / 117**0.5 + 1e-6)
    q = u / (u**2 + 3).sqrt() if scale_free else attention / (norm + 1e-6)
    positive, negative = amd_logits(attention, margin=1.2, scale=2., scale_free=scale_free)
    torch.testing.assert_close(positive, 2 * torch.cos(1.2 * torch.acos(q)))
    torch.testing.assert_close(negative, 2 - 2 * q)


def test_scale_free_does_not_depend_on_the_resolution():
    values, gradients = [], []
    for size in SIZES:
        student, teacher = noise(size)
        value, gradient = value_and_gradient(AMDLoss(scale_free=True), student, teacher)
        values.append(value.item())
        gradients.append((gradient.norm() * student.norm()).item())
    assert max(values) < 1.5 * min(values)
    assert max(gradients) < 1.5 * min(gradients)
    paper = [AMDLoss()(*noise(size)).item() for size in SIZES]
    assert max(paper) > 1e4 * min(paper)  # what the form is for


@pytest.mark.parametrize('size, cosine', [((8, 8), 0.644), ((100, 168), 0.666)])
def test_scale_free_keeps_the_margin_in_the_gradients_direction(size, cosine):
    _, with_margin = value_and_gradient(AMDLoss(scale_free=True), *noise(size))
    _, without = value_and_gradient(AMDLoss(scale_free=True, margin=1.0), *noise(size))
    assert cosine_similarity(with_margin.flatten(), without.flatten(), 0).item() == pytest.approx(cosine, abs=2e-3)


def test_scale_free_is_zero_exactly_where_the_normalised_maps_agree():
    student, teacher = noise((16, 16))
    loss = AMDLoss(scale_free=True)
    assert loss(3 * teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    assert loss(torch.cat([teacher, teacher], 1), teacher).item() == pytest.approx(0, abs=1e-12)
    moved = teacher.clone()
    moved[0, 0, 0, 0] += 0.5
    assert loss(moved, teacher).item() > 1e-6
    assert loss(student, teacher).item() == pytest.approx(by_hand(student, teacher, scale_free=True), rel=1e-9)


@pytest.mark.parametrize('scale_free', [False, True])
def test_a_training_step_on_the_loss_lowers_it(scale_free):
    student, teacher = noise((14, 14))
    loss = AMDLoss(scale_free=scale_free)
    value, gradient = value_and_gradient(loss, student, teacher)
    step = 1e-3 * student.norm() / gradient.norm()
    assert loss(student - step * gradient, teacher) < value


def odd_maps():
    spike = torch.zeros(2, 3, 7, 5)
    spike[:, :, 3, 2] = 1e4
    small_spike = torch.zeros(2, 3, 7, 5)
    small_spike[:, :, 3, 2] = 1
    return {
        'zero': torch.zeros(2, 3, 7, 5),
        'constant': torch.ones(2, 3, 7, 5),
        'spike': spike,
        'small spike': small_spike,
        'one position': torch.rand(2, 3, 1, 1),
        'one huge position': torch.full((2, 3, 1, 1), 1e4),
        '1e4': 1e4 * torch.rand(2, 3, 7, 5),
        '1e15': 1e15 * torch.rand(2, 3, 7, 5),
        '1e-15': 1e-15 * torch.rand(2, 3, 7, 5),
        'empty batch': torch.zeros(0, 3, 7, 5),
        'empty map': torch.zeros(2, 3, 0, 5),
    }


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kind', odd_maps())
@pytest.mark.parametrize('options', [{}, dict(local_grid=2), dict(scale_free=True, local_grid=3)], ids=str)
def test_finite_on_odd_maps(kind, options, dtype):
    student = odd_maps()[kind].to(dtype)
    if not student.isfinite().all():
        pytest.skip('not a number of this dtype')
    for teacher in (torch.rand_like(student.float()).to(dtype), student.clone(), torch.zeros_like(student)):
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=dtype != torch.float32):
            value, gradient = value_and_gradient(AMDLoss(**options), student, teacher)
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert gradient.isfinite().all()
        # the loss depends on the direction of a map only, so that this product knows no scale; and nothing explodes
        assert (gradient.float().norm() * student.float().norm()) < 1e3


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('options', FORMS, ids=str)
def test_finite_on_all_odd_maps_at_once(options, dtype):
    students = [x.to(dtype).requires_grad_() for kind, x in odd_maps().items() if kind != 'empty batch'
                and x.to(dtype).isfinite().all()]
    teachers = [torch.rand_like(x) for x in students]
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=dtype != torch.float32):
        value = AMDLoss(**options)(students, teachers)
    assert value.dtype == torch.float32 and value.isfinite()
    for student, gradient in zip(students, torch.autograd.grad(value, students)):
        assert gradient.dtype == dtype and gradient.isfinite().all()
        assert (gradient.float().norm() * student.float().norm()) < 1e3


def test_float32_under_autocast():
    (student, teacher), (_, smaller) = noise((14, 14), torch.bfloat16), noise((9, 11), torch.bfloat16)
    loss = AMDLoss(scale_free=True)
    for other in (teacher, smaller):  # which is pooled to
        with torch.autocast('cpu', dtype=torch.bfloat16):
            value = loss(student, other)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(loss(student.double(), other.double()).item(), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_agrees_with_cpu(dtype):
    student, teacher = noise((28, 28), dtype)
    value, gradient = value_and_gradient(AMDLoss(scale_free=True), student, teacher)
    with torch.autocast('cuda', dtype=torch.float16):
        value_gpu, gradient_gpu = value_and_gradient(AMDLoss(scale_free=True), student.cuda(), teacher.cuda())
    assert value_gpu.item() == pytest.approx(value.item(), rel=1e-5)
    assert (gradient_gpu.cpu() - gradient).norm() < 1e-2 * gradient.norm()


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_deterministic_and_waits_for_nothing():
    students, teachers = zip(*([x.cuda() for x in noise(size, torch.float32)] for size in PYRAMID))
    students = [x.requires_grad_() for x in students]
    loss = AMDLoss(scale_free=True, local_grid=2)
    gradients = [torch.autograd.grad(loss(students, teachers), students)]
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_sync_debug_mode('error')
    try:
        gradients.append(torch.autograd.grad(loss(students, teachers), students))
    finally:
        torch.cuda.set_sync_debug_mode('default')
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*each) for each in zip(*gradients))


@pytest.mark.parametrize('options', FORMS, ids=str)
def test_stays_on_the_device_of_the_features(options):
    students, teachers = ([torch.rand(2, 4, *size, device='meta', requires_grad=side == 0)
                           for size in ((7, 5), (4 + side, 3))] for side in range(2))
    loss = AMDLoss(**options)
    loss(students, teachers)  # the first call makes indices on the CPU
    assert devices_of(lambda: loss(students, teachers).backward()) == {'meta'}
    assert students[1].grad.shape == (2, 4, 4, 3)
    empty = [x[:0] for x in students], [x[:0] for x in teachers]
    assert devices_of(lambda: loss(*empty).backward()) == {'meta'}


@pytest.mark.parametrize('maps, most', [(5, 150), (1, 110)])
def test_a_step_takes_few_operations(maps, most):
    students, teachers = zip(*(noise(size, torch.float32, channels=8) for size in PYRAMID[-maps:]))
    students = [x.requires_grad_() for x in students]
    loss = AMDLoss(scale_free=True, local_grid=2)
    loss(students, teachers)
    counts = count_operations(lambda: loss(students, teachers).backward())
    assert counts['acos'] == 1  # the count sees what is inside
    assert counts.total() <= most


@pytest.mark.parametrize('shape', [(7, 3, 4, 5), (2, 9, 8, 8), (1, 40, 3, 3)])
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_blocks_of_a_large_map_give_what_the_whole_gives(monkeypatch, shape, dtype):
    student, teacher = features(shape, 0.7, dtype), features(shape, 1.1, dtype)
    whole = value_and_gradient(AMDLoss(), student, teacher)
    monkeypatch.setitem(AMDLoss.forward.__globals__, 'BLOCK', 64)
    blocks = []
    operations = count_operations(lambda: blocks.extend(value_and_gradient(AMDLoss(), student, teacher)))
    assert operations['add_'] >= 10  # the blocks of both networks
    for got, expected in zip(blocks, whole):
        torch.testing.assert_close(got, expected, rtol=1e-6 if dtype == torch.float64 else 1e-2, atol=0)


def test_the_larger_attention_map_is_pooled_to_the_smaller():
    student, teacher = features((2, 3, 5, 7), 0.7), features((2, 5, 8, 3), 1.1)
    energy_s = torch.nn.functional.adaptive_avg_pool2d(student.square().sum(1, keepdim=True), (5, 3)).sqrt()
    energy_t = torch.nn.functional.adaptive_avg_pool2d(teacher.square().sum(1, keepdim=True), (5, 3)).sqrt()
    assert AMDLoss()(student, teacher).item() == pytest.approx(AMDLoss()(energy_s, energy_t).item(), rel=1e-9)


def test_the_teacher_receives_no_gradient():
    student, teacher = noise((8, 8))
    teacher.requires_grad_()
    value = AMDLoss(local_grid=2)(student.requires_grad_(), teacher)
    value.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_keeps_no_feature_sized_tensor_but_the_students_feature():
    student, teacher = noise((28, 28), torch.float32, channels=256)
    student.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        AMDLoss(scale_free=True, local_grid=2)(student, teacher)
    large = [x for x in kept if x.numel() >= student.numel()]
    assert {x.data_ptr() for x in large} == {student.data_ptr()}


def test_torch_compile_takes_it_at_several_sizes():  # from the second on, sizes are symbolic
    loss = AMDLoss(scale_free=True)
    compiled = torch.compile(loss, backend='eager')
    for size in ((12, 20), (6, 10)):
        student, teacher = noise(size, torch.float32, channels=4)
        values = [each(student.requires_grad_(), teacher) for each in (loss, compiled)]
        assert torch.equal(*values)
        assert torch.equal(*(torch.autograd.grad(value, student)[0] for value in values))


@pytest.mark.parametrize('options', [
    dict(margin=0), dict(margin=2.1), dict(margin=float('nan')), dict(margin='1.35'), dict(scale=0), dict(scale=-1.),
    dict(local_grid=0), dict(local_grid=1.5), dict(local_weight=-0.1), dict(local_weight=1.1), dict(loss_weight=-1),
    dict(loss_weight=None), dict(scale_free='yes')], ids=str)
def test_nonsense_is_refused_by_name(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f'{name}.*{value!r}'):
        AMDLoss(**options)


def test_the_example_of_the_docstring_runs():
    example, = doctest.DocTestFinder().find(AMDLoss, 'AMDLoss', globs={})[:1]
    assert example.examples and doctest.DocTestRunner().run(example).failed == 0


def test_features_of_the_wrong_form_are_refused():
    one = torch.rand(2, 8, 4, 4)
    for students, teachers in (([one, one], [one]), ([], []), ([one, one], [one, one[:1]])):
        with pytest.raises(ValueError, match='s_features.*t_features'):
            AMDLoss()(students, teachers)
    with pytest.raises(ValueError, match=r'\(2, 8\)'):
        AMDLoss()(torch.rand(2, 8), torch.rand(2, 8, 1, 1))
    with pytest.raises(ValueError, match=r'\(3, 8, 1, 1\)'):
        AMDLoss()(torch.rand(2, 8, 1, 1), torch.rand(3, 8, 1, 1))
