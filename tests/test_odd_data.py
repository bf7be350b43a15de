"""What real data sets hold now and then trains without a hitch."""
import copy

import pytest
import torch
from conftest import retinanet
from mmengine.optim import build_optim_wrapper

AMD = dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=dict(scale_free=True))
SOKD = dict(type='mmkd_plugin.SoKDDistiller', layers=['neck'], dafa=dict(), dam=dict(anchor='boxes'),
            base='fitnet')


def distil(distiller, student, teacher):
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student, teacher=teacher,
                allow_random_teacher=True, distiller=distiller)


def optimizer(distiller):
    policy = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor') if distiller is SOKD else {}
    return dict(optimizer=dict(type='SGD', lr=1e-4), **policy)


def samples(boxes, sizes=((64, 64), (64, 64)), channels=3):
    """A batch of images of these sizes (h, w), each with these boxes."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData
    torch.manual_seed(1)
    items = []
    for height, width in sizes:
        size = height, width
        sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size,
                                             scale_factor=(1., 1.), img_id=0))
        inside = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        sample.gt_instances = InstanceData(bboxes=inside, labels=torch.zeros(len(inside), dtype=torch.long))
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
        items.append((torch.randint(0, 256, (channels, height, width), dtype=torch.uint8), sample))
    inputs, data_samples = zip(*items)
    return dict(inputs=list(inputs), data_samples=list(data_samples))


ODD_DATA = {
    'no objects': samples([]),
    'one image': samples([[5, 5, 40, 40]], sizes=[(64, 64)]),
    'one image without objects': samples([], sizes=[(64, 64)]),
    'odd sizes': samples([[3, 3, 20, 20]], sizes=[(61, 97), (33, 130)]),
    'smaller than a stride': samples([[1, 1, 5, 5]], sizes=[(7, 9), (5, 3)]),
    'the whole image': samples([[0, 0, 64, 64]]),
    'far beyond the image': samples([[-500, -500, 900, 900]]),
    'a thousandth of a pixel': samples([[10, 10, 10.001, 10.001]]),
    'very many': samples([[i % 50, i // 50, i % 50 + 9, i // 50 + 9] for i in range(500)]),
}


@pytest.mark.parametrize('distiller', [AMD, SOKD], ids=['amd', 'sokd'])
def test_odd_data_trains(build, distiller):
    model = build(distil(distiller, retinanet(8), retinanet(16))).train()
    optim = build_optim_wrapper(model, optimizer(distiller))
    for name, batch in ODD_DATA.items():
        log = model.train_step(copy.deepcopy(batch), optim)
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in log.values()), (name, log)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters()), name


@pytest.mark.parametrize('distiller', [AMD, SOKD], ids=['amd', 'sokd'])
def test_grey_images_train(build, distiller):
    def grey(width):
        model = retinanet(width, mean=[120.], std=[60.], bgr_to_rgb=False)
        model['backbone']['in_channels'] = 1
        return model
    model = build(distil(distiller, grey(8), grey(16))).train()
    optim = build_optim_wrapper(model, optimizer(distiller))
    log = model.train_step(samples([[5, 5, 40, 40]], channels=1), optim)
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in log.values())


@pytest.mark.parametrize('distiller', [AMD, SOKD], ids=['amd', 'sokd'])
def test_boxes_without_area_leave_distillation_finite(build, distiller):
    """MMDetection's own regression loss is infinite on them; its data sets drop them."""
    model = build(distil(distiller, retinanet(8), retinanet(16))).train()
    batch = samples([[10, 10, 10, 30], [20, 20, 20, 20], [30, 30, 25, 25]])
    losses = model(**model.data_preprocessor(batch, True), mode='loss')
    assert all(torch.isfinite(value) for name, value in losses.items() if name.startswith('distill'))
