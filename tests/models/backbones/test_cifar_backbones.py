import pytest
import torch
from mmpretrain.models.backbones import VGG
from torch import nn

from mmkd_plugin.models.backbones import CIFARVGG, CIFARMobileNetV2, CIFARResNet


def network(backbone, channels, classes):
    return dict(type='mmpretrain.ImageClassifier', backbone=backbone, neck=dict(type='mmpretrain.GlobalAveragePooling'),
                head=dict(type='mmpretrain.LinearClsHead', num_classes=classes, in_channels=channels))


def resnet(depth, factor=1):
    stem = dict(stem_channels=32, base_channels=64) if factor == 4 else {}
    return dict(type='mmkd_plugin.CIFARResNet', depth=depth, **stem)


def vgg(depth):
    return dict(type='mmkd_plugin.CIFARVGG', depth=depth)


def wrn(depth, factor):
    return dict(type='mmrazor.WideResNet', depth=depth, widen_factor=factor)


# Of the models of CRD's benchmark; papers print 7.43M, 1.23M, 0.28M, 0.86M, 9.46M, 3.97M, 0.81M, 2.26M, 0.70M, 23.71M.
# The last three are not ours but the stack's.
@pytest.mark.parametrize('backbone, channels, expected', [
    (resnet(32, 4), 256, 7_433_860), (resnet(8, 4), 256, 1_233_540), (resnet(20), 64, 278_324),
    (resnet(56), 64, 861_620), (vgg(13), 512, 9_462_180), (vgg(8), 512, 3_965_028),
    (dict(type='mmkd_plugin.CIFARMobileNetV2'), 1280, 812_836), (wrn(40, 2), 128, 2_255_156),
    (wrn(16, 2), 128, 703_284), (dict(type='mmpretrain.ResNet_CIFAR', depth=50), 2048, 23_705_252)])
def test_parameters_with_100_classes_are_the_published(build, backbone, channels, expected):
    model = build(network(backbone, channels, 100), 'mmpretrain')
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 100)


# AMD's, on CIFAR-10: as many as the widths of arXiv 1605.07146, table 1, make.
@pytest.mark.parametrize('depth, factor', [(16, 3), (16, 1), (28, 3), (28, 1)])
def test_mmrazors_wide_resnets_are_the_papers(build, depth, factor):
    blocks, width, expected = (depth - 4) // 6, 16, 3 * 16 * 9
    for stage in range(3):
        new = 16 * factor * 2**stage
        expected += 9 * width * new + 2 * width + (width * new if width != new else 0)  # first convolution, shortcut
        expected += (2 * blocks - 1) * (9 * new * new + 2 * new)
        width = new
    expected += 2 * width + width * 10 + 10
    model = build(network(wrn(depth, factor), width, 10), 'mmpretrain')
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize('model, shapes', [
    (CIFARResNet(8, 32, 64), {'relu': (32, 32), 'layer1': (64, 32), 'layer2': (128, 16), 'layer3': (256, 8)}),
    (CIFARVGG(8), {'features.0': (64, 32), 'features.2': (128, 16), 'features.4': (256, 8), 'features.6': (512, 4),
                   'features.8': (512, 4)}),
    (CIFARVGG(13), {'features.1': (64, 32), 'features.4': (128, 16), 'features.7': (256, 8), 'features.10': (512, 4),
                    'features.13': (512, 4)}),
    (CIFARMobileNetV2(), {'layer2': (12, 16), 'layer3': (16, 8), 'layer5': (48, 4), 'layer7': (160, 2),
                          'conv2': (1280, 2)})])
def test_stages_of_a_32_x_32_image(model, shapes):
    found = {}
    for name in shapes:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: found.update({name: tuple(out.shape[1:])}))
    model.eval()
    out = model(torch.rand(1, 3, 32, 32))
    assert found == {name: (channels, side, side) for name, (channels, side) in shapes.items()}
    assert isinstance(out, tuple) and out[-1].shape[1:] == found[list(shapes)[-1]]


def test_vgg_has_the_weights_of_mmpretrains_and_two_pools_less():
    ours, plain = CIFARVGG(13), VGG(13, norm_cfg=dict(type='BN'))
    ours.load_state_dict(plain.state_dict(), strict=True)
    pools = [sum(isinstance(module, nn.MaxPool2d) for module in model.modules()) for model in (ours, plain)]
    assert pools == [3, 5]


def test_mobilenet_is_mmpretrains_but_for_what_it_says():
    model = CIFARMobileNetV2(widen_factor=1.0)
    assert not any(isinstance(module, nn.ReLU6) for module in model.modules())
    assert [getattr(model, f'layer{i}')[-1].conv[-1].conv.out_channels for i in range(1, 8)] == [
        16, 24, 32, 64, 96, 160, 320]
    assert [max(module.stride[0] for module in getattr(model, f'layer{i}').modules() if isinstance(module, nn.Conv2d))
            for i in range(1, 8)] == [1, 1, 2, 2, 1, 2, 1]
    assert len(model.layer1) == 2 and model.layer1[0].conv.kernel_size == (1, 1)


def test_a_new_resnet_is_no_identity():
    model = CIFARResNet(8)
    model.init_weights()
    assert (model.layer1[0].bn2.weight == 1).all()  # MMPretrain's own starts with 0


@pytest.mark.parametrize('make, message', [
    (lambda: CIFARResNet(18), 'CIFARResNet.depth must be 6n [+] 2.*got 18.*closest'),
    (lambda: CIFARVGG(12), r'CIFARVGG.depth must be one of \[8, 11, 13, 16, 19\], got 12'),
])
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
