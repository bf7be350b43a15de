"""Whatever constructor a config has, a student's parameter groups are those of its plain training."""
import copy

import pytest
import torch
from conftest import classifier, retinanet
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapperDict, build_optim_wrapper

from mmkd_plugin.engine import PolicyOptimWrapper
from mmkd_plugin.models.refiners import DAFA

ADAMW = dict(type='AdamW', lr=1e-3, weight_decay=0.05)


def network(**backbone):
    model = classifier(8)
    model['backbone'] = backbone
    return model


CONVNEXT = network(type='mmpretrain.ConvNeXt', arch=dict(depths=[1, 1, 3, 1], channels=[8, 16, 32, 64]))
SWIN = network(type='mmpretrain.SwinTransformer', arch=dict(embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]),
               img_size=64, window_size=2)
VIT = network(type='mmpretrain.VisionTransformer', patch_size=32, out_type='cls_token', arch=dict(
    embed_dims=64, num_layers=2, num_heads=2, feedforward_channels=32))
DETECTOR = dict(retinanet(8), backbone=dict(CONVNEXT['backbone'], out_indices=[0, 1, 2, 3],
                                            gap_before_final_norm=False))

MMDET = dict(constructor='mmdet.LearningRateDecayOptimizerConstructor', paramwise_cfg=dict(
    decay_rate=0.7, decay_type='layer_wise', num_layers=6))
MMPRETRAIN = dict(constructor='mmpretrain.LearningRateDecayOptimWrapperConstructor', paramwise_cfg=dict(
    layer_decay_rate=0.7, norm_decay_mult=0.0, flat_decay_mult=0.0, custom_keys={
        '.cls_token': dict(decay_mult=0.5), '.pos_embed': dict(decay_mult=0.5), 'gamma': dict(decay_mult=2.0)}))
CASES = {
    'mmdet, by layers': (DETECTOR, MMDET),
    'mmdet, by stages': (CONVNEXT, dict(MMDET, paramwise_cfg=dict(decay_rate=0.7, decay_type='stage_wise',
                                                                  num_layers=6))),
    'mmpretrain, ConvNeXt': (CONVNEXT, MMPRETRAIN),
    'mmpretrain, Swin': (SWIN, MMPRETRAIN),
    'mmpretrain, ViT': (VIT, MMPRETRAIN),
    'mmengine': (classifier(8), dict(paramwise_cfg=dict(
        norm_decay_mult=0.0, bias_lr_mult=2.0, custom_keys={'backbone': dict(lr_mult=0.1), 'head.fc': dict(
            lr_mult=10.0), 'connector': dict(lr_mult=5.0)}))),
    'mmengine, no rules': (classifier(8), {}),
}


def described(groups, model):
    """The groups with names of parameters, and everything else that they state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [dict({key: value for key, value in group.items() if key != 'params'},
                 names=[names[id(parameter)] for parameter in group['params']]) for group in groups]


def distilled(student, distiller):
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student, teacher=copy.deepcopy(student),
                allow_random_teacher=True, distiller=distiller)


@pytest.fixture
def check(build):
    """Builds plain and distilled students' groups and compares them; returns those beside the student."""
    def check(student, options, distiller, **more):
        options = dict(optimizer=ADAMW, clip_grad=dict(max_norm=1.0), **options)
        scope = student['type'].split('.')[0]
        plain = build(student, scope)
        expected = described(build_optim_wrapper(plain, copy.deepcopy(options)).optimizer.param_groups, plain)
        model = build(distilled(student, distiller), scope)
        parallel = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
        torch.nn.Module.__init__(parallel)
        parallel.module = model
        for wrapped in (model, parallel):
            wrapper = build_optim_wrapper(wrapped, dict(copy.deepcopy(options), **copy.deepcopy(more)))
            groups = getattr(wrapper, 'student', wrapper).optimizer.param_groups
            assert described(groups[:len(expected)], model.student) == expected
        return model, wrapper, described(groups[len(expected):], model.distiller)
    return check


