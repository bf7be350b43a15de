import copy

import pytest
import torch
from conftest import classification_batch, classifier, detection_batch, retinanet
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner.checkpoint import get_state_dict
from mmrazor.models.distillers import ConfigurableDistiller

from mmkd_plugin.models.connectors import ConvAdapter

L2 = dict(type='L2Loss', normalize=False, div_element=True)
BOXES, ATTENTION = dict(anchor='boxes'), dict(anchor='attention')
NECK = dict(type='mmkd_plugin.SoKDDistiller', layers=['neck'], base=L2, dafa=dict(), dam=BOXES)
STAGE = dict(NECK, layers=['backbone.layer3'], dam=ATTENTION)
OPTIM = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4),
             constructor='mmkd_plugin.PolicyOptimWrapperConstructor', policy=dict(type='Adam', lr=0.05))


def detect(distiller, **fields):
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=retinanet(8), allow_random_teacher=True,
                teacher=retinanet(16, fpn_channels=24), distiller=distiller, **fields)


def classify(distiller, **fields):
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=classifier(8), allow_random_teacher=True,
                teacher=classifier(16), distiller=distiller, **fields)


def losses_of(model, batch):
    losses = model(**model.data_preprocessor(copy.deepcopy(batch), True), mode='loss')
    return {key: value for key, value in losses.items() if 'distill' in key}


def gradients(model, loss, part):
    """The largest absolute gradient that ``loss`` sends to each parameter of ``part``; None: none at all."""
    names, parameters = zip(*[(n, p) for n, p in part.named_parameters() if p.requires_grad])
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name: None if grad is None else float(grad.abs().max()) for name, grad in zip(names, grads)}


def full(source, loss, names, connectors=(), **fields):
    """One loss wired as in MMRazor, with a connector each for student and teacher, or for the student."""
    recorders = dict(feat=dict(type='ModuleOutputs', source=source))
    connectors = dict(zip(('s', 't'), connectors))
    mapping = {name: dict(recorder='feat', from_student=side == 's') for name, side in zip(names, 'st')}
    for entry, side in zip(mapping.values(), connectors):
        entry['connector'] = side
    return dict(type='mmkd_plugin.SoKDDistiller', student_recorders=recorders, teacher_recorders=recorders,
                connectors=connectors, distill_losses=dict(loss_own=loss),
                loss_forward_mappings=dict(loss_own=mapping), refine=['feat'], dafa=dict(), **fields)


def logits(loss, distiller):
    recorders = dict(logits=dict(type='ModuleOutputs', source='head.fc'))
    inputs = {f'preds_{side}': dict(recorder='logits', from_student=side == 'S') for side in 'ST'}
    student = dict(recorders)
    if loss['type'] == 'DKDLoss':
        inputs['gt_labels'] = dict(recorder='labels', from_student=True, data_idx=1)
        student['labels'] = dict(type='MethodInputs', source='mmpretrain.models.losses.CrossEntropyLoss.forward')
    return dict(distiller, student_recorders=student, teacher_recorders=recorders, distill_losses=dict(loss_kd=loss),
                loss_forward_mappings=dict(loss_kd=inputs))


def crd():
    pool = dict(type='TorchFunctionalConnector', function_name='adaptive_avg_pool2d', func_args=dict(output_size=1))
    connectors = [[pool, dict(type='CRDConnector', dim_in=channels, dim_out=16)] for channels in (64, 128)]
    distiller = full('backbone.layer4', dict(type='CRDLoss', neg_num=5, sample_n=8, dim_out=16),
                     ('s_feats', 't_feats'), connectors, dam=ATTENTION)
    distiller['student_recorders'] = dict(distiller['student_recorders'], data_samples=dict(
        type='MethodInputs', source='mmpretrain.models.heads.cls_head.ClsHead.loss'))
    distiller['loss_forward_mappings']['loss_own']['data_samples'] = dict(
        recorder='data_samples', from_student=True, data_idx=1)
    return distiller


STAGES = [f'backbone.layer{i}' for i in (1, 2, 3, 4)]
REVIEW = dict(type='mmkd_plugin.ReviewKDLoss')
FBKD = [dict(type=f'FBKD{side}Connector', in_channels=24, mode='dot_product', sub_sample=True)
        for side in ('Student', 'Teacher')]
