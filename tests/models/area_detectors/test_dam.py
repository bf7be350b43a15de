import doctest
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmkd_plugin.models.area_detectors import (
    DAM,
    Areas,
    area_loss,
    count_areas,
    decode,
    detection_loss,
    find_areas,
    to_row,
)
from mmkd_plugin.models.area_detectors import dam as dam_module
from mmkd_plugin.models.area_detectors.dam import REGIONS, DetectionHead
from mmkd_plugin.models.connectors import ConvAdapter
from mmkd_plugin.registry import MODELS


def random_raw(n=2, h=9, w=13, seed=0):
    """Raw outputs of teacher and student, (2, n, 5, h w)."""
    return torch.randn(2, n, 5, h * w, generator=torch.Generator().manual_seed(seed)) * 2


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softplus(x):
    return math.log1p(math.exp(x))


def naive_boxes(raw, h, w, num_areas):
    """The definition in plain Python: per image, the (score, x1, y1, x2, y2) of the best areas."""
    images = []
    for i in range(raw.shape[1]):
        heat = [[math.prod(sigmoid(side[i, 0, y * w + x].item()) for side in raw) for x in range(w)]
                for y in range(h)]
        found = []
        for y in range(h):
            for x in range(w):
                around = [heat[b][a] for b in range(max(y - 1, 0), min(y + 2, h))
                          for a in range(max(x - 1, 0), min(x + 2, w))]
                if heat[y][x] < max(around):
                    continue
                mean = [sum(meaning(side[i, channel, y * w + x].item()) for side in raw) / len(raw)
                        for channel, meaning in ((1, softplus), (2, softplus), (3, sigmoid), (4, sigmoid))]
                cx, cy = x + mean[2], y + mean[3]
                xs = [a for a in range(w) if abs(a + 0.5 - cx) <= mean[0] / 2 or a == x]
                ys = [b for b in range(h) if abs(b + 0.5 - cy) <= mean[1] / 2 or b == y]
                found.append((heat[y][x], xs[0], ys[0], xs[-1] + 1, ys[-1] + 1))
        images.append(sorted(found, reverse=True)[:num_areas])
    return images


def naive_area_loss(s, t, images, reduction):
    """The paper's plain sum over boxes, divided by channels and positions; float64."""
    total = 0.
    for i, boxes in enumerate(images):
        plain = positions = 0.
        for _, x1, y1, x2, y2 in boxes:
            for y in range(y1, y2):
                for x in range(x1, x2):
                    plain += (s[i, :, y, x].double() - t[i, :, y, x].double()).square().sum().item()
                    positions += 1
        total += plain / (s.size(1) * (positions if reduction == 'area' else s[0, 0].numel()))
    return total / len(images)


@pytest.mark.parametrize('region', ['mutual', 'student', 'teacher'])
@pytest.mark.parametrize(('num_areas', 'shape'), [(1, (9, 13)), (8, (9, 13)), (500, (9, 13)), (8, (1, 5)),
                                                  (8, (1, 1)), (8, (2, 2))])
def test_areas_and_their_loss_agree_with_a_naive_loop(region, num_areas, shape):
    raw = random_raw(2, *shape, seed=1)
    s, t = torch.randn(2, 3, *shape), torch.randn(2, 3, *shape)
    teacher, student = raw
    sides = dict(mutual=(student, teacher), student=(student, ), teacher=(teacher, ))[region]
    expected = naive_boxes(torch.stack(sides), *shape, num_areas)

    areas = find_areas(raw[REGIONS[region]], (shape, ), num_areas)
    counts = count_areas(areas, (shape, ))

    naive_counts = torch.zeros(2, 1, *shape)
    for i, boxes in enumerate(expected):
        valid = areas.log_scores[i, 0] > -math.inf
        assert valid.sum() == len(boxes) and valid[:len(boxes)].all()
        for j, (score, *box) in enumerate(boxes):
            assert areas.boxes[i, 0, j].tolist() == box
            assert areas.log_scores[i, 0, j].item() == pytest.approx(math.log(score), rel=1e-5)
            naive_counts[i, 0, box[1]:box[3], box[0]:box[2]] += 1
    assert torch.equal(counts.float(), naive_counts)
    for reduction in ('area', 'map'):
        value = area_loss(s.flatten(2), t.flatten(2), counts, (shape, ), reduction).item()
        assert value == pytest.approx(naive_area_loss(s, t, expected, reduction), rel=1e-5)


