import copy

import pytest
import torch
from conftest import classification_batch, classifier, derived, detection_batch, retinanet
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmrazor.models.distillers import ConfigurableDistiller

from mmkd_plugin.models.connectors import FitNetConnector
from mmkd_plugin.models.distillers import feature_distiller
from mmkd_plugin.models.distillers.auto_weight import AutoWeight
from mmkd_plugin.models.distillers.presets import PRESETS, resolve

SGD = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
STAGES = [f'backbone.layer{i}' for i in (1, 2, 3, 4)]
FITNET_CONNECTOR = dict(type='mmkd_plugin.FitNetConnector', in_channels='s_channels', out_channels='t_channels')


def neck(base, t_channels=24, **fields):
    """A RetinaNet of 16 channels at each level of its neck, and a teacher of ``t_channels``."""
    distiller = dict(dict(type='mmkd_plugin.FeatureDistiller', layers=['neck'], base=base), **fields)
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=retinanet(8), allow_random_teacher=True,
                teacher=retinanet(16, fpn_channels=t_channels), distiller=distiller)


def stages(base, layers=STAGES, **fields):
    distiller = dict(dict(type='mmkd_plugin.FeatureDistiller', layers=layers, base=base), **fields)
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=classifier(8), allow_random_teacher=True,
                teacher=classifier(16), distiller=distiller)


def scope(config):
    return 'mmdet' if 'bbox_head' in config['architecture'] else 'mmpretrain'


def batch_for(model):
    if hasattr(model.student, 'bbox_head'):
        return detection_batch()
    batch = classification_batch()
    for i, sample in enumerate(batch['data_samples']):
        sample.set_field(torch.tensor(i), 'sample_idx')  # as mmkd_plugin.CRDDataset does
    return batch


def losses_of(model, batch):
    losses = model(**model.data_preprocessor(copy.deepcopy(batch), True), mode='loss')
    return {key.removeprefix('distill.'): value for key, value in losses.items() if 'distill' in key}


CASES = {
    'fitnet': neck('fitnet'), 'fitnet, stages': stages('fitnet'), 'at': stages('at'), 'pkd': neck('pkd', 16),
    'cwd': neck('cwd', 16), 'mgd': neck('mgd'), 'fbkd': neck('fbkd', 16, layers=['neck.fpn_convs.0']), 'reviewkd': neck(
        dict(preset='reviewkd', connector=dict(mid_channels=16))),
    'crd': stages(dict(preset='crd', loss=dict(neg_num=5, sample_n=8)), layers=['backbone.layer4']),
    'amd': stages('amd'), 'amd-scale-free': neck('amd-scale-free'),
}


def test_every_preset_has_a_case():
    assert set(PRESETS) == {name.split(',')[0] for name in CASES}


@pytest.mark.parametrize('name', CASES)
def test_a_step_on_each_base(build, name):
    model = build(CASES[name], scope(CASES[name]))
    losses = losses_of(model, batch_for(model))
    assert list(losses) == model.distiller.loss_names
    assert all(key.startswith(f'loss_{name.split(",")[0].replace("-", "_")}_') for key in losses)
    for key, loss in losses.items():
        assert loss.isfinite()
        if not key.endswith('neck_3'):  # one position: PKD, AMD and CWD have nothing to compare there
            assert loss > 0, key
            gradients = torch.autograd.grad(loss, list(model.student.backbone.parameters()), retain_graph=True,
                                            allow_unused=True)
            assert any(grad is not None and grad.any() for grad in gradients), key
    wrapper = build_optim_wrapper(model, SGD)
    trained = {id(p) for group in wrapper.optimizer.param_groups for p in group['params']}
    assert all(id(p) in trained for p in model.distiller.parameters())
    before = model.student.backbone.conv1.weight.clone()
    model.train().train_step(batch_for(model), wrapper)
    assert (model.student.backbone.conv1.weight != before).any()


def test_the_weight_is_the_bases_unless_it_is_given(build):
    plain, batch = {}, None
    for weight in (None, 1.0, 3.0):
        model = build(neck('fitnet' if weight is None else dict(preset='fitnet', weight=2.0), loss_weight=weight))
        batch = batch or batch_for(model)
        plain[weight] = losses_of(model, batch)['loss_fitnet_neck_0']
    assert PRESETS['fitnet']['weight'] == 1 and plain[None] == plain[1.0]
    torch.testing.assert_close(plain[3.0], 3 * plain[1.0])


