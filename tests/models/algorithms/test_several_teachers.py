"""Two teachers of one student: each is what it is alone."""
import copy

import pytest
import torch
from conftest import classification_batch, classifier, detection_batch, retinanet
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper
from mmengine.runner.checkpoint import get_state_dict, load_state_dict

from mmkd_plugin.engine.hooks.compile_student_hook import compile_student
from mmkd_plugin.models.algorithms.second_batch import WithUnlabelled

AMD = dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=dict(scale_free=True))
FITNET = dict(type='mmkd_plugin.FeatureDistiller', layers=['neck', 'backbone.layer3'], base='fitnet')
SOKD = dict(type='mmkd_plugin.SoKDDistiller', layers=['neck'], base='fitnet')
# A normalisation, a channel order and a padding of its own.
BIG, OTHER = retinanet(16), retinanet(12, mean=[90.0, 110.0, 120.0], std=[50.0, 60.0, 70.0], bgr_to_rgb=False,
                                      pad_size_divisor=64)


def distill(**fields):
    return dict(dict(type='mmkd_plugin.TeacherStudentDistill', architecture=retinanet(8),
                     teacher=dict(big=BIG, other=OTHER), allow_random_teacher=True,
                     distiller=dict(big=AMD, other=FITNET)), **fields)


def losses_of(model, batch, unlabelled=None):
    data = batch if unlabelled is None else WithUnlabelled(batch, unlabelled)
    return model(**model.data_preprocessor(copy.deepcopy(data), True), mode='loss')


def batch_of(seed, height=40):
    """Two images, of which the second is smaller, so that the batch pads it."""
    torch.manual_seed(seed)
    batch = detection_batch(random=True)
    batch['inputs'][1] = batch['inputs'][1][:, :height, :56]
    batch['data_samples'][1].set_metainfo(dict(img_shape=(height, 56), pad_shape=(height, 56)))
    return batch


@pytest.fixture
def files(build, tmp_path):
    """Weights of both teachers, whose maps are not nearly zero."""
    found = {}
    for seed, (name, config) in enumerate(dict(big=BIG, other=OTHER).items(), 1):
        model = build(config, seed=seed)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        torch.save(model.state_dict(), tmp_path / f'{name}.pth')
        found[name] = str(tmp_path / f'{name}.pth')
    return found


ONE_BY_ONE = {
    'big': dict(teacher=BIG, distiller=AMD, inherit=['neck.fpn_convs'], teacher_input_size=(128, 96)),
    'other': dict(teacher=OTHER, distiller=FITNET, inherit=['bbox_head'], teacher_precision='bfloat16')}


def test_the_losses_are_those_of_each_teacher_alone_to_the_bit(build, files):
    both = {field: {name: fields[field] for name, fields in ONE_BY_ONE.items() if field in fields}
            for field in ('teacher', 'distiller', 'inherit', 'teacher_input_size', 'teacher_precision')}
    model = build(distill(teacher_ckpt=files, allow_random_teacher=False, **both)).train()
    model.init_weights()
    start = copy.deepcopy(model.student.state_dict())
    batch, unlabelled = batch_of(0), batch_of(1, height=64)
    losses = losses_of(model, batch, unlabelled)
    expected, tasks = {}, []
    for name, fields in ONE_BY_ONE.items():
        alone = build(distill(teacher_ckpt=files[name], allow_random_teacher=False, **fields)).train()
        alone.init_weights()
        inherited = tuple(f'{part}.' for part in fields['inherit'])
        for key, value in alone.student.state_dict().items():
            assert not key.startswith(inherited) or torch.equal(value, start[key]), key
        load_state_dict(alone.student, start)
        alone.distiller.load_state_dict(model.distiller[name].state_dict())
        for key, value in losses_of(alone, batch, unlabelled).items():
            kind, _, loss = key.partition('.')
            expected[key if kind == 'student' else f'{kind}.{name}.{loss}'] = value
        tasks.append(alone.parse_losses({key: value for key, value in losses_of(alone, batch).items()
                                         if key.startswith('student')})[0])
    assert set(losses) == set(expected)
    for key, value in expected.items():
        values = zip(value, losses[key], strict=True) if isinstance(value, list) else [(value, losses[key])]
        assert all(torch.equal(one, other) and one.isfinite() for one, other in values), key
    for name in ONE_BY_ONE:
        assert sum(float(value) for key, value in losses.items() if key.startswith(f'distill.{name}.loss')) > 0
        assert any(key.startswith(f'unlabelled.{name}.loss') for key in losses)


def test_the_gradient_is_the_sum_of_those_of_both(build, files):
    gradients = {}
    for names in (['big'], ['other'], ['big', 'other']):
        model = build(distill(
            teacher={name: ONE_BY_ONE[name]['teacher'] for name in names}, calculate_student_loss=False,
            teacher_ckpt={name: files[name] for name in names},
            distiller={name: dict(AMD, amd=dict(loss_weight=100.0)) for name in names})).train()
        model.init_weights()
        sum(value for key, value in losses_of(model, batch_of(0)).items() if 'loss' in key).backward()
        gradients['+'.join(names)] = {name: parameter.grad for name, parameter in model.student.named_parameters()
                                      if parameter.grad is not None}
    assert gradients['big'].keys() == gradients['big+other'].keys()
    for name, value in gradients['big+other'].items():
        assert (gradients['big'][name] + gradients['other'][name] - value).norm() <= 1e-4 * value.norm(), name