@pytest.mark.parametrize('shapes', [((9, 13), (4, 6), (1, 2)), ((1, 7), (5, 1), (3, 3)), ((2, 2), (6, 5))])
def test_a_pyramid_is_its_levels(shapes):
    raws = [random_raw(2, *shape, seed=10 + i) for i, shape in enumerate(shapes)]
    raw = torch.cat(raws, -1)
    areas = find_areas(raw, shapes, 5)
    each = [find_areas(one, (shape, ), 5) for one, shape in zip(raws, shapes, strict=True)]
    counts = count_areas(areas, shapes)
    parts = [count_areas(one, (shape, )) for one, shape in zip(each, shapes, strict=True)]
    for level, (one, part, (h, w)) in enumerate(zip(each, parts, shapes, strict=True)):
        found = one.log_scores[:, 0] > -math.inf
        assert torch.equal(areas.log_scores[:, level, :found.shape[1]], one.log_scores[:, 0])
        assert torch.equal(areas.boxes[:, level, :found.shape[1]][found], one.boxes[:, 0][found])
        assert not (areas.log_scores[:, level, found.shape[1]:] > -math.inf).any()
        assert torch.equal(counts[:, level, :h, :w], part[:, 0])
        assert counts[:, level].sum() == part.sum()
    s, t = ([torch.randn(2, 3, *shape) for shape in shapes] for _ in range(2))
    for reduction in ('area', 'map'):
        expected = sum(area_loss(a.flatten(2), b.flatten(2), part, (shape, ), reduction)
                       for a, b, part, shape in zip(s, t, parts, shapes, strict=True)) / len(shapes)
        torch.testing.assert_close(area_loss(to_row(s), to_row(t), counts, shapes, reduction), expected)
    expected = sum(detection_loss(*one, (shape, )) for one, shape in zip(raws, shapes, strict=True)) / len(shapes)
    torch.testing.assert_close(detection_loss(*raw, shapes), expected)


def test_each_box_counts_once_where_boxes_overlap():
    boxes = torch.tensor([[[[0., 0, 2, 2], [1, 1, 3, 2], [0, 0, 3, 3]]]])
    areas = Areas(boxes, torch.tensor([[[0., -1, -math.inf]]]))
    counts = count_areas(areas, ((3, 3), ))
    assert counts.tolist() == [[[[1, 1, 0], [1, 2, 1], [0, 0, 0]]]]
    s, t = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    s[0, :, 1, 1] = 3.
    s[0, :, 2, 2] = 100.  # under no valid box
    s, t = s.flatten(2), t.flatten(2)
    assert area_loss(s, t, counts, ((3, 3), ), 'area').item() == pytest.approx(2 * 9 / 6)
    assert area_loss(s, t, counts, ((3, 3), ), 'map').item() == pytest.approx(2 * 9 / 9)


def raw_of(heat, size=1., offset=0.5):
    """Raw outputs, (1, 1, 5, L), of a heatmap's logits and of one size and offset."""
    raw = torch.empty(1, 1, 5, len(heat))
    raw[0, 0, 0], raw[0, 0, 1:3] = heat, size + math.log(-math.expm1(-size)) if size else -100.
    raw[0, 0, 3:] = math.log(offset / (1 - offset))
    return raw


def test_heat_is_ranked_where_its_sigmoid_saturates():
    heat = torch.full((25, ), -200.)
    heat[6], heat[18] = 30., 40.  # (1, 1) and (3, 3); both sigmoids are 1 in float32
    raw, shapes = raw_of(heat, 0.9), ((5, 5), )
    assert find_areas(raw, shapes, 2).boxes[0, 0].tolist() == [[3, 3, 4, 4], [1, 1, 2, 2]]
    vanishing = torch.cat([raw, raw_of(heat - 190, 0.9)])
    assert find_areas(vanishing, shapes, 1).boxes[0, 0].tolist() == [[3, 3, 4, 4]]