def test_several_bases_at_once(build):
    bases = ['pkd', 'amd-scale-free', dict(name='hint', loss=dict(type='L1Loss'), weight=0.5)]
    model = build(neck(bases, 16, loss_weight=[6.0, 1.0, 2.0]))
    losses = losses_of(model, batch_for(model))
    assert list(losses) == [f'loss_{name}_neck_{i}' for name in ('pkd', 'amd_scale_free', 'hint') for i in range(4)]
    assert {name.split('_neck')[0]: weight for name, weight in model.distiller.weights.items()} == dict(
        loss_pkd=6.0, loss_amd_scale_free=1.0, loss_hint=2.0)
    alone = build(neck('pkd', 16, loss_weight=6.0))
    assert losses_of(alone, batch_for(alone))['loss_pkd_neck_1'] == losses['loss_pkd_neck_1']


def measured(build, base, weight='auto', steps=4, **fields):
    model = build(neck(base, 16, loss_weight=weight, **fields)).train()
    for auto in model.distiller.autos.values():
        auto.iterations, auto.warmup = 2, min(auto.warmup, 1)
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=0.0)))
    for _ in range(steps):
        model.train_step(batch_for(model), wrapper)
    return model


def test_auto_makes_the_gradients_ratio_what_is_stated(build):
    model = measured(build, ['pkd', 'at'], ['auto', 5.0], auto_ratio=0.5)
    assert list(model.distiller.autos) == ['pkd'] and not model.distiller.measuring
    weight = float(model.distiller.autos['pkd'].weight)
    assert MessageHub.get_current_instance().get_scalar('train/weight/pkd').current() == weight
    seen = {}
    model.student.neck.register_forward_hook(lambda _, __, out: seen.setdefault('maps', out))
    losses = model(**model.data_preprocessor(batch_for(model), True), mode='loss')

    def norm(prefix):
        loss = sum(sum(x.mean() for x in value) if isinstance(value, list) else value.mean()
                   for key, value in losses.items() if key.startswith(prefix) and 'loss' in key)
        grads = torch.autograd.grad(loss, seen['maps'], retain_graph=True, allow_unused=True)
        return torch.cat([grad.flatten() for grad in grads if grad is not None]).norm()

    torch.testing.assert_close(norm('distill.loss_pkd') / norm('student.'), torch.tensor(0.5), rtol=0.05, atol=0)
    plain = measured(build, ['pkd', 'at'], [1.0, 5.0], steps=0)
    torch.testing.assert_close(losses['distill.loss_pkd_neck_0'], weight * losses_of(
        plain, batch_for(plain))['loss_pkd_neck_0'], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('case', derived())
def test_auto_measures_where_the_network_goes_on(build, case):
    student, teacher, layers, size, _ = derived()[case]
    model = build(dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student, teacher=teacher,
                       allow_random_teacher=True, distiller=dict(
                           type='mmkd_plugin.FeatureDistiller', layers=layers, base='at', loss_weight='auto')),
                  'mmpretrain').train()
    model.distiller.autos['at'].iterations = 1
    batch = classification_batch(size)
    model.train_step(copy.deepcopy(batch), build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=0.0))))
    seen = []
    name = model.distiller._written['student_recorders'][model.distiller.layers[0]]['source']
    model.student.get_submodule(name).register_forward_hook(lambda _, __, output: seen.append(output))
    losses = model(**model.data_preprocessor(batch, True), mode='loss')
    task, base = (sum(value for key, value in losses.items() if key.startswith(prefix)) for prefix in (
        'student.', 'distill.'))
    norms = [torch.autograd.grad(loss, seen, retain_graph=True)[0].norm() for loss in (task, base)]
    assert norms[0] > 0
    torch.testing.assert_close(norms[1], norms[0], rtol=0.05, atol=0)


@pytest.mark.parametrize('options, layers, message', [
    (dict(frozen_stages=1), ['backbone.layer1'], 'backbone.layer1 of the student are frozen'),
    (dict(out_indices=(2, )), ['backbone.layer4'], "the task's loss does not depend on backbone.layer4"),
])
def test_auto_needs_a_gradient_of_the_task(build, options, layers, message):
    config = stages('at', layers, loss_weight='auto')
    config['architecture']['backbone'].update(options)
    config['architecture']['head']['in_channels'] = 32 if 'out_indices' in options else 64
    model = build(config, 'mmpretrain').train()
    with pytest.raises(ValueError, match=message):
        model.train_step(classification_batch(), build_optim_wrapper(model, SGD))


