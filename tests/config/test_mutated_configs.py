"""A config with a mistake is answered with the field that holds it, or it trains: 500 mutations of four small ones."""
import copy
import functools

import pytest
import torch
from conftest import classification_batch, classifier, detection_batch, retinanet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

BASE = dict(preset='fitnet', weight=1.0)
DAFA = dict(operations=['Rotate', 'Cutout', 'Noise'], sub_policy_size=2, beta_init=0.5)
DETECTOR, CLASSIFIER = 'mmdet', 'mmpretrain'
OTHERS = dict(
    detector={'the same': retinanet(4, fpn_channels=8, levels=3), 'wider': retinanet(8, fpn_channels=16, levels=3),
              'of other classes': retinanet(4, fpn_channels=8, levels=3, num_classes=5),
              'of more levels': retinanet(4, fpn_channels=8, levels=4)},
    classifier={'the same': classifier(4), 'wider': classifier(8), 'of other classes': classifier(4, num_classes=6)})
RECORDERS = dict(fc=dict(type='ModuleOutputs', source='head.fc'),
                 mid=dict(type='ModuleOutputs', source='backbone.layer3'))
DISTILLERS = {
    'amd detector': (DETECTOR, dict(
        type='mmkd_plugin.AMDDistiller', layers=['neck'],
        amd=dict(margin=1.35, scale=64.0, scale_free=True, loss_weight=1.0))),
    'amd classifier': (CLASSIFIER, dict(
        type='mmkd_plugin.AMDDistiller', layers=['backbone.layer2', ['backbone.layer3', 'backbone.layer3']],
        amd=dict(margin=1.35, scale=64.0, loss_weight=1.0),
        student_recorders=RECORDERS, teacher_recorders=RECORDERS,
        connectors=dict(up=dict(type='ConvModuleConnector', in_channel=16, out_channel=16, kernel_size=1)),
        distill_losses=dict(loss_kd=dict(type='KLDivergence', tau=4, loss_weight=1.0), loss_l2=dict(type='L2Loss')),
        loss_forward_mappings=dict(
            loss_kd=dict(preds_S=dict(recorder='fc', from_student=True),
                         preds_T=dict(recorder='fc', from_student=False)),
            loss_l2=dict(s_feature=dict(recorder='mid', from_student=True, connector='up'),
                         t_feature=dict(recorder='mid', from_student=False))))),
    'sokd detector': (DETECTOR, dict(
        type='mmkd_plugin.SoKDDistiller', layers=['neck'], base=BASE, dafa=DAFA,
        dam=dict(anchor='boxes', detect_loss_weight=1.0, area_loss_weight=1.0))),
    'sokd classifier': (CLASSIFIER, dict(
        type='mmkd_plugin.SoKDDistiller', layers=['backbone.layer3'], base=BASE, dafa=DAFA,
        dam=dict(anchor='attention', anchor_loss_weight=1.0))),
}
JUNK = st.sampled_from([None, True, False, -1, 0, 1, 7, -0.5, 0.5, 1e3, float('nan'), float('inf'), '', 'neck', 'nekc',
                        'backbone.layer1', 'mmrazor.ATLoss', [], ['neck'], ['neck', 'neck'], [1], [['neck']], {},
                        dict(type='ATLoss'), dict(extra=1)])


def config(name):
    _, distiller = DISTILLERS[name]
    losses = 'loss_amd*' if 'amd' in name else 'loss_fitnet*'
    return dict(distiller=copy.deepcopy(distiller), inherit=['backbone.layer1'], allow_random_teacher=True,
                loss_schedules={losses: dict(type='linear', start_factor=1.0, end_factor=0.5, begin=0, end=5)})


def places(node, path=()):
    """Yields the path of every field."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


@st.composite
def mutations(draw):
    """A config, what was done to it, the teacher, and the words of which an error must name one."""
    name = draw(st.sampled_from(sorted(DISTILLERS)))
    fields = config(name)
    if draw(st.integers(0, 19)) == 0:
        fields['inherit'] = []
        teacher = draw(st.sampled_from(sorted(OTHERS['detector' if 'detector' in name else 'classifier'])))
        return name, fields, f'teacher: {teacher}', teacher, ['layers', 'loss', 'num_classes', 'maps']
    path = draw(st.sampled_from(sorted(places(fields), key=str)))
    node = functools.reduce(lambda inner, key: inner[key], path[:-1], fields)
    key, what = path[-1], draw(st.sampled_from(['replace', 'misspell', 'remove', 'add']))
    words = [str(part) for part in path if isinstance(part, str)]
    words += ['loss_schedules'] if 'base' in path else []  # which name a loss of the base
    if what == 'replace':
        node[key] = draw(JUNK)
        words += [str(node[key])] if isinstance(node[key], str) and node[key] else []
    elif what == 'remove':
        del node[key]
    elif what == 'add' and isinstance(node, dict):
        node['surplus'] = draw(JUNK)
        words += ['surplus', 'ATLoss']
    elif isinstance(node[key], str) and len(node[key]) > 2:
        node[key] = node[key][:-2] + node[key][-1] + node[key][-2]
        words.append(node[key])
    elif isinstance(node, dict) and len(key) > 2:
        node[key[:-1]] = node.pop(key)
        words.append(key[:-1])
    return name, fields, f'{what} {".".join(map(str, path))}', 'the same', words


@functools.cache
def built(kind, name):
    torch.manual_seed(0)
    return MODELS.build(ConfigDict(copy.deepcopy(OTHERS[kind][name])))


def step(name, fields, teacher='the same'):
    """Builds the distillation and returns the log of a step of it."""
    kind = name.split()[1]
    student, teacher = (copy.deepcopy(built(kind, model)) for model in ('the same', teacher))
    student._is_init = True
    model = MODELS.build(ConfigDict(dict(fields, type='mmkd_plugin.TeacherStudentDistill', architecture=student,
                                         teacher=teacher))).train()
    model.init_weights()
    policy = {} if getattr(model.distiller, 'dafa', None) is None else dict(
        constructor='mmkd_plugin.PolicyOptimWrapperConstructor')
    optim = build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=1e-4), **policy))
    torch.manual_seed(0)
    batch = detection_batch(size=64) if 'detector' in name else classification_batch(size=32, samples=2)
    return model.train_step(batch, optim)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Each case would say what it inherits."""
    from mmkd_plugin.models.algorithms import dry_run, inherit
    for module in (dry_run, inherit):
        monkeypatch.setattr(module, 'print_log', lambda *_, **__: None)


def finite(log):
    return all(torch.isfinite(torch.as_tensor(value)).all() for value in log.values())


@pytest.mark.parametrize('name', sorted(DISTILLERS))
def test_what_is_mutated_trains(name):
    init_default_scope(DISTILLERS[name][0])
    assert finite(step(name, config(name)))


@pytest.mark.slow
@settings(max_examples=500, derandomize=True, deadline=None, database=None, report_multiple_bugs=True,
          suppress_health_check=list(HealthCheck))
@given(mutations())
def test_a_mistake_is_named_or_harmless(mutation):
    name, fields, what, teacher, words = mutation
    init_default_scope(DISTILLERS[name][0])
    try:
        log = step(name, copy.deepcopy(fields), teacher)
    except (ValueError, TypeError, KeyError) as error:
        assert any(word in str(error) for word in words), f'{name}: {what}: {type(error).__name__}: {error}'
    else:
        assert finite(log), f'{name}: {what}: {log}'