def test_a_constant_map_has_one_area_and_a_plateau_no_crowd():
    shapes = ((6, 7), )
    flat = raw_of(torch.zeros(42), 1e9)
    areas = find_areas(flat, shapes, 8)
    assert (areas.log_scores > -math.inf).tolist() == [[[True] + [False] * 7]]
    assert areas.boxes[0, 0, 0].tolist() == [0, 0, 7, 6]
    assert (count_areas(areas, shapes) == 1).all()
    tiny = find_areas(raw_of(torch.zeros(42), 0.), shapes, 8)
    assert tiny.boxes[0, 0, 0].tolist() == [0, 0, 1, 1]
    assert count_areas(tiny, shapes).sum() == 1
    heat = torch.zeros(6, 7)
    heat[2:4, 2:5] = 1
    scores = find_areas(raw_of(heat.flatten()).repeat(2, 1, 1, 1), shapes, 8).log_scores.exp()
    assert scores[0, 0, 0].item() == pytest.approx(sigmoid(1)**2)
    assert (scores > 0.5).sum() == 1


def test_detection_loss_and_its_gradient_by_hand():
    """On raw outputs: the mean over cells, and over the two channels of a branch; the mean of two levels."""
    s, t = torch.zeros(1, 5, 3), torch.zeros(1, 5, 3)  # two cells of one level and one of another
    s[0, 0], t[0, 0] = torch.tensor([-3., 1, 2]), torch.tensor([-1., 1, -1])
    s[0, 1, 0], t[0, 4, 2] = 4., 2.
    s.requires_grad_()
    loss = detection_loss(s, t, ((1, 2), (1, 1)))
    # level 1: heat (4 + 0) / 2, size 16 / 4; level 2: heat 9, offset 4 / 2
    assert loss.item() == pytest.approx(((2 + 4) + (9 + 2)) / 2)
    loss.backward()
    # 2 (s - t), over two levels; over two cells; over two channels
    assert s.grad[0, 0].tolist() == pytest.approx([2 * -2 / 4, 0, 2 * 3 / 2])
    assert s.grad[0, 1].tolist() == pytest.approx([2 * 4 / 8, 0, 0])
    assert s.grad[0, 4].tolist() == pytest.approx([0, 0, 2 * -2 / 4])


def test_losses_do_not_depend_on_resolution():
    teacher, student = random_raw(seed=3)
    s, t = torch.randn(2, 3, 9, 13), torch.randn(2, 3, 9, 13)
    counts = torch.randint(0, 3, (2, 1, 9, 13))
    small, large = ((9, 13), ), ((36, 52), )

    def tiled(row):
        return row.unflatten(-1, (9, 13)).repeat(1, 1, 4, 4).flatten(-2)

    pairs = zip(*(side.double().split([1, 2, 2], 1) for side in (student, teacher)), strict=True)
    expected = sum(F.mse_loss(a, b).item() for a, b in pairs)
    assert detection_loss(student, teacher, small).item() == pytest.approx(expected, rel=1e-5)
    assert detection_loss(tiled(student), tiled(teacher), large).item() == pytest.approx(expected, rel=1e-5)
    for reduction in ('area', 'map'):
        once = area_loss(s.flatten(2), t.flatten(2), counts, small, reduction).item()
        many = area_loss(tiled(s.flatten(2)), tiled(t.flatten(2)), counts.repeat(1, 1, 4, 4), large, reduction)
        assert many.item() == pytest.approx(once, rel=1e-5)
        many = area_loss(*(x.repeat(3, 2, 1, 1).flatten(2) for x in (s, t)), counts.repeat(3, 1, 1, 1), small,
                         reduction)
        assert many.item() == pytest.approx(once, rel=1e-5)


SHAPES = ((12, 16), (6, 8), (3, 4))


def pyramid(n=2, c=8, shapes=SHAPES, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, c, *shape, generator=g) for shape in shapes]


GT = [torch.tensor([[8., 8, 40, 48], [0, 0, 128, 96], [60, 20, 80, 30]]), torch.zeros(0, 4)]
SHAPE = (96, 128)


def test_number_of_levels_does_not_scale_the_losses():
    dam = DAM(8, anchor=None)
    s, t = pyramid(seed=1)[:1], pyramid(seed=2)[:1]
    one, two = dam(s, t), dam(s * 2, t * 2)
    for name, value in one.items():
        assert two[name].item() == pytest.approx(value.item(), rel=1e-5)