def test_a_gradient_that_is_zero_or_not_finite_does_not_change_the_weight():
    auto, one = AutoWeight('x', 3.0, 0, ratio=0.5), torch.ones(())
    weights = []
    for task, base in ((one, 0 * one), (one, one * float('inf')), (0 * one, one), (one, one * float('nan'))):
        auto.update(task, base)
        weights.append(float(auto.weight))
    assert weights == pytest.approx([3.0] * 4)
    auto = AutoWeight('x', 1.0, 0)
    for base in (1., 0., 4.):
        auto.update(one, base * auto.weight)
        weights.append(float(auto.weight))
    assert weights[4:] == pytest.approx([1.0, 1.0, 4**(-1 / 3)])


def test_the_first_iteration_reports_the_gradients(build, monkeypatch):
    said = []
    monkeypatch.setattr('mmkd_plugin.models.algorithms.teacher_student_distill.print_log',
                        lambda text, **_: said.append(text))
    reports = []
    for weight in (1.0, 10.0):
        model = build(neck('pkd', 16, loss_weight=weight)).train()
        losses_of(model, batch_for(model))
        losses_of(model, batch_for(model))
        text, = [text for text in said if text.startswith('Gradients at the distilled layers')]
        reports.append(float(text.split('pkd ')[1].split('. ')[0]))
        said.clear()
    assert reports[1] == pytest.approx(10 * reports[0], rel=0.02) and reports[0] > 0


def test_auto_does_not_depend_on_the_weight_that_it_begins_with(build):
    weights = [float(measured(build, dict(preset='pkd', weight=weight)).distiller.autos['pkd'].weight)
               for weight in (1.0, 100.0)]
    assert weights[0] == pytest.approx(weights[1], rel=1e-3)


def test_auto_trains_a_connector_alone_before_it_measures(build):
    model = build(neck('fitnet', loss_weight='auto')).train()
    auto = model.distiller.autos['fitnet']
    assert auto.warmup > 0 and auto.warming_up
    loss = sum(losses_of(model, batch_for(model)).values())
    student = torch.autograd.grad(loss, list(model.student.backbone.parameters()), allow_unused=True, retain_graph=True)
    connector = torch.autograd.grad(loss, list(model.distiller.connectors.parameters()))
    assert not any(grad is not None and grad.any() for grad in student) and all(grad.any() for grad in connector)


def test_auto_is_saved_and_goes_on(build):
    model = measured(build, 'pkd', steps=3)
    again = build(neck('pkd', 16, loss_weight='auto'))
    again.load_state_dict(model.state_dict())
    auto = again.distiller.autos['pkd']
    assert auto.weight == model.distiller.autos['pkd'].weight and auto.step == model.distiller.autos['pkd'].step == 2


@pytest.mark.parametrize('base, layers, weight', [
    ('crosskd', [], None), (['pkd', 'crosskd'], ['neck'], [6.0, 2.0]),
    (dict(preset='crosskd', reg_loss_weight=0.5), ['backbone.layer4'], None)])
def test_crosskd_alone_and_beside_a_base(build, base, layers, weight):
    config = neck(base, 16, layers=layers, loss_weight=weight)
    for network in (config['architecture'], config['teacher']):
        network['bbox_head']['stacked_convs'] = 2
    model = build(config).train()
    losses = losses_of(model, batch_for(model))
    assert list(losses) == model.distiller.loss_names
    assert {'loss_crosskd_cls', 'loss_crosskd_reg'} <= set(losses)
    assert not any('crosskd' in key for key in model.state_dict())
    for name in ('loss_crosskd_cls', 'loss_crosskd_reg'):
        assert losses[name] > 0 and model.distiller.weight_of(name) == (
            2 if weight else 0.5 if name.endswith('reg') and isinstance(base, dict) else 1)
    model.train_step(batch_for(model), build_optim_wrapper(model, SGD))
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


@pytest.mark.parametrize('fields', [
    dict(teacher_precision='bfloat16'), dict(size=61, architecture=retinanet(8, pad_size_divisor=1))])
def test_crosskd_with_a_teacher_in_half_precision_or_of_another_padding(build, fields):
    size, errors = fields.pop('size', 64), []
    plain, other = (build({**neck('crosskd', 16, layers=[]), **more}).eval() for more in (dict(), fields))
    other.load_state_dict(plain.state_dict())
    other.teacher.load_state_dict(plain.teacher.state_dict())
    losses, expected = (losses_of(model, detection_batch(size=size)) for model in (other, plain))
    for name, value in losses.items():
        errors.append(abs(value / expected[name] - 1))
        assert value.dtype == torch.float32 and errors[-1] < 0.05
    assert max(errors) > 0
    sum(losses.values()).backward()


