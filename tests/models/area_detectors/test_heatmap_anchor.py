import math

import pytest
import torch
from mmdet.models.utils import gaussian_radius as mmdet_gaussian_radius
from mmdet.models.utils import gen_gaussian_target

from mmkd_plugin.models.area_detectors import attention_loss, attention_map, centernet_loss
from mmkd_plugin.models.area_detectors import centernet_targets as centernet_targets_on
from mmkd_plugin.models.area_detectors.heatmap_anchor import gaussian_radius, level_stride


def centernet_targets(gt_boxes, image_shape, shapes, **kwargs):
    return centernet_targets_on(gt_boxes, image_shape, tuple(shapes), torch.device('cpu'), **kwargs)


def raw_of(heat, size, offset):
    """Raw outputs of one network whose logits, sizes and offsets in (0, 1) these are: (1, N, 5, L)."""
    size, offset = (torch.as_tensor(x).expand(len(heat), 2, heat.shape[1]) for x in (size, offset))
    return torch.cat([heat.unsqueeze(1), size.expm1().log(), offset.logit()], 1).unsqueeze(0)


def test_level_strides():
    assert [level_stride(800, n) for n in (100, 50, 25, 13, 7)] == [8, 16, 32, 64, 128]  # P3 to P7
    assert level_stride(224, 16) == 14  # patches
    assert level_stride(224, 55) == pytest.approx(224 / 55)
    assert level_stride(32, 8) == 4 and level_stride(7, 1) == 8


def test_radius_is_cornernets_least_of_three():
    for w, h, overlap in [(3, 3, 0.3), (8, 2, 0.3), (8, 8, 0.7), (100, 1, 0.5), (40, 30, 0.9), (1, 1, 0.05)]:
        ours = gaussian_radius(*torch.tensor([w, h], dtype=torch.double), overlap)
        assert ours.item() == pytest.approx(mmdet_gaussian_radius((h, w), overlap), rel=1e-9)


def test_targets_of_one_box_by_hand():
    """Image 64 x 96, one level at stride 8: 8 x 12 cells. Box 10..58 x 8..56 is 6 x 6 cells."""
    target = centernet_targets([torch.tensor([[10., 8, 58, 56]])], (64, 96), [(8, 12)])
    assert (target.cell.item(), target.image.item(), target.exists.item()) == (4 * 12 + 4, 0, 1)
    assert target.size.tolist() == [[6, 6]]
    assert target.offset.tolist() == [[0.25, 0]]  # centre (34, 32) is (4.25, 4) cells
    # radius floor(6 (1 - sqrt 0.3) / 2) = floor(1.36) = 1, sigma (2 + 1) / 6 = 0.5
    side, corner = math.exp(-2), math.exp(-4)
    expected = torch.zeros(8, 12)
    expected[3:6, 3:6] = torch.tensor([[corner, side, corner], [side, 1, side], [corner, side, corner]])
    torch.testing.assert_close(target.heat[0].view(8, 12), expected)


def test_each_box_goes_to_the_level_of_its_size():
    """Levels of stride 8, 16, 32: longer sides up to 64, up to 128, and beyond."""
    boxes = [torch.tensor([[0., 0, 64, 8], [0, 0, 8, 65], [0, 0, 128, 128], [0, 0, 129, 20]]),
             torch.zeros(0, 4), torch.tensor([[5., 5, 6, 6]])]
    target = centernet_targets(boxes, (256, 256), [(32, 32), (16, 16), (8, 8)])
    second, third = 32 * 32, 32 * 32 + 16 * 16  # where they start
    assert target.cell.tolist() == [4, second + 2 * 16, second + 4 * 16 + 4, third + 2, 0]
    assert target.image.tolist() == [0, 0, 0, 0, 2]
    assert target.exists.tolist() == [1] * 5
    assert (target.heat == 1).nonzero().tolist() == [[0, 4], [0, second + 32], [0, second + 68],
                                                     [0, third + 2], [2, 0]]
    assert target.heat[1].sum() == 0
    assert target.size[:, 0].tolist() == [8, 0.5, 8, 129 / 32, 0.125]