def test_weights_and_keys():
    s, t = pyramid(seed=1), pyramid(seed=2)
    plain = DAM(8, anchor='boxes', area_loss_weight=1.)
    weighted = DAM(8, anchor='boxes', detect_loss_weight=1000., area_loss_weight=10., anchor_loss_weight=0.1)
    weighted.load_state_dict(plain.state_dict())
    a, b = (dam(s, t, gt_boxes=GT, image_shape=SHAPE) for dam in (plain, weighted))
    for name, weight in dict(loss_dam_detect=1000, loss_dam_area=10, loss_dam_anchor=0.1).items():
        assert a[name].item() > 0
        assert b[name].item() == pytest.approx(weight * a[name].item(), rel=1e-5)
    assert list(a) == ['loss_dam_detect', 'loss_dam_area', 'loss_dam_anchor']
    assert list(DAM(8, anchor=None)(s, t)) == ['loss_dam_detect', 'loss_dam_area']


def test_equal_features_differ_nowhere():
    t = pyramid()
    losses = DAM(8, anchor=None)(t, t)
    assert all(value.item() == 0 for value in losses.values())


def gradients(name, anchor, **kwargs):
    dam = DAM(8, anchor=anchor)
    s, refined, t = ([x.requires_grad_() for x in pyramid(seed=seed)] for seed in (1, 2, 3))
    dam(s, refined, t, gt_boxes=GT, image_shape=SHAPE)[name].backward()
    assert all(x.grad is None for x in [*refined, *t])
    return dam, s


@pytest.mark.parametrize('anchor', ['boxes', 'attention'])
def test_gradients_reach_student_and_head_never_the_teacher(anchor):
    dam, s = gradients('loss_dam_detect', anchor)
    assert all(x.grad.norm() > 0 for x in s)
    for name, p in dam.head.named_parameters():  # a bias common to both networks cancels in the difference of logits
        assert p.grad.abs().max() < 1e-6 if name in ('heat.bias', 'size.bias', 'offset.bias') else p.grad.norm() > 0
    dam, s = gradients('loss_dam_area', anchor)
    assert all(x.grad.norm() > 0 for x in s)
    assert all(p.grad is None for p in dam.parameters())  # none through boxes
    dam, s = gradients('loss_dam_anchor', anchor)
    assert all(x.grad.norm() > 0 for x in s)
    unreached = {name for name, p in dam.head.named_parameters() if p.grad is None or not p.grad.any()}
    assert unreached == ({'size.weight', 'size.bias', 'offset.weight', 'offset.bias'}
                         if anchor == 'attention' else set())


def see(dam, features, shapes=SHAPES):
    return dam.head([to_row(features)], shapes)[0]


def test_the_teacher_side_trains_the_head_too():
    dam = DAM(8, anchor=None)
    s, t = pyramid(seed=1), pyramid(seed=2)
    whole, = torch.autograd.grad(dam(s, t)['loss_dam_detect'], dam.head.spatial.weight)
    student, = torch.autograd.grad(
        detection_loss(see(dam, s), see(dam, t).detach(), SHAPES),
        dam.head.spatial.weight)
    teacher, = torch.autograd.grad(
        detection_loss(see(dam, s).detach(), see(dam, t), SHAPES),
        dam.head.spatial.weight)
    assert teacher.norm() > 0
    torch.testing.assert_close(whole, student + teacher)


@pytest.mark.parametrize('anchor', ['boxes', 'attention'])
def test_anchor_sees_the_unaugmented_teacher_and_no_branch_runs_twice(anchor):
    dam = DAM(8, anchor=anchor)
    s, t = pyramid(seed=1), pyramid(seed=2)
    seen = []
    dam.head.spatial.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))

    def run(refined, *plain):
        seen.clear()
        return dam(s, refined, *plain, gt_boxes=GT, image_shape=SHAPE)

    base = run(t)
    assert seen == [4, 4, 4]
    assert run(t, t) == base and seen == [4, 4, 4]
    refined = [t[0].flip(3), t[1], t[2].flip(2)]
    augmented = run(refined, t)
    assert seen == [6, 6, 6]
    assert augmented['loss_dam_anchor'].item() == pytest.approx(base['loss_dam_anchor'].item(), rel=1e-6)
    assert augmented['loss_dam_detect'] != base['loss_dam_detect']
    assert augmented['loss_dam_area'] != base['loss_dam_area']
    assert run(refined)['loss_dam_anchor'].item() != pytest.approx(base['loss_dam_anchor'].item(), rel=1e-4)
    paper = DAM(8, anchor=None)
    paper.head.spatial.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    seen.clear()
    paper(s, refined, t)
    assert seen == [4, 4, 4]