def test_auto_refuses_activation_checkpointing_after_a_layer(build):
    for base, layers in (('pkd', ['backbone.layer2']), ('fitnet', ['backbone.layer2']), ('pkd', ['neck'])):
        config = neck(base, 16, loss_weight='auto', layers=layers)
        config['architecture']['backbone']['with_cp'] = True
        config['teacher'] = config['architecture']
        model = build(config).train()
        wrapper = build_optim_wrapper(model, SGD)
        if layers == ['neck']:
            model.train_step(batch_for(model), wrapper)
        else:
            with pytest.raises(ValueError, match="loss_weight: 'auto' needs gradients .*with_cp=False"):
                model.train_step(batch_for(model), wrapper)


def test_a_base_whose_name_begins_with_anothers(build):
    model = build(neck(['fitnet', dict(preset='fitnet', name='fitnet_deep')], loss_weight=['auto', 1.0])).train()
    assert model.distiller.autos['fitnet'].warming_up
    losses = losses_of(model, batch_for(model))
    for name, reached in (('loss_fitnet_neck_0', False), ('loss_fitnet_deep_neck_0', True)):
        gradient, = torch.autograd.grad(losses[name], [model.student.backbone.conv1.weight], retain_graph=True,
                                        allow_unused=True)
        assert (gradient is not None and bool(gradient.any())) == reached


def test_crd_on_several_processes_is_a_warning(build, monkeypatch, caplog):
    said = []
    monkeypatch.setattr(feature_distiller, 'print_log', lambda text, **_: said.append(text))
    for size, expected in ((1, 0), (2, 1)):
        monkeypatch.setattr(feature_distiller, 'get_world_size', lambda size=size: size)
        build(CASES['crd'])
        build(CASES['fitnet'])
        assert sum('each process has a memory of its own' in text for text in said) == expected


def test_channels_are_filled_in_and_shown(build):
    model = build(neck(dict(preset='pkd', same_channels=False, share='layer', connector=FITNET_CONNECTOR)))
    connector = model.distiller.connectors['pkd_connector_neck']
    assert isinstance(connector, FitNetConnector) and (connector.in_channels, connector.out_channels) == (16, 24)
    written = Config.fromstring(model.distiller.written_config(), '.py').distiller
    assert written.connectors.pkd_connector_neck == dict(
        type='mmkd_plugin.FitNetConnector', in_channels=16, out_channels=24)


def test_the_log_has_layers_channels_losses_and_weights(build, monkeypatch):
    lines = []
    monkeypatch.setattr(feature_distiller, 'print_log', lambda text, logger: lines.append(text))
    build(neck(['fitnet', 'mgd'], loss_weight=[2.5, 'auto']))
    log = '\n'.join(lines)
    for part in ('neck of the student, channels [16', 'neck of the teacher, channels [24', 'weight 2.5',
                 'connector mmkd_plugin.FitNetConnector', 'loss_fitnet_neck_0', 'loss MGDLoss', "('auto')"):
        assert part in log


@pytest.mark.parametrize('name', ['pkd', 'mgd', 'amd-scale-free'])
def test_the_written_config_does_the_same(build, name):
    model = build(neck(name, 16, loss_weight=1.0))
    written = Config.fromstring(model.distiller.written_config(), '.py').distiller
    again = build(dict(neck(name, 16), distiller=written))
    assert type(again.distiller) is ConfigurableDistiller
    again.load_state_dict(model.state_dict())
    again.teacher.load_state_dict(model.teacher.state_dict())
    results = []
    for each in (model, again):
        torch.manual_seed(0)  # MGD draws a mask
        results.append(losses_of(each, batch_for(each)))
    assert list(results[0]) == list(results[1])
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key])


def test_a_shared_connector_runs_once_a_step(build):
    model = build(neck('fitnet')).train()
    runs = []
    model.distiller.connectors['fitnet_connector_neck'].register_forward_pre_hook(lambda *_: runs.append(1))
    losses_of(model, batch_for(model))
    assert runs == [1] and model.distiller._outputs is None


def test_a_layer_that_runs_once_a_level_has_a_loss_for_each_call(build):
    model = build(dict(neck('at', 16), distiller=dict(
        type='mmkd_plugin.FeatureDistiller', layers=['bbox_head.retina_cls'], base='at')))
    losses = losses_of(model, batch_for(model))
    assert list(losses) == [f'loss_at_bbox_head_retina_cls_{i}' for i in range(4)]
    assert len({float(loss) for loss in losses.values()}) == 4
    for i, call in enumerate(range(4)):
        assert model.distiller.place('bbox_head.retina_cls', i, True).get('record_idx', 0) == call


