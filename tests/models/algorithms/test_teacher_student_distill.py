import copy
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import classification_batch, classifier, detection_batch, retinanet
from mmengine.model import BaseModel, ExponentialMovingAverage
from mmengine.optim import build_optim_wrapper
from mmengine.runner.checkpoint import get_state_dict, load_state_dict

AMD = dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=dict(scale_free=True))
LOGITS = dict(
    type='ConfigurableDistiller',
    student_recorders=dict(logits=dict(type='ModuleOutputs', source='head.fc')),
    teacher_recorders=dict(logits=dict(type='ModuleOutputs', source='head.fc')),
    distill_losses=dict(loss_kd=dict(type='KLDivergence', tau=4)),
    loss_forward_mappings=dict(loss_kd=dict(preds_S=dict(recorder='logits', from_student=True),
                                            preds_T=dict(recorder='logits', from_student=False))))


def distill(**fields):
    return dict(dict(type='mmkd_plugin.TeacherStudentDistill', architecture=retinanet(8), teacher=retinanet(16),
                     allow_random_teacher=True, distiller=AMD), **fields)


def grey_classifier():
    model = classifier(8)
    model['backbone']['in_channels'] = 1
    model['data_preprocessor'].update(mean=[120.], std=[60.], to_rgb=False)
    return model


def coarse_classifier():
    model = classifier(8)
    model['backbone']['strides'] = (1, 2, 4, 1)
    return model


@pytest.fixture
def teacher_file(build, tmp_path):
    model = build(retinanet(16), seed=7)
    path = tmp_path / 'teacher.pth'
    torch.save(model.state_dict(), path)
    return path, model


def losses_of(model, batch):
    return model(**model.data_preprocessor(batch, True), mode='loss')


def test_one_step_trains_the_student_on_task_and_distillation(build):
    model = build(distill())
    optimizer = build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=0.01)))
    before = copy.deepcopy(dict(model.named_parameters()))
    log = model.train_step(detection_batch(), optimizer)
    assert {f'distill.loss_amd_neck_{level}' for level in range(4)} < set(log)
    assert all(log[f'distill.loss_amd_neck_{level}'] > 0 for level in range(3))  # the fourth has one position
    assert any((before[key] != value).any() for key, value in model.named_parameters())


def test_the_losses_are_summed_as_in_mmengine(build):
    model = build(distill(distiller=AMD))
    losses = dict(loss_a=torch.rand(()), loss_b=[torch.rand(()), torch.rand(2, 3)], acc=torch.rand(4))
    for values in losses.values():
        for value in values if isinstance(values, list) else [values]:
            value.requires_grad_()
    total, log = model.parse_losses(losses)
    expected, expected_log = BaseModel.parse_losses(model, losses)
    assert list(log) == list(expected_log) and log['loss'] is total
    torch.testing.assert_close(dict(log), dict(expected_log))
    inputs = [losses['loss_a'], *losses['loss_b']]
    torch.testing.assert_close(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs))
    with pytest.raises(TypeError, match='loss_c is not a tensor'):
        model.parse_losses(dict(losses, loss_c=1.))


def test_the_distillation_loss_reaches_every_student_weight_before_it(build):
    model = build(distill()).train()
    losses = losses_of(model, detection_batch())
    sum(value for key, value in losses.items() if key.startswith('distill')).backward()
    for name, parameter in model.student.named_parameters():
        touched = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert touched == (not name.startswith('bbox_head') and parameter.requires_grad
                           and not re.match(r'neck\.fpn_convs\.3', name)), name


def test_the_teacher_is_in_eval_without_grad_and_nowhere_in_the_state(build):
    model = build(distill()).train()
    assert not any(module.training for module in model.teacher.modules())
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    teacher = copy.deepcopy(model.teacher.state_dict())
    losses_of(model, detection_batch())
    assert all(torch.equal(value, teacher[key]) for key, value in model.teacher.state_dict().items())
    assert not any('teacher' in key for key in get_state_dict(model))
    ids = {id(parameter) for parameter in model.teacher.parameters()}
    assert not ids & {id(parameter) for parameter in model.parameters()}
    ema = ExponentialMovingAverage(model)
    assert ema.module.teacher is model.teacher
    assert not any('teacher' in key for key in ema.state_dict())
    ema.update_parameters(model)