def test_head_starts_at_a_tenth_and_at_three_cells_in_its_ranges():
    head, shapes = DetectionHead(256), ((20, 20), )
    raw = head([torch.randn(2, 256, 400)], shapes)[0]
    size, offset = decode(raw[:, 1:], 1)
    assert raw[:, 0].sigmoid().mean().item() == pytest.approx(0.1, abs=0.03)
    assert size.mean().item() == pytest.approx(3, abs=0.3)
    assert offset.mean().item() == pytest.approx(0.5, abs=0.1)
    for scale in (1e4, -1e4, 1e10):
        size, offset = decode(head([torch.randn(2, 256, 400) * scale], shapes)[0, :, 1:], 1)
        assert (size >= 0).all() and (offset >= 0).all() and (offset <= 1).all()


def test_at_full_width_it_is_three_plain_branches():
    head, x = DetectionHead(6), torch.randn(2, 6, 5, 7)
    raw = head([x.flatten(2)], ((5, 7), ))[0]
    expected = []
    for i, last in enumerate((head.heat, head.size, head.offset)):
        mine = slice(6 * i, 6 * i + 6)
        hidden = F.conv2d(x, head.spatial.weight[mine], head.spatial.bias[mine], padding=1).relu()
        expected.append(F.conv2d(hidden, last.weight.unsqueeze(3), last.bias).flatten(2))
    torch.testing.assert_close(raw, torch.cat(expected, 1))


def test_one_batch_is_the_same_as_one_by_one():
    head = DetectionHead(16, 4)
    pyramids = pyramid(c=16, seed=1), pyramid(c=16, seed=2)
    raw = head([to_row(features) for features in pyramids], SHAPES)
    for one, features in zip(raw, pyramids, strict=True):
        alone = [head([feature.flatten(2)], (shape, ))[0] for feature, shape in zip(features, SHAPES, strict=True)]
        torch.testing.assert_close(one, torch.cat(alone, 2))


def multiply_adds(head, h, w, channels):
    """Counted from the convolutions that run."""
    total = 0

    def count(conv, _, output):
        nonlocal total
        total += output.numel() * conv.weight[0].numel()

    for conv in head.modules():
        if isinstance(conv, nn.Conv1d | nn.Conv2d):
            conv.register_forward_hook(count)
    head([torch.zeros(1, channels, h * w)], ((h, w), ))
    return total


def test_cost_per_position_is_the_documented_one():
    for hidden, documented in ((256, 1_770_752), (64, 127_296), (32, 36_000)):
        assert multiply_adds(DetectionHead(256, hidden), 2, 3, 256) == 6 * documented
        assert f'{documented:,}'.replace(',', ' ') in DetectionHead.__doc__


@pytest.mark.parametrize('anchor', ['boxes', 'attention', None])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('kind', ['random', 'constant', 'zero', 'huge', 'empty', 'pixel'])
def test_float32_and_finite_under_autocast(anchor, dtype, kind):
    dam = DAM(8, anchor=anchor)
    shapes = [(1, 1)] if kind == 'pixel' else [(12, 16), (3, 4)]
    n = 0 if kind == 'empty' else 2
    s, t = pyramid(n, 8, shapes, seed=1), pyramid(n, 8, shapes, seed=2)
    factor, shift = dict(constant=(0, 1), zero=(0, 0), huge=(1e10, 0)).get(kind, (1, 0))
    s, t = ([(x * factor + shift).to(dtype).requires_grad_() for x in xs] for xs in (s, t))
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = dam(s, [x.flip(3) for x in t], t, gt_boxes=GT[:n], image_shape=SHAPE)
    for value in losses.values():
        assert value.dtype == torch.float32 and value.isfinite() and value.dim() == 0
    sum(losses.values()).backward()
    assert all(x.grad.isfinite().all() for x in [*s, *dam.parameters()] if x.grad is not None)