def test_each_network_runs_once_and_no_further_than_it_is_read(build):
    model, calls = build(distill()).train(), []
    for name, network in (('student', model.student), *model.teacher.items()):
        network.backbone.register_forward_hook(lambda *_, name=name: calls.append(name))
        network.bbox_head.retina_cls.register_forward_hook(lambda *_, name=name: calls.append(f'{name} head'))
    losses_of(model, batch_of(0))
    assert sorted(set(calls)) == ['big', 'other', 'student', 'student head'] and calls.count('student') == 1
    assert calls.count('big') == calls.count('other') == 1


def test_the_teachers_are_frozen_and_nowhere_in_the_state(build):
    model = build(distill(distiller=dict(big=SOKD, other=FITNET))).train()
    assert list(model.teacher) == ['big', 'other'] == list(model.distiller)
    assert not any(module.training for network in model.teacher.values() for module in network.modules())
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    assert not {id(parameter) for parameter in model.teacher.parameters()} & {id(p) for p in model.parameters()}
    state = get_state_dict(model)
    assert not any('teacher' in key for key in state)
    assert {key.split('.')[1] for key in state if key.startswith('distiller.')} == {'big', 'other'}
    load_state_dict(model, dict(state))
    with pytest.raises(ValueError, match='(?s)missing: distiller.big.*unexpected: distiller.connectors'):
        alone = build(distill(teacher=BIG, distiller=FITNET))
        load_state_dict(model, dict(get_state_dict(alone)))
    ema = ExponentialMovingAverage(model)
    ema.update_parameters(model)
    assert ema.module.teacher is model.teacher and ema.module.distiller is not model.distiller
    for name, teacher in ema.module.teachers.items():
        assert teacher.network is model.teachers[name].network and teacher.forward is model.teachers[name].forward
        assert teacher.distiller is ema.module.distiller[name]
    assert {parameter.dtype for parameter in model.double().teacher.parameters()} == {torch.float64}


def test_all_that_is_learned_gets_a_gradient_in_each_phase(build):
    """So DistributedDataParallel misses none."""
    model = build(distill(distiller=dict(big=SOKD, other=dict(SOKD, base='at', dam=None)))).train()
    wrapper = build_optim_wrapper(model, dict(
        optimizer=dict(type='SGD', lr=1e-4), constructor='mmkd_plugin.PolicyOptimWrapperConstructor'))
    assert len(wrapper.policies) == 2
    before = [policy.alpha.detach().clone() for policy in wrapper.policies]

    def step(*batches):
        model.zero_grad()
        total, log = model.parse_losses(model(**model.data_preprocessor(
            batches if len(batches) > 1 else batches[0], True), mode='loss'))
        total.backward()
        assert not [name for name, parameter in model.named_parameters()
                    if parameter.requires_grad and parameter.grad is None]
        return log

    assert {'distill.big.loss_aug', 'distill.other.loss_aug', 'distill.other.loss_align_neck'} < set(step(batch_of(0)))
    wrapper.step()
    assert all((policy.alpha != old).any() for policy, old in zip(wrapper.policies, before))
    calls = []
    hook = model.student.backbone.register_forward_hook(lambda *_: calls.append(1))
    assert {'distill.big.loss_aug', 'distill.other.loss_aug'} < set(step(batch_of(0), batch_of(1)))
    hook.remove()
    assert len(calls) == 2  # once for each batch
    for policy in wrapper.policies:
        policy.freeze()
    step(batch_of(0))
    step(batch_of(0), batch_of(1))
    model.distillation_stopped = True
    assert 'loss_unused' in step(batch_of(0))


def test_measured_weights_and_schedules_are_each_teachers_own(build):
    auto = dict(type='mmkd_plugin.FeatureDistiller', layers=['neck'], base='pkd', loss_weight='auto')
    model = build(distill(distiller=dict(big=auto, other=auto),
                          loss_schedules={'other.loss_pkd*': dict(type='constant', end_factor=0.25)})).train()
    weights = []
    for _ in range(3):
        losses = losses_of(model, batch_of(0))
        weights.append([float(distiller.autos['pkd'].weight) for distiller in model.distiller.values()])
    assert weights[0][0] != weights[0][1] and weights[0] != [10.0, 10.0]
    plain = build(distill(distiller=dict(big=auto, other=auto))).train()
    load_state_dict(plain, get_state_dict(model))
    plain.eval(), model.eval()
    losses, expected = losses_of(model, batch_of(0)), losses_of(plain, batch_of(0))
    for key, value in expected.items():
        if key.startswith('distill.'):
            assert torch.equal(losses[key], value * 0.25 if key.startswith('distill.other') else value), key