BASES = {
    'FitNet': detect(NECK),
    'FitNet, attention': classify(STAGE),
    'FitNet, DAFA alone': detect(dict(NECK, dam=None)),
    'FitNet, DAM alone': detect(dict(NECK, dafa=None)),
    'AT': classify(dict(STAGE, base=dict(type='ATLoss', loss_weight=1e3), connect=False)),
    'AT, DAFA alone': detect(dict(NECK, base=dict(type='ATLoss', loss_weight=1e3), connect=False, dam=None)),
    'CWD': detect(dict(NECK, base=dict(type='ChannelWiseDivergence', loss_weight=10.0))),
    'PKD': detect(dict(NECK, base=dict(type='PKDLoss'), layers=['backbone.layer3', 'backbone.layer4'])),
    'MGD': detect(full('neck.fpn_convs.0', dict(type='MGDLoss'), ('preds_S', 'preds_T'), [
        dict(type='MGDConnector', student_channels=16, teacher_channels=24)], dam=BOXES)),
    'FBKD': dict(detect(full('neck.fpn_convs.0', dict(type='FBKDLoss'), ('s_input', 't_input'), FBKD, dam=BOXES)),
                 architecture=retinanet(8, fpn_channels=24)),
    'AMD': detect(dict(NECK, base=dict(type='mmkd_plugin.AMDLoss', scale_free=True), connect=False)),
    'ReviewKD': classify(dict(STAGE, layers=STAGES, base=REVIEW, adapter=dict(mid_channels=16))),
    'ReviewKD, neck': detect(dict(NECK, base=REVIEW, adapter=dict(mid_channels=16))),
    'CRD': classify(crd()),
    'KD beside': classify(logits(dict(type='KLDivergence', tau=4), STAGE)),
    'DKD beside': classify(logits(dict(type='DKDLoss', beta=0.5), STAGE)),
}


def batch_for(model):
    if hasattr(model.student, 'bbox_head'):
        return detection_batch()
    batch = classification_batch()
    for i, sample in enumerate(batch['data_samples']):
        sample.set_field(torch.tensor(i), 'sample_idx')
    return batch


def scope(config):
    return 'mmdet' if 'bbox_head' in config['architecture'] else 'mmpretrain'


@pytest.mark.parametrize('name', BASES)
def test_a_step_on_each_base(build, name):
    model = build(BASES[name], scope(BASES[name]))
    batch = batch_for(model)
    losses = losses_of(model, batch)
    assert [key.removeprefix('distill.') for key in losses] and set(losses) == {
        f'distill.{key}' for key in model.distiller.loss_names}
    for key, loss in losses.items():
        assert torch.isfinite(loss).all()
        if not key.endswith('neck_3'):  # one position: PKD, AMD and CWD find nothing there
            assert loss.sum() > 0, key
        if 'base' in key or 'own' in key or 'dam' in key or 'kd' in key:
            reached = gradients(model, loss.sum(), model.student)
            assert max(value or 0 for value in reached.values()) > 0 or key.endswith('neck_3'), key
    config = dict(OPTIM) if model.distiller.dafa else dict(optimizer=OPTIM['optimizer'])
    before = copy.deepcopy(model.student.state_dict())
    model.train().train_step(batch, build_optim_wrapper(model, config))
    assert any((before[key] != value).any() for key, value in model.student.state_dict().items())


@pytest.mark.parametrize('config', [detect(NECK), detect(BASES['AT, DAFA alone']['distiller']), BASES['ReviewKD']])
def test_the_policy_learns_from_its_loss_only_and_nothing_else_does(build, config):
    model = build(config, scope(config))
    batch, policy = batch_for(model), model.distiller.dafa
    for _ in range(3):  # the first step only starts the running mean; a batch may get no operation
        losses = losses_of(model, batch)
    loss_aug = losses.pop('distill.loss_aug')
    others = [part for part in model.children() if part is not model.distiller]
    others += [part for part in model.distiller.children() if part is not policy]
    for part in others:
        if list(part.parameters()):
            assert set(gradients(model, loss_aug, part).values()) <= {None, 0.0}
    assert set(gradients(model, sum(loss.sum() for loss in losses.values()), policy).values()) == {None}
    assert gradients(model, loss_aug, policy)['alpha'] > 0


def hand_written(connect):
    recorders = dict(feat=dict(type='ModuleOutputs', source='neck'))
    levels = range(4)
    student = {i: dict(recorder='feat', from_student=True, connector='adapter', connector_idx=i) if connect else
               dict(recorder='feat', from_student=True, data_idx=i) for i in levels}
    loss = L2 if connect else dict(type='mmkd_plugin.AMDLoss', scale_free=True)
    return dict(
        type='ConfigurableDistiller', student_recorders=recorders, teacher_recorders=recorders,
        connectors=dict(adapter=dict(type='mmkd_plugin.ConvAdapter', in_channels=16, out_channels=24)),
        distill_losses={f'loss_base_neck_{i}': loss for i in levels},
        loss_forward_mappings={f'loss_base_neck_{i}': dict(
            s_feature=student[i], t_feature=dict(recorder='feat', from_student=False, data_idx=i)) for i in levels})


