"""Tokens as maps, checked against what MMPretrain's backbones make of them."""
import pytest
import torch
from conftest import classifier
from mmrazor.models.task_modules import RecorderManager

from mmkd_plugin.models.tokens import find_grid, to_map

VIT = dict(embed_dims=8, num_layers=1, num_heads=2, feedforward_channels=8)


def vit(kind='VisionTransformer', **options):
    return dict(dict(type=f'mmpretrain.{kind}', arch=VIT, img_size=64, patch_size=16), **options)


@pytest.mark.parametrize('kind, options, extra', [
    ('VisionTransformer', {}, 1), ('VisionTransformer', dict(with_cls_token=False), 0),
    ('DistilledVisionTransformer', {}, 2), ('DeiT3', {}, 1), ('ViTEVA02', dict(sub_ln=False), 1),
])
def test_the_map_is_the_backbones_own(kind, options, extra, build):
    backbone = build(vit(kind, out_type='featmap', final_norm=False, **options), 'mmpretrain')
    backbone.eval()
    tokens = []
    backbone.layers[0].register_forward_hook(lambda module, inputs, output: tokens.append(output))
    image = torch.rand(2, 3, 64, 96)
    own, = backbone(image)
    assert find_grid(tokens[0].shape[1], (64, 96)) == (extra, (4, 6))
    assert torch.equal(to_map(tokens[0], (64, 96)), own)


@pytest.mark.parametrize('backbone, layer, grid', [
    (dict(type='mmpretrain.MlpMixer', arch=dict(embed_dims=8, num_layers=1, tokens_mlp_dims=8, channels_mlp_dims=8),
          img_size=64, patch_size=16), 'layers.0', (4, 4)),
    (dict(type='mmpretrain.T2T_ViT', img_size=64, embed_dims=8, t2t_cfg=dict(token_dims=8), num_layers=1,
          layer_cfgs=dict(num_heads=2, feedforward_channels=8)), 'encoder.0', (4, 4)),
    (dict(type='mmpretrain.TNT', arch=dict(embed_dims_outer=8, embed_dims_inner=4, num_layers=1, num_heads_outer=2,
                                           num_heads_inner=2), img_size=64), 'layers.0.outer_block', (4, 4)),
    (dict(type='mmpretrain.XCiT', embed_dims=8, depth=1, cls_attn_layers=1, num_heads=2, patch_size=16),
     'ca_layers.0', (4, 4)),
    (dict(type='mmpretrain.SwinTransformer', arch=dict(embed_dims=8, depths=[1] * 4, num_heads=[1] * 4), img_size=64,
          window_size=2), 'stages.1.blocks.0', (8, 8)),
])
def test_grids_of_other_backbones(backbone, layer, grid, build):
    backbone = build(backbone, 'mmpretrain')
    backbone.eval()
    found = []
    hook = backbone.get_submodule(layer).register_forward_hook(lambda module, inputs, output: found.append(output))
    backbone(torch.rand(1, 3, 64, 64))
    tokens = found[0]
    hook.remove()
    tokens = tokens[0] if isinstance(tokens, tuple) else tokens
    assert tokens.dim() == 3 and to_map(tokens, (64, 64)).shape[2:] == grid


def test_the_first_tokens_are_left_out_and_rows_come_first():
    x = torch.arange(7.).view(1, 7, 1)
    assert to_map(x, (32, 48)).tolist() == [[[[1, 2, 3], [4, 5, 6]]]]
    assert to_map(x[:, :4]).tolist() == [[[[0, 1], [2, 3]]]]
    assert to_map(x[:, :5]).tolist() == [[[[1, 2], [3, 4]]]]


@pytest.mark.parametrize('length, size, extra, expected', [
    (197, (224, 224), None, (1, (14, 14))), (198, (224, 224), None, (2, (14, 14))),
    (196, (224, 224), None, (0, (14, 14))), (261, (224, 224), None, (5, (16, 16))), (55, (150, 101), None, (1, (9, 6))),
    (71, (150, 101), 1, (1, (10, 7))),
])
def test_grids(length, size, extra, expected):
    assert find_grid(length, size, extra) == expected


@pytest.mark.parametrize('length, size, extra, message', [
    (200, (224, 224), None, '200 tokens minus 0 or 1 or 2 or 5 extra ones form no grid for an image of 224 x 224'),
    (197, (224, 224), 0, '197 tokens minus 0 extra'), (7, None, None, '7 tokens.* a square image'),
    (1, None, 1, '1 tokens'),
])
def test_no_grid(length, size, extra, message):
    with pytest.raises(ValueError, match=message):
        to_map(torch.rand(1, length, 4), size, extra)


def test_a_pooled_vector_is_no_sequence():
    with pytest.raises(ValueError, match=r'tokens: expected a tensor \(N, L, C\), got shape \(2, 8\)'):
        to_map(torch.rand(2, 8))


def transformer(**options):
    return dict(type='mmpretrain.ImageClassifier', backbone=vit(**options), head=dict(
        type='mmpretrain.VisionTransformerClsHead', num_classes=4, in_channels=8))


def test_the_recorder_gives_maps(build):
    model = build(transformer(), 'mmpretrain')
    model.eval()
    recorders = RecorderManager({name: dict(type='mmkd_plugin.MapOutputs', source=source) for name, source in dict(
        tokens='backbone.layers.0', map='backbone.patch_embed.projection', pooled='backbone').items()})
    recorders.initialize(model)
    for size in ((64, 64), (64, 96)):
        with recorders:
            model(torch.rand(2, 3, *size))
        grid = (2, 8, size[0] // 16, size[1] // 16)
        assert recorders.get_recorder('tokens').get_record_data().shape == grid
        assert recorders.get_recorder('map').get_record_data().shape == grid
        assert recorders.get_recorder('pooled').get_record_data()[0].shape == (2, 8)


def test_a_transformer_teaches_a_convolutional_network(build):
    model = build(dict(
        type='mmkd_plugin.TeacherStudentDistill', architecture=classifier(8), teacher=transformer(),
        allow_random_teacher=True, distiller=dict(
            type='mmkd_plugin.FeatureDistiller', base='fitnet', layers=[('backbone.layer3', 'backbone.layers.0')])),
        'mmpretrain')
    from mmpretrain.structures import DataSample
    losses = model(torch.rand(2, 3, 64, 96), [DataSample().set_gt_label(i) for i in range(2)], mode='loss')
    losses['distill.loss_fitnet_backbone_layer3'].backward()
    assert model.student.backbone.layer3[0].conv1.weight.grad.any()