def test_targets_agree_with_mmdets_gaussians_box_by_box():
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(3, 40, 2, generator=g) * torch.tensor([300., 180.])
    boxes = [torch.cat([low, low + 2 + torch.rand(40, 2, generator=g).square() * 250], 1) for low in corner]
    shapes = [(25, 42), (13, 21), (7, 11)]
    target = centernet_targets(boxes, (200, 336), shapes)
    heats = [torch.zeros(3, *shape) for shape in shapes]
    for i, image_boxes in enumerate(boxes):
        for box in image_boxes:
            x1, x2 = box[0::2].clamp(0, 336).tolist()
            y1, y2 = box[1::2].clamp(0, 200).tolist()
            level = sum(max(x2 - x1, y2 - y1) > limit for limit in (64, 128))
            (h, w), stride = shapes[level], (8, 16, 32)[level]
            radius = max(0, int(mmdet_gaussian_radius(((y2 - y1) / stride, (x2 - x1) / stride), 0.3)))
            centre = [min(int((x1 + x2) / 2 / stride), w - 1), min(int((y1 + y2) / 2 / stride), h - 1)]
            gen_gaussian_target(heats[level][i], centre, radius)
    assert all(heat.max() == 1 for heat in heats)
    torch.testing.assert_close(target.heat, torch.cat([heat.flatten(1) for heat in heats], 1))


def test_gaussians_of_boxes_at_the_border_stay_in_the_map():
    """Also where the map is rounded up: 100 pixels at stride 8 are 13 cells."""
    for shape, level in (((100, 100), (13, 13)), ((104, 104), (13, 13)), ((90, 90), (7, 7))):
        reach = 0
        for side in torch.arange(3., 90., 0.7).tolist():
            for low in (0., shape[0] - side):
                box = torch.tensor([[low, low, low + side, low + side]])
                target = centernet_targets([box], shape, [level])
                row, col = divmod(target.cell.item(), level[1])
                radius = int(mmdet_gaussian_radius(target.size[0].tolist(), 0.3))
                assert radius <= row < level[0] - radius and radius <= col < level[1] - radius
                assert (target.heat > 0).sum() == (2 * radius + 1)**2
                reach = max(reach, radius)
        assert reach > 0


def test_a_centre_that_rounds_to_the_border_is_in_the_last_cell():
    almost = torch.nextafter(torch.tensor(128.), torch.tensor(0.)).item()
    target = centernet_targets([torch.tensor([[almost, 0, 128, 64]])], (64, 128), [(8, 16)])
    assert target.exists.item() == 1 and target.cell.item() == 4 * 16 + 15
    assert 0.99 < target.offset[0, 0].item() <= 1


def test_boxes_outside_or_without_area_count_for_nothing():
    boxes = torch.tensor([[-50., -50, -10, -10], [30, 30, 30, 60], [40, 40, 20, 60], [120, 60, 200, 90],
                          [-20, 10, 20, 30]])
    target = centernet_targets([boxes], (64, 128), [(8, 16)])
    assert target.exists.tolist() == [0, 0, 0, 1, 1]
    assert int((target.heat == 1).sum()) == 2
    # cut to the input: 120..128 x 60..64 and 0..20 x 10..30
    assert target.size[3:].tolist() == [[1, 0.5], [2.5, 2.5]]
    assert ((target.cell >= 0) & (target.cell < 128)).all()
    assert ((target.offset >= 0) & (target.offset <= 1)).all()
    random, shapes = torch.randn(1, 1, 5, 128), ((8, 16), )
    without = centernet_targets([boxes[3:]], (64, 128), [(8, 16)])
    assert torch.equal(target.heat, without.heat)
    value = centernet_loss(random, target, shapes).item()
    assert value == pytest.approx(centernet_loss(random, without, shapes).item())
    assert centernet_targets([], (64, 128), [(8, 16)]).heat.shape == (0, 128)


def test_a_large_batch_stays_small_in_memory():
    """4000 boxes on the pyramid of 800 x 1344; boxes times positions would be 67 million."""
    boxes = [torch.rand(250, 4).cumsum(1) * 300 for _ in range(16)]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Watch():
        centernet_targets(boxes, (800, 1344), [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)])
    assert largest <= 16 * 22400