def test_the_teacher_moves_with_the_model(build):
    model = build(distill()).to(torch.float64)
    assert {parameter.dtype for parameter in model.teacher.parameters()} == {torch.float64}


def calls_of(model, names):
    called = []
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
    return called


def test_only_the_part_that_is_read_runs(build):
    model = build(distill())
    called = calls_of(model.teacher, ['backbone', 'bbox_head', 'bbox_head.retina_cls'])
    losses_of(model, detection_batch())
    assert called == ['backbone']

    layer = dict(type='mmkd_plugin.AMDDistiller', layers=['backbone.layer2'])
    model = build(distill(distiller=layer))
    called = calls_of(model.teacher, ['backbone.layer2', 'backbone.layer3', 'neck'])
    losses_of(model, detection_batch())
    assert called == ['backbone.layer2']

    model = build(distill(architecture=classifier(8), teacher=classifier(16), distiller=LOGITS), scope='mmpretrain')
    called = calls_of(model.teacher, ['head.fc', 'head.loss_module'])
    losses_of(model, classification_batch())
    assert called == ['head.fc']


def test_what_only_the_loss_runs_is_recorded_there_as_in_mmrazor(build):
    """MMRazor's own DKD config records the inputs of the loss, for the labels."""
    recorders = dict(fc=dict(type='ModuleOutputs', source='head.fc'),
                     gt_labels=dict(type='ModuleInputs', source='head.loss_module'))
    model = build(distill(architecture=classifier(8), teacher=classifier(16), distiller=dict(
        type='ConfigurableDistiller', student_recorders=recorders, teacher_recorders=dict(fc=recorders['fc']),
        distill_losses=dict(loss_dkd=dict(type='DKDLoss', tau=1, beta=0.5)),
        loss_forward_mappings=dict(loss_dkd=dict(
            preds_S=dict(from_student=True, recorder='fc'), preds_T=dict(from_student=False, recorder='fc'),
            gt_labels=dict(from_student=True, recorder='gt_labels', data_idx=1))))), scope='mmpretrain')
    assert losses_of(model, classification_batch())['distill.loss_dkd'] > 0
    at_loss = dict(type='ModuleInputs', source='head.loss_module')
    model = build(distill(architecture=classifier(8), teacher=classifier(16), distiller=dict(
        type='ConfigurableDistiller', student_recorders=dict(logits=at_loss), teacher_recorders=dict(logits=at_loss),
        distill_losses=dict(loss_kd=dict(type='KLDivergence')),
        loss_forward_mappings=dict(loss_kd=dict(
            preds_S=dict(from_student=True, recorder='logits', data_idx=0),
            preds_T=dict(from_student=False, recorder='logits', data_idx=0))))), scope='mmpretrain')
    assert losses_of(model, classification_batch())['distill.loss_kd'] > 0


def test_every_call_that_is_read_is_waited_for(build):
    recorders = dict(cls=dict(type='ModuleOutputs', source='bbox_head.retina_cls'))
    mapping = {key: dict(recorder='cls', from_student=student, record_idx=2)
               for key, student in (('s_feature', True), ('t_feature', False))}
    model = build(distill(distiller=dict(
        type='ConfigurableDistiller', student_recorders=recorders, teacher_recorders=recorders,
        distill_losses=dict(loss_at=dict(type='ATLoss')), loss_forward_mappings=dict(loss_at=mapping))))
    called = calls_of(model.teacher, ['bbox_head.retina_cls'])
    assert losses_of(model, detection_batch())['distill.loss_at'] > 0
    assert len(called) == 3  # of four levels