def once(connector):
    """MMRazor runs a connector for each level's loss, whose gradients then differ by the order of their sum."""
    forward, last = connector.forward, []

    def keep(maps):
        if not last or last[0] is not maps[0]:
            last[:] = [maps[0], forward(maps)]
        return last[1]
    connector.forward = keep


@pytest.mark.parametrize('connect', [True, False])
def test_without_its_blocks_it_is_the_base_to_the_bit(build, connect):
    amd = dict(scale_free=True)
    short = dict(type='mmkd_plugin.SoKDDistiller', layers=['neck'], connect=connect,
                 base=L2 if connect else dict(type='mmkd_plugin.AMDLoss', **amd))
    distillers = [short, hand_written(connect)]
    if not connect:
        distillers.append(dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=amd))
    states, batch = [], detection_batch()
    for distiller in distillers:
        model = build(detect(distiller))
        model.init_weights()
        for connector in model.distiller.connectors.values():
            once(connector)
        optimizer = build_optim_wrapper(model, dict(optimizer=OPTIM['optimizer']))
        for _ in range(3):
            model.train().train_step(copy.deepcopy(batch), optimizer)
        states.append([value for key, value in model.state_dict().items() if connect or 'connectors' not in key])
    for state in states[1:]:
        assert len(state) == len(states[0]) and all(map(torch.equal, states[0], state))


def test_the_written_config_is_the_base(build):
    model = build(detect(dict(NECK, dafa=None, dam=None)))
    written = Config.fromstring(model.distiller.written_config(), '.py').distiller
    again = build(detect(written))
    assert type(again.distiller) is ConfigurableDistiller
    batch = detection_batch()
    first, second = losses_of(model, batch), losses_of(again, batch)
    assert first == second and len(first) == 4


@pytest.mark.parametrize('parts', [{}, dict(dafa=None), dict(dam=None), dict(dafa=None, dam=None)])
def test_the_adapter_runs_once_a_step(build, parts):
    model = build(detect(dict(NECK, **parts))).train()
    ran = []
    model.distiller.connectors['phi_neck'].register_forward_pre_hook(lambda *_: ran.append(1))
    losses_of(model, detection_batch())
    assert ran == [1]


def test_the_student_starts_as_it_would_alone(build):
    alone = build(retinanet(8))
    alone.init_weights()
    model = build(detect(NECK))
    model.init_weights()
    assert all(torch.equal(value, model.student.state_dict()[key]) for key, value in alone.state_dict().items())


def test_the_base_sees_the_refined_teacher_and_dam_both(build, monkeypatch):
    model = build(detect(NECK))
    calls = {}
    distiller = model.distiller
    monkeypatch.setattr(distiller.dafa, 'draw', lambda draw=distiller.dafa.draw: next(
        d for d in iter(draw, None) if distiller.dafa.names[d.index].endswith('Noise') and d.applied[1]))
    for name, module in {'dafa': distiller.dafa, 'dam': distiller.dams['neck'], 'phi': distiller.connectors['phi_neck'],
                         'base': distiller.distill_losses['loss_base_neck_1']}.items():
        module.register_forward_hook(lambda _, args, kwargs, out, name=name: calls.setdefault(name, []).append(
            (args, kwargs, out)), with_kwargs=True)
    losses_of(model, detection_batch())
    assert {name: len(given) for name, given in calls.items()} == dict(dafa=1, dam=1, phi=1, base=1)
    plain, refined = calls['dafa'][0][0][0], calls['dafa'][0][2]
    assert all((a != b).any() for a, b in zip(plain[:2], refined))
    base = calls['base'][0][1]
    assert base['t_feature'] is refined[1] and base['s_feature'] is calls['phi'][0][2][1]
    s, new, t, boxes, shape = calls['dam'][0][0]
    assert all(a is b for a, b in zip([*s, *new, *t], [*calls['phi'][0][2], *refined, *plain]))
    assert [len(each) for each in boxes] == [2, 1] and shape == (64, 64)


def test_all_pairs_share_one_draw(build):
    model = build(detect(dict(NECK, layers=['backbone.layer3', 'neck'])))
    losses = losses_of(model, detection_batch())
    assert model.distiller.dafa.num_draws == 1
    assert {'distill.loss_dam_area_neck', 'distill.loss_dam_area_backbone_layer3'} < set(losses)