def test_parts_of_the_student_that_either_reads_are_not_compiled(build):
    model = build(distill(distiller=dict(big=dict(AMD, layers=['backbone.layer2.0']),
                                         other=dict(AMD, layers=['backbone.layer3.1']))))
    parts = compile_student(model, 'eager')
    assert 'backbone.layer4' in parts and not {'backbone', 'backbone.layer2', 'backbone.layer3'} & set(parts)


LOGITS = dict(type='ConfigurableDistiller', distill_deliveries=dict(mix=dict(
    type='FunctionOutputs', max_keep_data=1, func_path='mmpretrain.models.utils.batch_augments.mixup.Mixup.mix')))


@pytest.mark.parametrize('fields, message', [
    (dict(teacher_ckpt=dict(bgi='a.pth')), "^teacher_ckpt: no teacher is named 'bgi'; the closest are: big"),
    (dict(teacher_ckpt='a.pth'), "^teacher_ckpt must be a dict by the names of the teachers, big, other, .*'a.pth'"),
    (dict(distiller=AMD), '^distiller must be a dict by the names of the teachers, big, other.*AMDDistiller'),
    (dict(distiller=dict(big=AMD)), '^distiller: none for other, expected one for each teacher: big, other'),
    (dict(distiller=dict(big=AMD, othre=AMD)), "^distiller: no teacher is named 'othre'; the closest are: other"),
    (dict(distiller=None), '^distiller must be a dict by the names'),
    (dict(inherit=['neck']), '^inherit must be a dict by the names of the teachers'),
    (dict(inherit=dict(big=['nekc'])), "^teacher 'big': inherit: .*no module 'nekc'.*neck"),
    (dict(teacher_precision=dict(both='float16')), "^teacher_precision: no teacher is named 'both'"),
    (dict(teacher_precision=dict(other='half')), "^teacher 'other': teacher_precision: .*'half'"),
    (dict(teacher_input_size=dict(other=(100, 100))), r"^teacher 'other': teacher_input_size: .*Give \(128, 128\)"),
    (dict(allow_random_teacher=False), "^teacher 'big': teacher_ckpt is missing"),
    (dict(teacher_ckpt=dict(other='no/such.pth')), "^teacher 'other': .*no/such.pth"),
    (dict(teacher={'big.one': BIG}), "^teacher: 'big.one' cannot be the name"),
    (dict(teacher=dict(items=BIG)), "^teacher: 'items' cannot be the name"),
    (dict(teacher=BIG, distiller=AMD, teacher_ckpt=dict(big='a.pth')), r"^teacher_ckpt: .*'big'\], but teacher is"),
    (dict(distiller=dict(big=AMD, other=dict(AMD, layers=['nekc']))), "^teacher 'other': .*no 'nekc'.*neck"),
    (dict(teacher=dict(big=BIG, other=retinanet(16, levels=3))), "^teacher 'other': .*4 feature maps.*3"),
    (dict(loss_schedules={'loss_amd*': dict(end=5)}), "no distillation loss is named 'loss_amd.*big.loss_amd_neck_0"),
    (dict(distiller=dict(big=dict(SOKD, dafa=dict(objective='agreement')), other=AMD)),
     "^distiller.big.dafa.objective: 'agreement'.*got several teachers.*Use 'similarity'"),
    (dict(teacher=dict(big=BIG, other=OTHER), distiller=dict(big=AMD, other=LOGITS)),
     '^distiller.other.distill_deliveries: .*got several teachers'),
    (dict(calculate_student_loss=False, distiller=dict(big=AMD, other=dict(FITNET, loss_weight='auto'))),
     "^teacher 'other': calculate_student_loss: loss_weight 'auto'"),
])
def test_mistakes_are_found_at_build_time(build, fields, message):
    with pytest.raises(ValueError, match=f'(?s){message}'):
        build(distill(**fields))


def test_a_classifier_learns_from_teachers_of_other_classes_and_the_teachers_alone(build):
    logits = dict(recorder='logits')
    kd = dict(type='ConfigurableDistiller', **{f'{side}_recorders': dict(logits=dict(
        type='ModuleOutputs', source='head.fc')) for side in ('student', 'teacher')},
        distill_losses=dict(loss_kd=dict(type='KLDivergence', tau=4)), loss_forward_mappings=dict(loss_kd=dict(
            preds_S=dict(logits, from_student=True), preds_T=dict(logits, from_student=False))))
    fields = dict(architecture=classifier(8), teacher=dict(same=classifier(16), more=classifier(12, num_classes=9)),
                  calculate_student_loss=False)
    features = dict(AMD, layers=['backbone.layer2'])
    model = build(distill(**dict(fields, distiller=dict(same=features, more=features))), 'mmpretrain').train()
    losses = losses_of(model, classification_batch())
    assert set(losses) == {'distill.same.loss_amd_backbone_layer2', 'distill.more.loss_amd_backbone_layer2'}
    assert not model.student.backbone.layer3[0].conv1.weight.requires_grad
    with pytest.raises(ValueError, match=r"^teacher 'more': loss_kd compares outputs of heads.*\[4\].*\[9\]"):
        build(distill(**dict(fields, distiller=dict(same=kd, more=kd))), 'mmpretrain')