def test_fitnets_connector_by_hand():
    connector = FitNetConnector(2, 3).double().train()
    maps = [torch.randn(2, 2, 4, 5, dtype=torch.double), torch.randn(2, 2, 1, 1, dtype=torch.double)]
    out = connector(maps)
    row = torch.cat([torch.einsum('oc,nchw->nohw', connector.conv.weight[..., 0, 0], x).flatten(2) for x in maps], 2)
    mean, var = row.mean((0, 2), keepdim=True), row.var((0, 2), unbiased=False, keepdim=True)
    expected = (row - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(torch.cat([x.flatten(2) for x in out], 2), expected)
    with pytest.raises(ValueError, match=r'FitNetConnector expects .*\(N, 2, H, W\), got \[\(1, 5, 4, 4\)\]'):
        connector(torch.zeros(1, 5, 4, 4, dtype=torch.double))


@pytest.mark.parametrize('config, message', [
    (neck('fitent'), "base: no preset 'fitent'; the closest are: fitnet"),
    (neck(['pkd', 'pkt'], 16), r"base\[1\]: no preset 'pkt'"),
    (neck(['pkd', 'pkd'], 16), "base: two bases are named 'pkd'"),
    (neck(['pkd', 'at'], 16, loss_weight=3.0), 'loss_weight: expected a number for each base, 2 in all, got 3.0'),
    (neck('pkd', 16, loss_weight=-1), 'loss_weight.*-1'),
    (neck('crosskd', 16, loss_weight='auto'), "loss_weight: 'auto' measures gradients at layers"),
    (neck('pkd', 16, loss_weight='auto', auto_ratio=0), 'auto_ratio.*0'),
    (neck(dict(preset='pkd', weight=0.), 16, loss_weight='auto'), "base.weight: 'auto' starts .* of 'pkd', got 0"),
    (neck(dict(preset='crosskd', weight=-1.), 16), 'base.weight.*-1'),
    (neck(dict(preset='crosskd', weight='auto'), 16), "base.weight.*'auto'"),
    (neck(['crosskd', dict(preset='crosskd', after=2)], 16), "base: 'crosskd' is given twice"),
    (neck(dict(preset='crosskd', beta=0.5), 16), 'CrossKD.beta must be 0 or at least 1, got 0.5'),
    (neck(dict(loss=dict(type='L1Loss'), at_once=True), 16), 'base.at_once: needs a loss with .* got L1Loss'),
    (neck(dict(preset='pkd', conector=None), 16), "base: no field 'conector'; the closest are: connector"),
    (neck(dict(connector=FITNET_CONNECTOR)), 'base.loss: expected the config of a loss, got None'),
    (neck(dict(preset='fitnet', loss=dict(normalize=True))), "distill_losses.loss_fitnet_neck_0: .*'normalize'"),
    (neck(dict(preset='fitnet', share='levels')), "base.share: expected 'map', 'layer' or 'all', got 'levels'"),
    (neck(dict(preset='pkd', inputs=dict(preds_S='students', preds_T='teacher'))), 'base.inputs: expected'),
    (neck('pkd'), r"base: 'pkd' compares channel with channel, .* \[16, 16, 16, 16\] channels in .* and \[24"),
    (neck('fitnet', layers=['backbone']), 'layers: .*share one connector.*Give the stages as separate layers'),
    (neck('fitnet', layers=['nekc']), "layers.nekc: RetinaNet has no 'nekc'; the closest are: neck"),
    (neck('fitnet', layers=[]), 'layers: the list is empty'),
    (neck('fitnet', layers=['neck', 'neck']), "layers: 'neck' is given twice"),
    (neck('fitnet', layers=['bbox_head.loss_cls']), "layers: 'bbox_head.loss_cls' of the student does not run"),
    (neck('fitnet', connectors=dict(fitnet_connector_neck=dict(type='CRDConnector'))), 'connectors: .*Rename your'),
])
def test_mistakes_are_found_at_build_time(build, config, message):
    with pytest.raises(ValueError, match=f'(?s){message}'):
        build(config)


def test_given_fields_are_merged_into_those_of_the_preset():
    _, base = resolve(dict(preset='crd', loss=dict(sample_n=10), weight=2.0))
    assert base['loss'] == dict(PRESETS['crd']['loss'], sample_n=10) and base['weight'] == 2.0
    _, base = resolve(dict(preset='fitnet', connector=dict(type='mmkd_plugin.ConvAdapter', in_channels=1)))
    assert base['connector'] == dict(type='mmkd_plugin.ConvAdapter', in_channels=1)
    assert 'sample_n' not in PRESETS['crd']['loss']