def phi(model):
    return [entry['connector'] for feature in model.distiller.features for entry in feature.phi]


def test_phi_is_the_connector_of_the_base_where_it_has_one(build):
    assert phi(build(BASES['MGD'])) == ['s']
    assert phi(build(BASES['FBKD'])) == ['phi_feat']  # its connector makes no feature map
    assert phi(build(BASES['CRD'], 'mmpretrain')) == ['phi_feat']
    assert phi(build(BASES['ReviewKD'], 'mmpretrain')) == ['phi'] * 4
    assert phi(build(BASES['FitNet'])) == ['phi_neck'] * 4
    model = build(detect(dict(hand_written(True), type='mmkd_plugin.SoKDDistiller', refine=['feat'], dafa=dict())))
    assert phi(model) == ['adapter'] * 4 and list(model.distiller.connectors) == ['adapter']


def test_an_adapter_that_nobody_trains_is_aligned_until_the_search_ends(build):
    model = build(BASES['AT, DAFA alone'])
    losses = losses_of(model, detection_batch())
    align = losses['distill.loss_align_neck']
    assert set(gradients(model, align, model.student).values()) == {None}
    assert all(value > 0 for value in gradients(model, align, model.distiller.connectors).values())
    model.distiller.dafa.freeze()
    align = losses_of(model, detection_batch())['distill.loss_align_neck']
    assert align == 0 and set(gradients(model, align, model.distiller.connectors).values()) == {0.0}
    assert 'distill.loss_align_neck' not in losses_of(build(BASES['FitNet']), detection_batch())


def test_the_last_relu_is_left_out_where_the_teacher_is_signed(build):
    teachers = build(retinanet(16, fpn_channels=24), seed=7), build(classifier(16), 'mmpretrain', seed=7)
    for teacher in teachers:  # as training leaves them: with biases, which a blank image shows
        for name, parameter in teacher.named_parameters():
            if name.endswith('bias'):
                torch.nn.init.normal_(parameter)
    for i, (distiller, name, where) in enumerate([(NECK, 'neck', 'mmdet'), (STAGE, 'backbone_layer3', 'mmpretrain')]):
        student = (retinanet if where == 'mmdet' else classifier)(8)
        model = build(dict(detect(distiller), architecture=student, teacher=teachers[i]), where)
        assert model.distiller.connectors[f'phi_{name}'].signed == (name == 'neck')
    model = build(detect(dict(NECK, adapter=dict(signed=False))))
    assert isinstance(model.distiller.connectors['phi_neck'], ConvAdapter)
    assert not model.distiller.connectors['phi_neck'].signed


def test_copies_and_states_between_steps(build):
    model = build(detect(NECK))
    wrapper = build_optim_wrapper(model, OPTIM)
    for _ in range(2):
        model.train().train_step(detection_batch(), wrapper)
    copy.deepcopy(model)  # as EMA does
    again = build(detect(NECK), seed=3)
    state = get_state_dict(model)
    assert {'distiller.dafa.alpha', 'distiller.dafa.num_draws', 'distiller.dafa.is_frozen'} < set(state)
    again.load_state_dict(state)
    again.teacher.load_state_dict(model.teacher.state_dict())
    batch, values = detection_batch(), []
    for each in (model, again):
        values.append({key: float(loss) for key, loss in losses_of(each.train(), batch).items()})
    assert values[0] == values[1]
    distiller = model.distiller
    assert distiller._outputs is None and not distiller._refined and distiller._image is None


def test_schedules_know_all_losses(build):
    model = build(detect(NECK, loss_schedules={'loss_dam_*': dict(start_factor=0.0, end=10)}))
    losses = losses_of(model, detection_batch())
    assert losses['distill.loss_dam_area'] == 0 and losses['distill.loss_base_neck_0'] > 0


def test_a_stopped_distillation_leaves_zeros(build):
    model = build(detect(NECK))
    model.distillation_stopped = True
    losses = model(**model.data_preprocessor(detection_batch(), True), mode='loss')
    assert not any('distill' in key for key in losses) and losses['loss_unused'] == 0
    assert set(gradients(model, losses['loss_unused'], model.distiller).values()) == {0.0}