@pytest.mark.parametrize('case', CASES)
def test_groups_are_those_of_plain_training(case, check):
    student, options = CASES[case]
    connector = dict(type='ConvModuleConnector', in_channel=4, out_channel=4, norm_cfg=dict(type='BN'), bias=True)
    model, _, beside = check(student, options, dict(type='ConfigurableDistiller', connectors=dict(one=connector)))
    rules = options.get('paramwise_cfg', {})
    settings = {name: (group['lr'], group['weight_decay']) for group in beside for name in group['names']}
    norm = 0.05 * rules.get('norm_decay_mult', 1)
    flat, bias = 0.05 * rules.get('flat_decay_mult', 1), 1e-3 * rules.get('bias_lr_mult', 1)
    assert {name.removeprefix('connectors.one.conv_module.'): setting for name, setting in settings.items()} == {
        'conv.weight': (1e-3, 0.05), 'conv.bias': (bias, flat),  # the student's names are not theirs
        'bn.weight': (1e-3, norm), 'bn.bias': (1e-3, norm)}


@pytest.mark.parametrize('case', ['mmdet, by stages', 'mmpretrain, ConvNeXt', 'mmengine', 'mmengine, no rules'])
def test_beside_a_policy_too(case, check):
    """SoKD's constructor wraps the one that the student's config has."""
    student, options = CASES[case]
    layer = 'backbone.layer3' if student['backbone']['type'] == 'mmpretrain.ResNet' else 'backbone.stages.2'
    policy = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor', policy=dict(type='Adam', lr=0.01))
    if 'constructor' in options:
        policy['student_constructor'] = options['constructor']
    distiller = dict(type='mmkd_plugin.SoKDDistiller', layers=[layer], dafa=dict(), dam=dict(anchor='attention'),
                     base='fitnet')
    model, wrapper, beside = check(student, options, distiller, **policy)
    assert isinstance(wrapper, PolicyOptimWrapper)
    policies = {id(parameter) for module in model.modules() if isinstance(module, DAFA)
                for parameter in module.parameters()}
    assert {id(parameter) for parameter in wrapper.policy.optimizer.param_groups[0]['params']} == policies
    assert {name for group in beside for name in group['names']} == {
        name for name, parameter in model.distiller.named_parameters() if id(parameter) not in policies}


def test_a_distiller_without_parameters_adds_no_group(check):
    _, wrapper, beside = check(classifier(8), {}, dict(type='mmkd_plugin.AMDDistiller', layers=['backbone.layer3']))
    assert beside == [] and wrapper.base_param_settings is None


def test_keys_that_name_the_student_by_its_place_are_refused(build):
    model = build(distilled(classifier(8), dict(type='ConfigurableDistiller')), 'mmpretrain')
    with pytest.raises(ValueError, match="custom_keys: 'architecture.backbone' names no parameter of the student"):
        build_optim_wrapper(model, dict(optimizer=ADAMW, paramwise_cfg=dict(
            custom_keys={'architecture.backbone': dict(lr_mult=0.1)})))


def test_mmrazors_constructor_of_parts(build):
    model = build(distilled(classifier(8), dict(type='ConfigurableDistiller')), 'mmpretrain')
    plain = build(classifier(8), 'mmpretrain')
    rules = dict(optimizer=ADAMW, paramwise_cfg=CASES['mmengine'][1]['paramwise_cfg'])
    wrapper = build_optim_wrapper(model, dict(
        constructor='mmrazor.SeparateOptimWrapperConstructor', architecture=copy.deepcopy(rules)))
    assert isinstance(wrapper, OptimWrapperDict)
    assert described(wrapper['architecture'].optimizer.param_groups, model.student) == described(
        build_optim_wrapper(plain, copy.deepcopy(rules)).optimizer.param_groups, plain)


def test_other_models_are_built_as_ever():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    wrapper = DefaultOptimWrapperConstructor(dict(optimizer=ADAMW), dict(norm_decay_mult=0.0))(model)
    assert [group['weight_decay'] for group in wrapper.optimizer.param_groups] == [0.05, 0.05, 0, 0]
