import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmkd_plugin.models.area_detectors.areas import (
    Areas,
    Detection,
    area_loss,
    count_areas,
    detection_loss,
    find_areas,
)
from mmkd_plugin.models.area_detectors.dam import DAM, DetectionHead
from mmkd_plugin.registry import MODELS


def random_detection(n=2, h=9, w=13, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Detection(torch.randn(n, h * w, generator=g), torch.rand(n, 2, h * w, generator=g) * 6,
                     torch.rand(n, 2, h * w, generator=g))


def joined(*detections):
    """Levels as one pyramid."""
    return Detection(*(torch.cat(branch, -1) for branch in zip(*detections, strict=True)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def naive_boxes(sides, h, w, num_areas):
    """The definition in plain Python: per image, the (score, x1, y1, x2, y2) of the best areas."""
    images = []
    for i in range(len(sides[0].heat)):
        heat = [[math.prod(sigmoid(d.heat[i, y * w + x].item()) for d in sides) for x in range(w)]
                for y in range(h)]
        found = []
        for y in range(h):
            for x in range(w):
                around = [heat[b][a] for b in range(max(y - 1, 0), min(y + 2, h))
                          for a in range(max(x - 1, 0), min(x + 2, w))]
                if heat[y][x] < max(around):
                    continue
                mean = [sum(getattr(d, field)[i, j, y * w + x].item() for d in sides) / len(sides)
                        for field in ('size', 'offset') for j in range(2)]
                cx, cy = x + mean[2], y + mean[3]
                xs = [a for a in range(w) if abs(a + 0.5 - cx) <= mean[0] / 2 or a == x]
                ys = [b for b in range(h) if abs(b + 0.5 - cy) <= mean[1] / 2 or b == y]
                found.append((heat[y][x], xs[0], ys[0], xs[-1] + 1, ys[-1] + 1))
        images.append(sorted(found, reverse=True)[:num_areas])
    return images


def naive_area_loss(s, t, images):
    """The paper's plain sum over boxes, divided by channels and positions summed; float64."""
    total = 0.
    for i, boxes in enumerate(images):
        plain = positions = 0.
        for _, x1, y1, x2, y2 in boxes:
            for y in range(y1, y2):
                for x in range(x1, x2):
                    plain += (s[i, :, y, x].double() - t[i, :, y, x].double()).square().sum().item()
                    positions += 1
        total += plain / (s.size(1) * positions)
    return total / len(images)


@pytest.mark.parametrize('region', ['mutual', 'student', 'teacher'])
@pytest.mark.parametrize(('num_areas', 'shape'), [(1, (9, 13)), (8, (9, 13)), (500, (9, 13)), (8, (1, 5)),
                                                  (8, (1, 1)), (8, (2, 2))])
def test_areas_and_their_loss_agree_with_a_naive_loop(region, num_areas, shape):
    student, teacher = random_detection(2, *shape, seed=1), random_detection(2, *shape, seed=2)
    s, t = torch.randn(2, 3, *shape), torch.randn(2, 3, *shape)
    sides = dict(mutual=(student, teacher), student=(student, ), teacher=(teacher, ))[region]
    expected = naive_boxes(sides, *shape, num_areas)

    areas = find_areas(student, teacher, [shape], num_areas, region)
    counts = count_areas(areas, [shape], num_areas)

    naive_counts = torch.zeros(2, *shape)
    for i, boxes in enumerate(expected):
        valid = areas.valid[i]
        assert valid.sum() == len(boxes) and valid[:len(boxes)].all()
        for j, (score, *box) in enumerate(boxes):
            assert areas.boxes[i, j].tolist() == box
            assert areas.scores[i, j].item() == pytest.approx(score, rel=1e-5)
            naive_counts[i, box[1]:box[3], box[0]:box[2]] += 1
    assert torch.equal(counts, naive_counts.flatten(1))
    assert area_loss([s], [t], counts).item() == pytest.approx(naive_area_loss(s, t, expected), rel=1e-5)


def test_a_pyramid_is_its_levels():
    shapes = [(9, 13), (4, 6), (1, 2)]
    students, teachers = ([random_detection(2, *shape, seed=seed + i) for i, shape in enumerate(shapes)]
                          for seed in (10, 20))
    student, teacher = joined(*students), joined(*teachers)
    areas = find_areas(student, teacher, shapes, 5)
    each = [find_areas(a, b, [shape], 5) for a, b, shape in zip(students, teachers, shapes, strict=True)]
    for whole, parts in zip(areas, zip(*each, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts, 1))
    counts = count_areas(areas, shapes, 5)
    parts = [count_areas(one, [shape], 5) for one, shape in zip(each, shapes, strict=True)]
    assert torch.equal(counts, torch.cat(parts, 1))
    s, t = ([torch.randn(2, 3, *shape) for shape in shapes] for _ in range(2))
    expected = sum(area_loss([a], [b], part) for a, b, part in zip(s, t, parts, strict=True)) / 3
    torch.testing.assert_close(area_loss(s, t, counts), expected)
    expected = sum(detection_loss(a, b, [shape])
                   for a, b, shape in zip(students, teachers, shapes, strict=True)) / 3
    torch.testing.assert_close(detection_loss(student, teacher, shapes), expected)


def test_each_box_counts_once_where_boxes_overlap():
    boxes = torch.tensor([[[0., 0, 2, 2], [1, 1, 3, 2], [0, 0, 3, 3]]])
    areas = Areas(boxes, torch.ones(1, 3), torch.tensor([[True, True, False]]))
    counts = count_areas(areas, [(3, 3)], 3)
    assert counts.tolist() == [[1, 1, 0, 1, 2, 1, 0, 0, 0]]
    s, t = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    s[0, :, 1, 1] = 3.
    s[0, :, 2, 2] = 100.  # under no valid box
    assert area_loss([s], [t], counts).item() == pytest.approx(2 * 9 / 6)


def test_heat_is_ranked_where_its_sigmoid_saturates():
    heat = torch.full((1, 25), -200.)
    heat[0, 6], heat[0, 18] = 30., 40.  # (1, 1) and (3, 3); both sigmoids are 1 in float32
    detection, shapes = Detection(heat, torch.ones(1, 2, 25), torch.full((1, 2, 25), 0.5)), [(5, 5)]
    assert find_areas(detection, detection, shapes, 2).boxes[0].tolist() == [[3, 3, 4, 4], [1, 1, 2, 2]]
    vanishing = detection._replace(heat=heat - 190)
    assert find_areas(detection, vanishing, shapes, 1).boxes[0].tolist() == [[3, 3, 4, 4]]


def test_a_constant_map_has_one_area_and_a_plateau_no_crowd():
    flat = Detection(torch.zeros(1, 42), torch.full((1, 2, 42), 1e9), torch.full((1, 2, 42), 0.5))
    shapes = [(6, 7)]
    areas = find_areas(flat, flat, shapes, 8)
    assert areas.valid.tolist() == [[True] + [False] * 7]
    assert areas.boxes[0, 0].tolist() == [0, 0, 7, 6]
    assert count_areas(areas, shapes, 8).tolist() == [[1] * 42]
    tiny = flat._replace(size=torch.zeros(1, 2, 42))
    assert find_areas(tiny, tiny, shapes, 8).boxes[0, 0].tolist() == [0, 0, 1, 1]
    heat = torch.zeros(1, 6, 7)
    heat[0, 2:4, 2:5] = 1
    raised = flat._replace(heat=heat.flatten(1))
    assert find_areas(raised, raised, shapes, 8).scores[0, 0].item() == pytest.approx(sigmoid(1)**2)
    assert (find_areas(raised, raised, shapes, 8).scores > 0.5).sum() == 1


def test_losses_do_not_depend_on_resolution():
    student, teacher = random_detection(seed=3), random_detection(seed=4)
    s, t, counts = torch.randn(2, 3, 9, 13), torch.randn(2, 3, 9, 13), torch.randint(0, 3, (2, 117)).float()

    def tiled(detection):
        return Detection(*(branch.unflatten(-1, (9, 13)).repeat(*[1] * (branch.dim() - 1), 4, 4).flatten(-2)
                           for branch in detection))

    expected = sum(
        F.mse_loss(a.double(), b.double()).item() for a, b in (
            (student.heat.sigmoid(), teacher.heat.sigmoid()), student[1:2] + teacher[1:2],
            (student.offset, teacher.offset)))
    assert detection_loss(student, teacher, [(9, 13)]).item() == pytest.approx(expected, rel=1e-5)
    many = detection_loss(tiled(student), tiled(teacher), [(36, 52)]).item()
    assert many == pytest.approx(expected, rel=1e-5)
    once = area_loss([s], [t], counts).item()
    tiles = counts.view(2, 9, 13).repeat(1, 4, 4).flatten(1)
    many = area_loss([s.repeat(1, 1, 4, 4)], [t.repeat(1, 1, 4, 4)], tiles).item()
    assert many == pytest.approx(once, rel=1e-5)
    many = area_loss([s.repeat(3, 2, 1, 1)], [t.repeat(3, 2, 1, 1)], counts.repeat(3, 1)).item()
    assert many == pytest.approx(once, rel=1e-5)


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
    assert all(p.grad.norm() > 0 for p in dam.head.parameters())
    dam, s = gradients('loss_dam_area', anchor)
    assert all(x.grad.norm() > 0 for x in s)
    assert all(p.grad is None for p in dam.parameters())  # none through boxes
    dam, s = gradients('loss_dam_anchor', anchor)
    assert all(x.grad.norm() > 0 for x in s)
    unreached = {name for name, p in dam.head.named_parameters() if p.grad is None}
    assert unreached == ({'size.weight', 'size.bias', 'offset.weight', 'offset.bias'}
                         if anchor == 'attention' else set())


def test_the_teacher_side_trains_the_head_too():
    dam = DAM(8, anchor=None)
    s, t = pyramid(seed=1), pyramid(seed=2)
    whole, = torch.autograd.grad(dam(s, t)['loss_dam_detect'], dam.head.spatial.weight)
    student, = torch.autograd.grad(
        detection_loss(dam.head(s)[0], Detection(*(x.detach() for x in dam.head(t)[0])), SHAPES),
        dam.head.spatial.weight)
    teacher, = torch.autograd.grad(
        detection_loss(Detection(*(x.detach() for x in dam.head(s)[0])), dam.head(t)[0], SHAPES),
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
    head = DetectionHead(256)
    detection, = head([torch.randn(2, 256, 20, 20)])
    assert detection.heat.sigmoid().mean().item() == pytest.approx(0.1, abs=0.03)
    assert detection.size.mean().item() == pytest.approx(3, abs=0.3)
    for scale in (1e4, -1e4, 1e10):
        detection, = head([torch.randn(2, 256, 5, 5) * scale])
        assert (detection.size >= 0).all() and (detection.offset >= 0).all() and (detection.offset < 1).all()


def test_at_full_width_it_is_three_plain_branches():
    head, x = DetectionHead(6), torch.randn(2, 6, 5, 7)
    detection, = head([x])
    expected = []
    for i, last in enumerate((head.heat, head.size, head.offset)):
        mine = slice(6 * i, 6 * i + 6)
        hidden = F.conv2d(x, head.spatial.weight[mine], head.spatial.bias[mine], padding=1).relu()
        expected.append(F.conv2d(hidden, last.weight.unsqueeze(3), last.bias).flatten(2))
    torch.testing.assert_close(detection.heat.unsqueeze(1), expected[0])
    torch.testing.assert_close(detection.size, F.softplus(expected[1]))
    torch.testing.assert_close(detection.offset, expected[2].sigmoid())


def test_one_batch_is_the_same_as_one_by_one():
    head = DetectionHead(16, 4)
    pyramids = pyramid(c=16, seed=1), pyramid(c=16, seed=2)
    for one, features in zip(head(*pyramids), pyramids, strict=True):
        for x, y in zip(one, joined(*(head([feature])[0] for feature in features)), strict=True):
            torch.testing.assert_close(x, y)


def multiply_adds(head, h, w, channels):
    """Counted from the convolutions that run."""
    total = 0

    def count(conv, _, output):
        nonlocal total
        total += output.numel() * conv.weight[0].numel()

    for conv in head.modules():
        if isinstance(conv, nn.Conv1d | nn.Conv2d):
            conv.register_forward_hook(count)
    head([torch.zeros(1, channels, h, w)])
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
    expected = sum(area_loss([a], [b], level['counts'].flatten(1))
                   for a, b, level in zip(s, t, levels, strict=True)) / 3
    assert dam(s, t)['loss_dam_area'].item() == pytest.approx(expected.item(), rel=1e-6)


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
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DAM(**{'channels': 8, **kwargs})


def test_bad_inputs():
    dam, t = DAM(8, anchor='boxes'), pyramid()
    with pytest.raises(ValueError, match=r'needs gt_boxes of 2 images and image_shape.*got None and None'):
        dam(t, t)
    with pytest.raises(ValueError, match=r'needs gt_boxes of 2 images.*those of 1 images'):
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