def test_a_held_out_batch_teaches_the_policy_only(build):
    batch, others = detection_batch(), [detection_batch(), detection_batch()]
    others[1]['inputs'] = [255 - image for image in others[1]['inputs']]
    grads = []
    for other in (*others, None):
        model = build(detect(NECK)).train()
        data = copy.deepcopy((batch, other) if other else batch)
        for i in range(3):
            losses = model(**model.data_preprocessor(copy.deepcopy(data), True), mode='loss')
            if i == 0:  # no other loss has entered the running mean
                assert model.distiller.dafa.mean_loss == losses['distill.loss_aug']
        total, log = model.parse_losses(losses)
        assert log['distill.loss_aug'] > 0
        total.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert (grads[0]['distiller.dafa.alpha'] != grads[1]['distiller.dafa.alpha']).any()
    for name, grad in grads[0].items():
        assert grad is None or 'dafa' in name or torch.equal(grad, grads[1][name]), name


def test_a_held_out_batch_costs_nothing_once_frozen(build):
    model = build(detect(NECK)).train()
    model.distiller.dafa.freeze()
    ran = []
    model.teacher.backbone.register_forward_pre_hook(lambda *_: ran.append(1))
    log = model.train_step((detection_batch(), detection_batch()), build_optim_wrapper(model, OPTIM))
    assert ran == [1] and log['distill.loss_aug'] == 0


def test_a_held_out_batch_leaves_no_trace_in_statistics(build):
    model, twin = build(detect(NECK)).train(), build(detect(NECK)).train()
    batch, other = detection_batch(), detection_batch()
    data = model.data_preprocessor((copy.deepcopy(batch), copy.deepcopy(other)), True)
    model(**data, mode='loss')
    twin(**twin.data_preprocessor(copy.deepcopy(batch), True), mode='loss')
    for (key, value), (_, expected) in zip(model.state_dict().items(), twin.state_dict().items()):
        assert torch.equal(value, expected) or 'dafa' in key, key


def test_a_second_batch_without_a_policy_is_refused(build):
    model = build(detect(dict(NECK, dafa=None)))
    with pytest.raises(ValueError, match='second batch.*SoKDDistiller'):
        model.train_step((detection_batch(), detection_batch()), build_optim_wrapper(model, dict(
            optimizer=OPTIM['optimizer'])))


def test_deliveries_do_not_go_with_a_second_batch(build):
    delivery = dict(type='MethodOutputs', max_keep_data=10, method_path='mmdet.models.RetinaHead.get_targets')
    model = build(detect(dict(NECK, distill_deliveries=dict(targets=delivery))))
    with pytest.raises(ValueError, match='distill_deliveries hand on'):
        model.train_step((detection_batch(), detection_batch()), build_optim_wrapper(model, OPTIM))


@pytest.mark.parametrize('config, message', [
    (classify(dict(STAGE, dam=dict())), "anchor='boxes'.*ImageClassifier.*attention"),
    (detect(dict(NECK, adapter=dict(in_channels=99))), 'adapter.in_channels is 99, but the features have 16'),
    (detect(dict(NECK, dam=dict(channels=99))), 'dam.channels is 99, but the features have 24'),
    (detect(dict(NECK, layers=[('backbone.layer2', 'backbone.layer3')])), 'strides differ.*28.*14'),
    (detect(dict(NECK, layers=None)), 'base is a loss for each of layers'),
    (detect(dict(NECK, layers=None, base=None)), 'name them in layers or refine'),
    (detect(dict(NECK, refine=['nekc'])), "refine: student_recorders has no 'nekc'.*neck"),
    (detect(dict(NECK, refine='neck')), 'refine must be a list'),
    (detect(dict(NECK, refine=['neck'])), "'neck' of the teacher is refined twice"),
    (detect(dict(NECK, layers=['backbone'])), 'name the stages as layers of their own'),
    (detect(dict(NECK, base=dict(type='CRDLoss', sample_n=8))), 'CRDLoss takes s_feats, t_feats, data_samples'),
    (detect(dict(NECK, dafa=dict(sub_policy_size=20))), 'sub_policy_size'),
    (detect(dict(NECK, dam=dict(anchor='bboxes'))), 'anchor.*boxes'),
])
def test_mistakes_are_found_at_build_time(build, config, message):
    with pytest.raises(ValueError, match=f'(?s){message}'):
        build(config, scope(config))


def test_losses_in_half_precision(build):
    model = build(detect(NECK)).train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = losses_of(model, detection_batch())
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses['distill.loss_aug'].dtype == losses['distill.loss_dam_detect'].dtype == torch.float32


def test_works_in_mmrazors_own_algorithm(build):
    model = build(dict(type='mmrazor.SingleTeacherDistill', architecture=classifier(8), teacher=classifier(16),
                       distiller=STAGE, _scope_='mmrazor'))
    assert losses_of(model, classification_batch())['distill.loss_aug'] > 0