def test_bf16_is_close_to_float32():
    dam = DAM(8, anchor='attention', num_areas=1000)
    s, t = pyramid(seed=1), pyramid(seed=2)
    exact = dam(s, t)
    with torch.autocast('cpu', torch.bfloat16):
        half = dam(s, t)
    for name in ('loss_dam_detect', 'loss_dam_anchor'):  # areas may move by a tie
        assert half[name].item() == pytest.approx(exact[name].item(), rel=0.05)


def test_detect_shows_what_the_losses_use():
    dam = DAM(8, num_areas=4, anchor=None, area_loss_weight=1.)
    s, t = pyramid(seed=1), pyramid(seed=2)
    levels = dam.detect(s, t)
    assert [tuple(level['s_heatmap'].shape) for level in levels] == [(2, 12, 16), (2, 6, 8), (2, 3, 4)]
    for level in levels:
        assert level['boxes'].shape == (2, 4, 4) and level['scores'].shape == level['valid'].shape == (2, 4)
        assert 0 < level['t_heatmap'].min() < level['t_heatmap'].max() < 1
    expected = sum(area_loss(a.flatten(2), b.flatten(2), level['counts'].unsqueeze(1), (a.shape[2:], ))
                   for a, b, level in zip(s, t, levels, strict=True)) / 3
    assert dam(s, t)['loss_dam_area'].item() == pytest.approx(expected.item(), rel=1e-6)


# -- the adapter ---------------------------------------------------------------------------------------------

def test_dam_owns_its_adapter():
    dam, s, t = DAM(8, in_channels=3, anchor=None), pyramid(c=3), pyramid()
    assert isinstance(dam.adapter, ConvAdapter) and dam.adapter.signed
    assert not DAM(8, in_channels=3, adapter=dict(signed=False)).adapter.signed
    adapted = dam.adapt(s)
    assert [x.shape for x in adapted] == [x.shape for x in t]
    losses = dam(adapted, t)
    losses['loss_dam_area'].backward(retain_graph=True)
    assert all(p.grad.norm() > 0 for p in dam.adapter.convs.parameters())
    dam.zero_grad()
    losses['loss_dam_detect'].backward()
    assert all(p.grad.norm() > 0 for p in dam.adapter.convs.parameters())


def test_without_in_channels_features_come_adapted():
    dam, s = DAM(8), pyramid()
    assert dam.adapter is None and not any('adapter' in key for key in dam.state_dict())
    assert all(a is b for a, b in zip(dam.adapt(tuple(s)), s, strict=True))


# -- what a step costs ---------------------------------------------------------------------------------------

class Operations(TorchDispatchMode):
    """The names of all operations but views, and the tensors they take and make."""
    VIEWS = ('alias', 'as_strided', 'detach', 'expand', 'permute', 'select', 'slice', 'split', 'split_with_sizes',
             'squeeze', 't', 'transpose', 'unbind', 'unsqueeze', 'view')

    def __init__(self):
        super().__init__()
        self.names = []
        self.devices = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            self.names.append(name)
        for each in torch.utils._pytree.tree_flatten((args, kwargs, out))[0]:
            if isinstance(each, torch.Tensor):
                self.devices.add(each.device.type)
        return out


FIVE = ((26, 42), (13, 21), (7, 11), (4, 6), (2, 3))


def operations_of_a_step(anchor='boxes', augmented=True, shapes=FIVE, n=2, device='cpu'):
    """Adapter, DAM and anchor, forward and backward, after a first step of the same shapes."""
    dam = DAM(8, in_channels=3, hidden_channels=4, anchor=anchor).to(device)
    s, t = ([x.to(device) for x in pyramid(n, c, shapes, seed=c)] for c in (3, 8))
    s = [x.requires_grad_() for x in s]
    boxes = [x.to(device) for x in GT[:n]]
    for _ in range(2):
        dam.zero_grad()
        for x in s:
            x.grad = None
        with Operations() as operations:
            losses = dam(dam.adapt(s), [x + 1 for x in t] if augmented else t, t, boxes, (208, 336))
            sum(losses.values()).backward()
    assert all(x.grad.shape == x.shape for x in s)
    return operations, losses


@pytest.mark.parametrize(('anchor', 'augmented', 'most'), [('boxes', True, 265), ('boxes', False, 258),
                                                           ('attention', True, 195), (None, True, 162)])