def test_the_student_starts_as_it_would_alone(build):
    alone = build(retinanet(8))
    alone.init_weights()
    distilled = build(distill())
    distilled.init_weights()
    for key, value in alone.state_dict().items():
        assert torch.equal(value, distilled.student.state_dict()[key]), key


def test_a_model_by_the_path_of_its_config(build, tmp_path):
    (tmp_path / 'mine.py').write_text(f"default_scope = 'mmdet'\nmodel = {retinanet(16)!r}")
    model = build(distill(teacher=dict(cfg_path=str(tmp_path / 'mine.py'))))
    assert model.teacher.backbone.base_channels == 16


def test_zero_weight_is_training_alone_to_the_bit(build):
    alone, distilled = build(retinanet(8)), build(distill(distiller=dict(AMD, amd=dict(loss_weight=0.0))))
    states = []
    for model in (alone, distilled):
        torch.manual_seed(3)
        model.init_weights()
        optimizer = build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)))
        batch = detection_batch()
        for _ in range(3):
            model.train().train_step(copy.deepcopy(batch), optimizer)
        states.append(getattr(model, 'student', model).state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_teacher_files_of_all_kinds(build, teacher_file, tmp_path):
    path, teacher = teacher_file
    state = torch.load(path)
    kinds = {
        'plain': state,
        'mmengine': dict(meta=dict(epoch=1), state_dict=state),
        'parallel': dict(state_dict={f'module.{key}': value for key, value in state.items()}),
        'distilled': dict(state_dict={f'architecture.{key}': value for key, value in state.items()}),
    }
    for kind, content in kinds.items():
        torch.save(content, tmp_path / kind)
        model = build(distill(allow_random_teacher=False, teacher_ckpt=str(tmp_path / kind)))
        assert all(torch.equal(value, state[key]) for key, value in model.teacher.state_dict().items()), kind


def test_a_teacher_that_does_not_fit_is_refused_with_a_list(build, teacher_file, tmp_path):
    state = torch.load(teacher_file[0])
    state['neck.extra'] = torch.zeros(1)
    del state['bbox_head.retina_cls.bias']
    state['bbox_head.retina_reg.bias'] = torch.zeros(3)
    torch.save(state, tmp_path / 'bad.pth')
    with pytest.raises(ValueError) as error:
        build(distill(teacher_ckpt=str(tmp_path / 'bad.pth')))
    for part in ('teacher_ckpt', 'neck.extra', 'bbox_head.retina_cls.bias', 'bbox_head.retina_reg.bias'):
        assert part in str(error.value)


@pytest.mark.parametrize('fields, message', [
    (dict(allow_random_teacher=False), 'teacher_ckpt is missing'),
    (dict(teacher_ckpt='no/such.pth'), 'no/such.pth'),
    (dict(student_ckpt='no/such.pth'), 'student_ckpt.*no/such.pth'),
    (dict(teacher=dict(cfg_path='mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', bbox_head=dict(num_classes=3))),
     'teacher: bbox_head beside cfg_path'),
    (dict(architecture=dict(cfg_path='mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', neck={})),
     'architecture: neck beside cfg_path'),
    (dict(architecture=3), 'architecture must be'),
    (dict(architecture=dict(type='mmdet.SemiBaseDetector', detector=retinanet(8), semi_train_cfg=dict(
        freeze_teacher=True), semi_test_cfg=dict(predict_on='teacher'))),
     'architecture: SemiBaseDetector gets several batches'),
    (dict(teacher=dict(cfg_path='mmdet::retinanet/retinanet_r51_fpn_1x_coco.py')), 'teacher.*retinanet_r50_fpn_1x'),
    (dict(teacher=dict(cfg_path='configs/amd_retinanet_cooc.py')), 'teacher.*configs/amd_retinanet_coco.py'),
    (dict(inherit=['nekc']), "no module 'nekc'.*neck"),
    (dict(inherit='neck'), 'inherit must be a list'),
    (dict(inherit=['neck', 'bbox_head'], student_ckpt='a.pth'), 'student_ckpt: inherit would replace its neck, bbox_'),
    (dict(inherit=['bbox_head'], teacher=retinanet(16, num_classes=5)), r'num_classes \[3\] .*5'),
    (dict(inherit=['backbone.layer2']), "no weight of 'backbone.layer2'"),
    (dict(distiller=dict(AMD, layers=['nekc'])), "no 'nekc'.*neck"),
    (dict(distiller=dict(AMD, layers=['backbone.layer2', 'backbone.layer2'])), 'twice'),
    (dict(distiller=dict(AMD, layers='neck')), 'layers: expected a list of names'),
    (dict(distiller=dict(AMD, layers=[])), 'layers: the list is empty'),
    (dict(distiller=dict(AMD, layers=['bbox_head'])), 'did not run bbox_head'),
    (dict(architecture=classifier(8), teacher=classifier(8), distiller=dict(AMD, layers=['head.fc'])),
     r"'head.fc' of the student must have feature maps.*\(1, 4\)"),
    (dict(architecture=classifier(8), teacher=classifier(8), distiller=dict(AMD, layers=[('backbone', 'head.fc')])),
     r"'head.fc' of the teacher must have feature maps.*\(1, 4\)"),
    (dict(architecture=classifier(8), teacher=coarse_classifier(), distiller=dict(AMD, layers=['backbone.layer3'])),
     r'backbone.layer3: the strides differ.*224.*\(14, 14\).*\(7, 7\)'),
    (dict(teacher_precision='half'), "teacher_precision: unknown precision, got 'half', expected one of auto, float32"),
    (dict(teacher_input_size=100), r'teacher_input_size: not a multiple.*\(100, 100\).*Give \(128, 128\)'),
    (dict(teacher=grey_classifier(), architecture=classifier(8), distiller=dict(
        AMD, layers=['backbone.layer3'])), 'teacher: the number of image channels differs.*got 1, expected 3'),
    (dict(teacher=retinanet(16, levels=3)), '4 feature maps.*3'),
    (dict(distiller=dict(AMD, amd=dict(margin=-1))), 'margin.*-1'),
    (dict(loss_schedules={'loss_amd_nekc*': dict(end=5)}), "no distillation loss.*loss_amd_neck_0"),
    (dict(loss_schedules={'loss_amd*': dict(type='linaer')}), 'linaer.*linear'),
])
def test_mistakes_are_found_at_build_time(build, fields, message):
    with pytest.raises(ValueError, match=f'(?s){message}'):
        build(distill(**fields))


def l2_distiller(**connector):
    side = {key: dict(recorder='neck', from_student=student, data_idx=0)
            for key, student in (('s_feature', True), ('t_feature', False))}
    if connector:
        side['s_feature']['connector'] = 'adapter'
    recorders = dict(neck=dict(type='ModuleOutputs', source='neck'))
    return dict(type='ConfigurableDistiller', student_recorders=recorders, teacher_recorders=recorders,
                connectors=dict(adapter=connector) if connector else {},
                distill_losses=dict(loss_l2=dict(type='L2Loss', normalize=False)),
                loss_forward_mappings=dict(loss_l2=side))


def test_wrong_channels_are_found_at_build_time(build):
    with pytest.raises(ValueError, match=r'(?s)loss_l2.*16.*32'):
        build(distill(teacher=retinanet(16, fpn_channels=32), distiller=l2_distiller()))
    with pytest.raises(ValueError, match='(?s)loss_l2.*connectors'):
        build(distill(distiller=l2_distiller(type='ConvModuleConnector', in_channel=99, out_channel=16)))
    build(distill(teacher=retinanet(16, fpn_channels=32),
                  distiller=l2_distiller(type='ConvModuleConnector', in_channel=16, out_channel=32)))


def test_mistakes_in_a_plain_distiller_name_the_field(build):
    misspelt = l2_distiller()
    misspelt['student_recorders'] = dict(neck=dict(type='ModuleOutputs', source='nekc'))
    with pytest.raises(ValueError, match="student_recorders.neck.*'nekc'.*neck"):
        build(distill(distiller=misspelt))
    unmapped = l2_distiller()
    unmapped['loss_forward_mappings'] = dict(loss_l1=unmapped['loss_forward_mappings']['loss_l2'])
    with pytest.raises(ValueError, match='loss_l1'):
        build(distill(distiller=unmapped))


def test_teacher_with_other_classes(build, caplog):
    with pytest.raises(ValueError, match=r'loss_kd.*\[4\].*\[5\]'):
        build(distill(architecture=classifier(8), teacher=classifier(16, num_classes=5), distiller=LOGITS),
              scope='mmpretrain')
    messages = []
    from mmkd_plugin.models.algorithms import dry_run as module
    original = module.print_log
    module.print_log = lambda text, **_: messages.append(text)
    try:
        build(distill(teacher=retinanet(16, num_classes=5)))
    finally:
        module.print_log = original
    assert any('[3]' in text and '[5]' in text for text in messages)


def test_inherit_copies_what_fits(build, teacher_file):
    path, teacher = teacher_file
    model = build(distill(teacher_ckpt=str(path), inherit=['neck', 'bbox_head']))
    model.init_weights()
    student = model.student.state_dict()
    for key, value in teacher.state_dict().items():
        if key.startswith(('neck.fpn_convs.0', 'bbox_head')):
            assert torch.equal(student[key], value), key
    assert student['neck.lateral_convs.0.conv.weight'].shape != teacher.neck.lateral_convs[0].conv.weight.shape


def test_student_ckpt_survives_the_initialisation(build, tmp_path):
    start = build(retinanet(8), seed=5).state_dict()
    torch.save(dict(state_dict=start), tmp_path / 'student.pth')
    model = build(distill(student_ckpt=str(tmp_path / 'student.pth')))
    model.init_weights()
    assert all(torch.equal(value, start[key]) for key, value in model.student.state_dict().items())


def test_load_from_takes_a_plain_student_or_refuses(build):
    start = build(retinanet(8), seed=5).state_dict()
    model = build(distill())
    load_state_dict(model, start)
    assert all(torch.equal(value, start[key]) for key, value in model.student.state_dict().items())
    with pytest.raises(ValueError, match='load_from: the checkpoint has no weight of the student'):
        load_state_dict(model, {'encoder.weight': torch.zeros(1)})


def test_a_resume_must_fit_entirely(build):
    model = build(distill())
    state = dict(get_state_dict(model))
    load_state_dict(model, dict(state))
    load_state_dict(model, dict(state, **{'teacher.backbone.x': torch.zeros(1)}))  # as MMRazor saves it
    missing = {key: value for key, value in state.items() if key != 'architecture.bbox_head.retina_cls.bias'}
    with pytest.raises(ValueError, match='missing: architecture.bbox_head.retina_cls.bias'):
        load_state_dict(model, missing)
    with pytest.raises(ValueError, match='unexpected: distiller.adapter'):
        load_state_dict(model, dict(state, **{'distiller.adapter': torch.zeros(1)}))
    with pytest.raises(ValueError, match='retina_cls.bias'):
        load_state_dict(model, dict(state, **{'architecture.bbox_head.retina_cls.bias': torch.zeros(1)}))


def test_the_batch_is_renormalised_for_a_teacher_of_another_convention(build):
    # means that are not the student's reversed: the padding would else be zero in both, whatever is done to it
    other = retinanet(16, mean=[100.0, 110.0, 120.0], std=[1.0, 1.0, 1.0], bgr_to_rgb=False)
    model = build(distill(teacher=other))
    batch = detection_batch()
    batch['inputs'][1] = batch['inputs'][1][:, :40, :56]  # the batch pads it
    batch['data_samples'][1].set_metainfo(dict(img_shape=(40, 56), pad_shape=(40, 56)))
    expected = model.teacher.data_preprocessor(copy.deepcopy(batch))['inputs']
    given = []
    model.teacher.backbone.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    losses_of(model, batch)
    torch.testing.assert_close(given[0], expected, atol=1e-4, rtol=1e-5)
    assert build(distill()).teachers[''].inputs is None


def test_mixup_of_the_student_is_kept(build):
    student = classifier(8, train_cfg=dict(augments=dict(type='Mixup', alpha=1.0)))
    preprocessor = student.pop('data_preprocessor')
    model = build(distill(architecture=student, teacher=classifier(16), distiller=LOGITS,
                          data_preprocessor=preprocessor), scope='mmpretrain')
    samples = model.data_preprocessor(classification_batch(), True)['data_samples']
    assert any(((sample.gt_score > 0) & (sample.gt_score < 1)).any() for sample in samples)


def test_a_distiller_that_reads_nothing_runs_no_teacher(build):
    model = build(distill(distiller=dict(type='ConfigurableDistiller'), inherit=['neck.fpn_convs']))
    called = calls_of(model.teacher, ['backbone'])
    losses_of(model, detection_batch())
    assert not called


def test_a_stopped_distillation_does_not_run_the_teacher(build):
    model = build(distill())
    model.distillation_stopped = True  # what MMRazor's StopDistillHook sets
    called = calls_of(model.teacher, ['backbone'])
    assert not any('distill' in key for key in losses_of(model, detection_batch()))
    assert not called


def test_without_its_task_the_student_learns_from_the_teacher_alone(build):
    model, whole = (build(distill(calculate_student_loss=value)).train() for value in (False, True))
    ran = []
    model.student.bbox_head.register_forward_hook(lambda *_: ran.append('head'))
    losses, expected = (losses_of(each, detection_batch()) for each in (model, whole))
    assert losses == {name: value for name, value in expected.items() if name.startswith('distill.')} and not ran
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    for name, parameter in model.student.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == (not name.startswith('bbox_head')), name
    assert all(parameter.requires_grad for parameter in whole.student.bbox_head.parameters())


def test_what_needs_the_task_is_refused_without_it(build):
    inside = copy.deepcopy(LOGITS)
    for side in ('student', 'teacher'):
        inside[f'{side}_recorders']['logits']['source'] = 'head.loss_module'
    with pytest.raises(ValueError, match='^calculate_student_loss: .*loss_kd'):
        build(distill(architecture=classifier(8), teacher=classifier(16), distiller=inside,
                      calculate_student_loss=False), 'mmpretrain')
    with pytest.raises(ValueError, match="^calculate_student_loss: dafa.objective 'agreement'"):
        build(distill(calculate_student_loss=False, distiller=dict(
            type='mmkd_plugin.SoKDDistiller', layers=['neck'], dafa=dict(objective='agreement'))))
    with pytest.raises(ValueError, match="^calculate_student_loss: dam.anchor 'boxes' reads .* the labels"):
        build(distill(calculate_student_loss=False, distiller=dict(type='mmkd_plugin.SoKDDistiller', layers=['neck'])))
    model = build(distill(calculate_student_loss=False))
    model.distillation_stopped = True
    with pytest.raises(ValueError, match='^calculate_student_loss: False leaves no loss'):
        losses_of(model, detection_batch())


def test_mmdetections_syncnormhook_loads_the_states_of_norms_alone(build, monkeypatch):
    from mmdet.engine.hooks import sync_norm_hook
    model = build(distill(distiller=dict(type='mmkd_plugin.FeatureDistiller', layers=['neck'], base='fitnet')))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(sync_norm_hook, 'get_dist_info', lambda: (0, 2))
    monkeypatch.setattr(sync_norm_hook, 'all_reduce_dict', lambda states, op: {
        name: value + 1 for name, value in states.items()})
    sync_norm_hook.SyncNormHook().before_val_epoch(SimpleNamespace(model=model))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(sync_norm_hook.get_norm_states(model)) and any('distiller' in name for name in changed)
    with pytest.raises(ValueError, match='does not fit the model'):
        model.load_state_dict(dict(list(before.items())[:9]), strict=False)