def test_loss_by_hand():
    """Two objects in one image and none in the other, on two levels; everything else at heat p."""
    boxes = [torch.tensor([[0., 0, 16, 16], [0, 0, 32, 32]]), torch.zeros(0, 4)]
    target = centernet_targets(boxes, (32, 32), [(4, 4), (2, 2)], max_cells=2)
    assert target.cell.tolist() == [5, 16 + 3]
    p, hit = 0.2, 0.6
    heat = torch.full((2, 20), math.log(p / (1 - p)))
    heat[0, [5, 19]] = math.log(hit / (1 - hit))
    sizes = torch.tensor([3.] * 16 + [1.] * 4).expand(2, 2, 20)
    shapes = ((4, 4), (2, 2))
    raw = raw_of(heat, sizes, 0.25)
    loss = centernet_loss(raw, target, shapes)
    # boxes of 2 x 2 cells: radius floor(0.45) = 0, so every other cell of the 40 is a full negative
    focal = 2 * (1 - hit)**2 * -math.log(hit) + 38 * p**2 * -math.log(1 - p)
    size = 0.1 * (2 * abs(3 - 2) + 2 * abs(1 - 2))  # cells, width and height
    offset = 2 * 0.25 + 2 * 0.25  # centres (1, 1) cells: offset 0
    assert loss.item() == pytest.approx((focal + size + offset) / 2, rel=1e-5)
    other = torch.randn(1, 2, 5, 20)
    both = centernet_loss(torch.cat([raw, other]), target, shapes)
    assert both.item() == pytest.approx((loss + centernet_loss(other, target, shapes)).item() / 2, rel=1e-5)


def test_negatives_near_a_centre_are_penalised_less():
    target = centernet_targets([torch.tensor([[8., 8, 56, 56]])], (64, 64), [(8, 8)])

    def loss(cell):
        heat = torch.full((1, 8, 8), -10.)
        heat[0, 4, 4], heat[(0, *cell)] = 10., 2.
        return centernet_loss(raw_of(heat.flatten(1), 6., 1e-9), target, ((8, 8), ))

    p = 1 / (1 + math.exp(-2))
    full = p**2 * -math.log(1 - p)
    assert loss((0, 0)).item() == pytest.approx(full, rel=1e-3)
    assert loss((4, 3)).item() == pytest.approx(full * (1 - math.exp(-2))**4, rel=1e-3)


def test_no_objects_at_all():
    target = centernet_targets([torch.zeros(0, 4)] * 2, (64, 64), [(8, 8), (4, 4)])
    heat = torch.zeros(2, 80, requires_grad=True)
    loss = centernet_loss(raw_of(heat, 1., 0.5), target, ((8, 8), (4, 4)))
    assert loss.item() == pytest.approx(160 * 0.25 * math.log(2), rel=1e-5)
    loss.backward()
    assert (heat.grad > 0).all()  # every heat goes down


def test_attention_map_and_loss_by_hand():
    feature = torch.tensor([[[[1., 2.]], [[1., 4.]]], [[[3., 3.]], [[3., 3.]]]])  # energies 1, 10; 9, 9
    attention = attention_map(feature.flatten(2), ((1, 2), ))
    assert attention.tolist() == [[0, 1], [0, 0]]
    z = torch.tensor([[-1., 2.], [0., 1.]])
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-2)) + math.log(2) + math.log1p(math.e)) / 4
    raw = raw_of(z, 1., 0.5)
    assert attention_loss(raw, attention, ((1, 2), )).item() == pytest.approx(expected, rel=1e-6)
    assert attention_loss(raw, attention, ((1, 1), (1, 1))).item() == pytest.approx(expected, rel=1e-6)
    assert attention_loss(raw.repeat(3, 1, 1, 1), attention, ((1, 2), )).item() == pytest.approx(expected, rel=1e-6)
    assert attention_map(torch.zeros(0, 4, 4), ((2, 2), )).shape == (0, 4)


def test_attention_is_scaled_level_by_level():
    levels = [torch.randn(2, 3, *shape) * scale for shape, scale in (((4, 6), 1.), ((2, 3), 9.), ((1, 1), 5.))]
    attention = attention_map(torch.cat([x.flatten(2) for x in levels], 2), ((4, 6), (2, 3), (1, 1)))
    for part, level in zip(attention.split([24, 6, 1], 1), levels, strict=True):
        torch.testing.assert_close(part, attention_map(level.flatten(2), (level.shape[2:], )))
    assert attention[:, :24].amax(1).tolist() == attention[:, 24:30].amax(1).tolist() == [1, 1]
    assert attention[:, 30].tolist() == [0, 0]