def test_number_of_operations(anchor, augmented, most):
    """Of RetinaNet's five levels. On a GPU, each is at least one launch."""
    operations, _ = operations_of_a_step(anchor, augmented)
    assert len(operations.names) - 5 * augmented <= most  # the augmentation itself


@pytest.mark.parametrize('anchor', ['boxes', 'attention', None])
@pytest.mark.parametrize('n', [2, 0])
def test_a_step_stays_on_its_device(anchor, n):
    """Mixing devices, and asking for values, raises on torch's meta device; making tensors on the CPU is seen."""
    operations, losses = operations_of_a_step(anchor, n=n, device='meta')
    assert operations.devices == {'meta'}
    assert all(value.device.type == 'meta' and value.shape == () for value in losses.values())


def test_the_first_step_of_a_shape_stays_on_its_device_too():
    dam, shapes = DAM(8).to('meta'), ((19, 31), (10, 16))
    s, t = ([x.to('meta') for x in pyramid(2, 8, shapes, seed=seed)] for seed in (1, 2))
    boxes = [x.to('meta') for x in GT]
    with Operations() as operations:
        dam(s, t, gt_boxes=boxes, image_shape=(152, 248))
    assert operations.devices == {'meta'}


# of torch.use_deterministic_algorithms, what raises on a GPU: as operation, and by what its name has
NONDETERMINISTIC = ('adaptive', 'avg_pool', 'bincount', 'cumsum', 'fractional', 'grid_sampler', 'histc', 'kthvalue',
                    'max_pool2d_with_indices_backward', 'max_pool3d', 'median', 'nll_loss', 'put', 'reflection',
                    'replication', 'unpool', 'upsample', 'bmm', 'mm', 'mv')


@pytest.mark.parametrize('anchor', ['boxes', 'attention'])
def test_no_operation_without_a_deterministic_implementation(anchor):
    operations, _ = operations_of_a_step(anchor)
    assert not [name for name in operations.names if any(part in name for part in NONDETERMINISTIC)]
    torch.use_deterministic_algorithms(True)
    try:
        operations_of_a_step(anchor)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('anchor', ['boxes', 'attention'])
def test_what_is_kept_of_a_shape_serves_inference_and_training(anchor):
    """A tensor made in inference mode could not be used in a backward pass."""
    dam, shapes = DAM(8, anchor=anchor), ((11, 17), (6, 9))
    s, t = pyramid(2, 8, shapes, seed=1), pyramid(2, 8, shapes, seed=2)
    with torch.inference_mode():
        expected = dam(s, t, gt_boxes=GT, image_shape=(88, 136))
    losses = dam([x.requires_grad_() for x in s], t, gt_boxes=GT, image_shape=(88, 136))
    sum(losses.values()).backward()
    assert {name: value.item() for name, value in losses.items()} == \
        {name: pytest.approx(value.item(), rel=1e-6) for name, value in expected.items()}


# -- the anchor's purpose ------------------------------------------------------------------------------------

CELLS, OBJECTS, CHANNELS = 16, 3, 16


def planted_batch(generator, t_basis, s_basis, images=4):
    """Blobs of 3 to 5 cells on a weakly textured ground, as different linear codes in teacher and student."""
    code = torch.zeros(images, 2, CELLS, CELLS)
    code[:, 1] = 0.3 * torch.randn(images, CELLS, CELLS, generator=generator)
    boxes = []
    for i in range(images):
        size = torch.randint(3, 6, (OBJECTS, 2), generator=generator)
        low = (torch.rand(OBJECTS, 2, generator=generator) * (CELLS - size)).long()
        for (x, y), (w, h) in zip(low.tolist(), size.tolist(), strict=True):
            code[i, 0, y:y + h, x:x + w] = 1
        boxes.append(torch.cat([low, low + size], 1).float() * 8)
    noise = 0.3 * torch.randn(2, images, CHANNELS, CELLS, CELLS, generator=generator)
    s, t = (torch.einsum('nkhw,kc->nchw', code, basis) for basis in (s_basis, t_basis))
    return s + noise[0], t + noise[1], boxes, code[:, 0] > 0


