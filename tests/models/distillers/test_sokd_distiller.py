import copy

import pytest
import torch
from conftest import classification_batch, classifier, derived, detection_batch, retinanet
from mmengine.optim import build_optim_wrapper
from mmengine.runner.checkpoint import get_state_dict

from mmkd_plugin.models.connectors import ConvAdapter

BOXES, ATTENTION = dict(anchor='boxes'), dict(anchor='attention')
NECK = dict(type='mmkd_plugin.SoKDDistiller', layers=['neck'], base='fitnet', dafa=dict(), dam=BOXES)
STAGE = dict(NECK, layers=['backbone.layer3'], dam=ATTENTION)
OPTIM = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4),
             constructor='mmkd_plugin.PolicyOptimWrapperConstructor', policy=dict(type='Adam', lr=0.05))


def detect(distiller, t_channels=24, **fields):
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=retinanet(8), allow_random_teacher=True,
                teacher=retinanet(16, fpn_channels=t_channels), distiller=distiller, **fields)


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


def logits(loss, distiller):
    recorders = dict(logits=dict(type='ModuleOutputs', source='head.fc'))
    inputs = {f'preds_{side}': dict(recorder='logits', from_student=side == 'S') for side in 'ST'}
    student = dict(recorders)
    if loss['type'] == 'DKDLoss':
        inputs['gt_labels'] = dict(recorder='labels', from_student=True, data_idx=1)
        student['labels'] = dict(type='MethodInputs', source='mmpretrain.models.losses.CrossEntropyLoss.forward')
    return dict(distiller, student_recorders=student, teacher_recorders=recorders, distill_losses=dict(loss_kd=loss),
                loss_forward_mappings=dict(loss_kd=inputs))


STAGES = [f'backbone.layer{i}' for i in (1, 2, 3, 4)]
REVIEW = dict(preset='reviewkd', connector=dict(mid_channels=16))
BASES = {
    'FitNet': detect(NECK),
    'FitNet, attention': classify(STAGE),
    'FitNet, DAFA alone': detect(dict(NECK, dam=None)),
    'FitNet, DAM alone': detect(dict(NECK, dafa=None)),
    'FitNet, adapter shared': detect(dict(NECK, dam=dict(BOXES, adapter='base'))),
    'FitNet, agreement': detect(dict(NECK, dafa=dict(objective='agreement', policy_draws=2))),
    'AT': classify(dict(STAGE, base='at')),
    'AT, DAFA alone': detect(dict(NECK, base='at', dam=None)),
    'CWD': detect(dict(NECK, base='cwd'), 16),
    'PKD': detect(dict(NECK, base='pkd'), 16),
    'PKD and AMD': detect(dict(NECK, base=['pkd', 'amd-scale-free']), 16),
    'MGD': detect(dict(NECK, base='mgd')),
    'FBKD': detect(dict(NECK, base='fbkd', layers=['neck.fpn_convs.0']), 16),
    'AMD': detect(dict(NECK, base='amd-scale-free')),
    'ReviewKD': classify(dict(STAGE, layers=STAGES, base=REVIEW)),
    'ReviewKD, neck': detect(dict(NECK, base=REVIEW)),
    'ReviewKD, agreement': classify(dict(STAGE, layers=STAGES[:3], base=REVIEW, dafa=dict(
        objective='agreement', policy_draws=4))),
    'CRD': classify(dict(STAGE, layers=['backbone.layer4'], base=dict(preset='crd', loss=dict(neg_num=5, sample_n=8)))),
    'no base': detect(dict(NECK, base=None)),
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
    model = build(BASES[name], scope(BASES[name])).train()
    batch = batch_for(model)
    losses = losses_of(model, batch)
    assert set(losses) == {f'distill.{key}' for key in model.distiller.loss_names}
    for key, loss in losses.items():
        assert torch.isfinite(loss).all()
        if key.endswith('loss_aug') and 'agreement' in name:
            assert loss == 0  # the policy learns after the backward
        elif not key.endswith('neck_3'):  # one position: PKD, AMD and CWD have nothing to compare there
            assert loss != 0, key
        if not key.startswith(('distill.loss_aug', 'distill.loss_align')):
            reached = gradients(model, loss.sum(), model.student)
            assert max(value or 0 for value in reached.values()) > 0 or key.endswith('neck_3'), key
    config = dict(OPTIM) if model.distiller.dafa else dict(optimizer=OPTIM['optimizer'])
    weight, policy = model.student.backbone.conv1.weight.clone(), copy.deepcopy(model.distiller.dafa)
    model.train_step(batch, build_optim_wrapper(model, config))
    assert (model.student.backbone.conv1.weight != weight).any()
    if policy is not None:
        assert (model.distiller.dafa.alpha != policy.alpha).any()


@pytest.mark.parametrize('config', [detect(NECK), BASES['AT, DAFA alone'], BASES['ReviewKD']])
def test_the_policy_learns_from_its_loss_only_and_nothing_else_does(build, config):
    model = build(config, scope(config)).train()
    batch, policy = batch_for(model), model.distiller.dafa
    losses = losses_of(model, batch)
    loss_aug = losses.pop('distill.loss_aug')
    others = [part for part in model.children() if part is not model.distiller]
    others += [part for part in model.distiller.children() if part is not policy]
    for part in others:
        if list(part.parameters()):
            assert set(gradients(model, loss_aug, part).values()) <= {None, 0.0}
    assert set(gradients(model, sum(loss.sum() for loss in losses.values()), policy).values()) == {None}
    assert gradients(model, loss_aug, policy)['alpha'] > 0


def test_the_search_after_the_backward_reaches_the_policy_only(build):
    """The objective 'agreement': gradients of all else are those of a step without a policy's search."""
    grads = []
    for objective in ('agreement', 'similarity'):
        model = build(detect(dict(NECK, dafa=dict(objective=objective, policy_draws=2, seed=3)))).train()
        state = copy.deepcopy(model.state_dict())
        losses = model(**model.data_preprocessor(detection_batch(), True), mode='loss')
        model.parse_losses(losses)[0].backward()
        if objective == 'agreement':
            assert all(parameter.grad is None or not parameter.grad.any()
                       for parameter in model.distiller.dafa.parameters())
            after = copy.deepcopy(model.state_dict())
            model.distiller.search_policy()
            assert model.distiller.dafa.alpha.grad.any() and model.distiller._search is None
            changed = {key for key, value in model.state_dict().items() if not torch.equal(value, after[key])}
            assert changed <= {'distiller.dafa.num_searches'}, changed
        grads.append({name: parameter.grad for name, parameter in model.named_parameters() if 'dafa' not in name})
        assert state.keys() == model.state_dict().keys()
    for name, grad in grads[0].items():
        assert grad is None or torch.equal(grad, grads[1][name]), name


def test_the_recorded_gradient_of_the_task_is_that_of_the_task_alone(build):
    model = build(detect(dict(NECK, dafa=dict(objective='agreement')))).train()
    seen = {}
    model.student.neck.register_forward_hook(lambda _, __, out: seen.setdefault('maps', out))
    losses = model(**model.data_preprocessor(detection_batch(), True), mode='loss')
    task = sum(sum(x.mean() for x in value) if isinstance(value, list) else value.mean()
               for key, value in losses.items() if key.startswith('student.') and 'loss' in key)
    expected = torch.autograd.grad(task, seen['maps'], retain_graph=True)
    search = model.distiller._search
    search.whole[:], search.distilled[:] = [None] * 4, [None] * 4
    model.parse_losses(losses)[0].backward()
    for whole, distilled, gradient in zip(search.whole, search.distilled, expected):
        assert distilled.any()
        torch.testing.assert_close(whole - distilled, gradient, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize('case', derived())
def test_it_is_measured_where_the_network_goes_on(build, case):
    """Maps of tokens and cropped maps are beside the path of the task."""
    student, teacher, layers, size, derive = derived()[case]
    model = build(dict(classify(dict(STAGE, layers=layers, dam=None, dafa=dict(objective='agreement', policy_draws=2))),
                       architecture=student, teacher=teacher), 'mmpretrain').train()
    seen = []
    name = model.distiller._written['student_recorders'][model.distiller.layers[0]]['source']
    model.student.get_submodule(name).register_forward_hook(lambda _, __, output: seen.append(output))
    losses = model(**model.data_preprocessor(classification_batch(size), True), mode='loss')
    expected, = torch.autograd.grad(losses['student.loss'], seen, retain_graph=True)
    assert derive(expected).any()
    search = model.distiller._search
    search.whole[:], search.distilled[:] = [None], [None]
    model.parse_losses(losses)[0].backward()
    assert search.distilled[0].any()
    torch.testing.assert_close(search.derived[0](search.whole[0]) - search.distilled[0], derive(expected), rtol=1e-3,
                               atol=1e-7)
    model.distiller.search_policy()
    assert model.distiller.dafa.alpha.grad.any() and model.distiller.dafa.magnitude.grad.any()


def test_without_its_parts_it_is_the_base(build):
    states, batch = [], detection_batch()
    for kind, parts in (('FeatureDistiller', {}), ('SoKDDistiller', dict(dafa=None, dam=None))):
        model = build(detect(dict(type=f'mmkd_plugin.{kind}', layers=['neck'], base='fitnet', **parts)))
        model.init_weights()
        optimizer = build_optim_wrapper(model, dict(optimizer=OPTIM['optimizer']))
        for _ in range(3):
            model.train().train_step(copy.deepcopy(batch), optimizer)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize('parts', [{}, dict(dafa=None), dict(dam=dict(BOXES, adapter='base'))])
def test_each_adapter_runs_once_a_step(build, parts):
    model = build(detect(dict(NECK, **parts))).train()
    runs = []
    model.distiller.connectors['fitnet_connector_neck'].register_forward_pre_hook(lambda *_: runs.append('base'))
    if 'adapter' not in model.distiller.dam:
        model.distiller.dams['neck'].adapter.register_forward_pre_hook(lambda *_: runs.append('dam'))
    losses_of(model, detection_batch())
    assert sorted(runs) == (['base'] if 'adapter' in model.distiller.dam else ['base', 'dam'])


def test_the_student_starts_as_it_would_alone(build):
    alone = build(retinanet(8))
    alone.init_weights()
    model = build(detect(NECK))
    model.init_weights()
    assert all(torch.equal(value, model.student.state_dict()[key]) for key, value in alone.state_dict().items())


def with_draw(dafa, monkeypatch, applied):
    """Lets the student's draws apply something, or nothing."""
    monkeypatch.setattr(dafa, 'draw', lambda draw=dafa.draw: next(
        d for d in iter(draw, None) if bool(d.row) == applied))


@pytest.mark.parametrize('applied', [True, False])
def test_base_and_dam_see_the_refined_teacher(build, monkeypatch, applied):
    model = build(detect(dict(NECK, dafa=dict(operations=['Noise', 'ChannelDrop'])))).train()
    distiller, calls = model.distiller, {}
    with_draw(distiller.dafa, monkeypatch, applied)
    for name, module in dict(dafa=distiller.dafa, dam=distiller.dams['neck'], head=distiller.dams['neck'].head,
                             base=distiller.distill_losses['loss_fitnet_neck_1']).items():
        module.register_forward_hook(lambda _, args, kwargs, out, name=name: calls.setdefault(name, []).append(
            (args, kwargs, out)), with_kwargs=True)
    losses_of(model, detection_batch())
    plain, refined = calls['dafa'][0][0][0], calls['dafa'][0][2]
    assert all((a is b) != applied for a, b in zip(plain, refined))
    assert calls['base'][0][1]['t_feature'] is refined[1]
    _, new, t, boxes, shape = calls['dam'][0][0]
    assert all(a is b for a, b in zip([*new, *t], [*refined, *plain]))
    assert [len(each) for each in boxes] == [2, 1] and shape == (64, 64)
    assert len(calls['head'][0][0][0]) == (3 if applied else 2)  # a teacher that nothing was done to is not read twice


def test_all_layers_share_one_draw(build):
    model = build(detect(dict(NECK, layers=['backbone.layer3', 'neck']))).train()
    losses = losses_of(model, detection_batch())
    assert model.distiller.dafa.num_draws == 1
    assert {'distill.loss_dam_area_neck', 'distill.loss_dam_area_backbone_layer3'} < set(losses)


def test_phi_is_dams_adapter_then_the_bases_connector_then_its_own(build):
    model = build(detect(NECK))
    assert isinstance(model.distiller.dams['neck'].adapter, ConvAdapter) and not model.distiller.aligners
    model = build(BASES['FitNet, DAFA alone'])
    assert not model.distiller.aligners and list(model.distiller.connectors) == ['fitnet_connector_neck']
    for base in ('at', 'mgd', 'amd-scale-free', None):
        model = build(detect(dict(NECK, base=base, dam=None)))
        assert isinstance(model.distiller.aligners['neck'], ConvAdapter), base
    model = build(detect(dict(NECK, dam=dict(BOXES, adapter=dict(signed=False)))))
    assert not model.distiller.dams['neck'].adapter.signed


def test_an_adapter_that_nothing_else_trains_is_aligned_until_the_search_ends(build):
    model = build(BASES['AT, DAFA alone']).train()
    losses = losses_of(model, detection_batch())
    align = losses['distill.loss_align_neck']
    assert set(gradients(model, align, model.student).values()) == {None}
    assert all(value > 0 for value in gradients(model, align, model.distiller.aligners).values())
    model.distiller.dafa.freeze()
    align = losses_of(model, detection_batch())['distill.loss_align_neck']
    assert align == 0 and set(gradients(model, align, model.distiller.aligners).values()) == {0.0}


def test_copies_and_states_between_steps(build):
    model = build(detect(NECK))
    wrapper = build_optim_wrapper(model, OPTIM)
    for _ in range(2):
        model.train().train_step(detection_batch(), wrapper)
    copy.deepcopy(model)  # as EMA does
    again = build(detect(NECK), seed=3)
    state = get_state_dict(model)
    assert {'distiller.dafa.alpha', 'distiller.dafa.num_draws', 'distiller.dafa.phase'} < set(state)
    again.load_state_dict(state)
    again.teacher.load_state_dict(model.teacher.state_dict())
    batch, values = detection_batch(), []
    for each in (model, again):
        values.append({key: float(loss) for key, loss in losses_of(each.train(), batch).items()})
    assert values[0] == values[1]
    distiller = model.distiller
    assert distiller._outputs is None and not distiller._given and distiller._image is None


def test_schedules_know_all_losses(build):
    model = build(detect(NECK, loss_schedules={'loss_dam_*': dict(start_factor=0.0, end=10)}))
    losses = losses_of(model, detection_batch())
    assert losses['distill.loss_dam_area'] == 0 and losses['distill.loss_fitnet_neck_0'] > 0


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
        losses = model(**model.data_preprocessor(copy.deepcopy(data), True), mode='loss')
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


def test_an_objective_that_does_not_use_a_second_batch_is_refused(build):
    model = build(detect(dict(NECK, dafa=dict(objective='agreement')))).train()
    with pytest.raises(ValueError, match="'agreement' searches on the batch of the step, but the train loop gives"):
        model.train_step([detection_batch(), detection_batch()], build_optim_wrapper(model, OPTIM))


def test_the_students_optimizer_may_not_train_the_policy(build):
    model = build(detect(NECK))
    with pytest.raises(ValueError, match='optim_wrapper.constructor: the policy of dafa would be trained by the'):
        build_optim_wrapper(model, dict(optimizer=OPTIM['optimizer']))


def test_deliveries_do_not_go_with_a_second_batch(build):
    delivery = dict(type='MethodOutputs', max_keep_data=10, method_path='mmdet.models.RetinaHead.get_targets')
    model = build(detect(dict(NECK, distill_deliveries=dict(targets=delivery))))
    with pytest.raises(ValueError, match='distill_deliveries belong to the first'):
        model.train_step((detection_batch(), detection_batch()), build_optim_wrapper(model, OPTIM))


@pytest.mark.parametrize('config, message', [
    (classify(dict(STAGE, dam=dict())), "dam.anchor: 'boxes'.*ImageClassifier.*attention"),
    (detect(dict(NECK, dam=dict(channels=99))), 'dam.channels: is set from the features'),
    (detect(dict(NECK, base='pkd', dam=dict(adapter='base')), 16), "dam.adapter: 'base' shares"),
    (detect(dict(NECK, layers=['backbone'])), 'Give the stages as separate layers'),
    (detect(dict(NECK, dafa=dict(sub_policy_size=20))), 'sub_policy_size'),
    (detect(dict(NECK, dafa=3)), 'dafa must be a dict, got 3'),
    (classify(dict(STAGE, base=dict(preset='crd', loss=dict(sample_n=8)), dafa=dict(objective='agreement'), dam=None)),
     "dafa.objective: 'agreement' computes the losses again .*base 'crd'"),
    (detect(dict(NECK, base=['pkd', 'crosskd'], dafa=dict(objective='agreement')), 16),
     "dafa.objective: 'agreement' counts .* base 'crosskd' beside the layers"),
    (classify(logits(dict(type='KLDivergence'), dict(STAGE, dafa=dict(objective='agreement')))),
     "dafa.objective: 'agreement' counts .* got distill_losses beside the layers"),
    (detect(dict(NECK, dafa=dict(opertions=['Rotate']))), "distiller: .*'opertions'"),
    (detect(dict(NECK, dam=dict(num_area=4))), "distiller: .*'num_area'"),
    (detect(dict(NECK, loss_wieght=2)), "distiller: .*'loss_wieght'"),
    (detect(dict(NECK, dam=dict(anchor='bboxes'))), 'anchor.*boxes'),
    (detect(dict(NECK, connect=False)), 'connect, refine and adapter were arguments before version 0.2'),
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