def train_on_planted(anchor):
    """(spatial spread of the teacher's heatmap, part of the areas on objects), before and after."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    t_basis, s_basis = torch.randn(2, 2, CHANNELS, generator=generator)
    dam, adapter = DAM(CHANNELS, num_areas=OBJECTS, anchor=anchor), nn.Conv2d(CHANNELS, CHANNELS, 1)
    optimiser = torch.optim.Adam([*dam.parameters(), *adapter.parameters()], lr=5e-3)

    def measure():
        s, t, _, objects = planted_batch(torch.Generator().manual_seed(1), t_basis, s_basis, images=16)
        level, = dam.detect([adapter(s)], [t])
        covered = level['counts'] > 0
        return level['t_heatmap'].flatten(1).std(1).mean().item(), (covered & objects).sum() / covered.sum()

    before = measure()
    for _ in range(150):
        s, t, boxes, _ = planted_batch(generator, t_basis, s_basis)
        losses = dam([adapter(s)], [t], gt_boxes=boxes, image_shape=(CELLS * 8, CELLS * 8))
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
    return before, measure()


def test_without_anchor_the_heatmap_collapses_with_one_it_does_not():
    """Objects cover about 0.16 of the map, which is what areas placed at random would have."""
    (spread, _), (collapsed, lost) = train_on_planted(None)
    assert collapsed < 0.1 * spread and lost < 0.4
    for anchor, least in (('boxes', 0.7), ('attention', 0.5)):
        _, (alive, on_objects) = train_on_planted(anchor)
        assert alive > 2 * spread and alive > 20 * collapsed, anchor
        assert on_objects > least, anchor


# -- errors --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(region='mutal'), r"DAM\.region.*'mutual', 'student', 'teacher'.*'mutal'.*mutual"),
    (dict(anchor='box'), r"DAM\.anchor.*'box'.*boxes"),
    (dict(num_areas=0), r'DAM\.num_areas.*>= 1, got 0'),
    (dict(channels=None), r'DAM\.channels.*got None'),
    (dict(hidden_channels=0.5), r'DAM\.hidden_channels.*got 0.5'),
    (dict(area_loss_weight=-1), r'DAM\.area_loss_weight.*>= 0, got -1'),
    (dict(max_cells=0), r'DAM\.max_cells.*> 0, got 0'),
    (dict(area_reduction='maps'), r"DAM\.area_reduction.*'area', 'map'.*'maps'.*map"),
    (dict(in_channels=0), r'DAM\.in_channels.*>= 1, got 0'),
    (dict(adapter=dict(signed=False)), r'DAM\.adapter.*without in_channels.*signed'),
    (dict(in_channels=4, adapter=dict(sined=False)), r"DAM\.adapter.*expected signed, got 'sined'"),
    (dict(in_channels=4, adapter=dict(signed='no')), r"ConvAdapter\.signed.*got 'no'"),
    (dict(in_channels=4, adapter=[]), r'DAM\.adapter must be a dict'),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DAM(**{'channels': 8, **kwargs})


def test_bad_inputs():
    dam, t = DAM(8, anchor='boxes'), pyramid()
    with pytest.raises(ValueError, match=r'needs gt_boxes of 2 images and image_shape.*got None and None'):
        dam(t, t)
    with pytest.raises(ValueError, match=r'needs gt_boxes of 2 images.*boxes of 1 images'):
        dam(t, t, gt_boxes=GT[:1], image_shape=SHAPE)
    with pytest.raises(ValueError, match=r's_features as a list .*got \(2, 8, 12, 16\)'):
        dam(t[0], t)
    with pytest.raises(ValueError, match=r'equal shapes \(N, 8, H, W\).*s_features.*t_refined'):
        dam(t[:2], t)
    with pytest.raises(ValueError, match=r'equal shapes \(N, 8, H, W\).*\(2, 4, 12, 16\)'):
        dam(pyramid(c=4), pyramid(c=4))
    with pytest.raises(ValueError, match=r'equal shapes'):
        dam(t, t, [x[..., :-1] for x in t])


def test_builds_from_a_config():
    dam = MODELS.build(dict(type='mmkd_plugin.DAM', channels=8, anchor=None))
    assert isinstance(dam, DAM) and set(dam.state_dict()) == set(DAM(8).state_dict())


def test_the_example_runs():
    assert doctest.testmod(dam_module) == (0, 6)
