import pytest
from conftest import classification_batch, classifier, detection_batch, retinanet
from mmengine.config import Config
from mmrazor.models.distillers import ConfigurableDistiller


def distill(distiller, architecture=None, teacher=None):
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=architecture or retinanet(8),
                teacher=teacher or retinanet(16), allow_random_teacher=True, distiller=distiller)


def losses_of(model, batch):
    return model(**model.data_preprocessor(batch, True), mode='loss')


def test_neck_is_every_level_and_stages_go_by_name(build):
    model = build(distill(dict(type='mmkd_plugin.AMDDistiller', layers=['backbone.layer2', 'neck'],
                               amd=dict(scale_free=True, loss_weight=0.5))))
    assert list(model.distiller.distill_losses) == [
        'loss_amd_backbone_layer2', *(f'loss_amd_neck_{level}' for level in range(4))]
    assert {loss.loss_weight for loss in model.distiller.distill_losses.values()} == {0.5}


def test_the_written_config_does_the_same(build):
    batch = detection_batch()
    model = build(distill(dict(type='mmkd_plugin.AMDDistiller', layers=['backbone.layer3', 'neck'])))
    written = Config.fromstring(model.distiller.written_config(), '.py').distiller
    again = build(distill(written))
    assert type(again.distiller) is ConfigurableDistiller
    first = losses_of(model, batch)
    again.load_state_dict(model.state_dict())
    again.teacher.load_state_dict(model.teacher.state_dict())
    second = losses_of(again, batch)
    assert {key: value for key, value in first.items() if 'distill' in key} == {
        key: value for key, value in second.items() if 'distill' in key}


def test_mixes_with_other_losses(build):
    logits = dict(logits=dict(type='ModuleOutputs', source='head.fc'))
    model = build(distill(dict(
        type='mmkd_plugin.AMDDistiller', layers=['backbone.layer3'], student_recorders=logits,
        teacher_recorders=logits, distill_losses=dict(loss_kd=dict(type='KLDivergence', tau=4)),
        loss_forward_mappings=dict(loss_kd=dict(preds_S=dict(recorder='logits', from_student=True),
                                                preds_T=dict(recorder='logits', from_student=False)))),
        classifier(8), classifier(16)), scope='mmpretrain')
    losses = losses_of(model, classification_batch())
    assert losses['distill.loss_amd_backbone_layer3'] > 0 and losses['distill.loss_kd'] > 0


def test_layers_of_different_names(build):
    model = build(distill(dict(type='mmkd_plugin.AMDDistiller', layers=[('backbone.layer4', 'backbone.layer4.1')])))
    assert losses_of(model, detection_batch())['distill.loss_amd_backbone_layer4'] > 0


def test_works_in_mmrazors_own_algorithm(build):
    model = build(dict(type='mmrazor.SingleTeacherDistill', architecture=classifier(8), teacher=classifier(16),
                       distiller=dict(type='mmkd_plugin.AMDDistiller', layers=['backbone.layer3']), _scope_='mmrazor'))
    assert losses_of(model, classification_batch())['distill.loss_amd_backbone_layer3'] > 0


@pytest.mark.parametrize('options, message', [
    (dict(student_recorders=dict(neck=dict(type='ModuleOutputs', source='neck'))), "layers: .*'neck'.*Rename"),
    (dict(distill_losses=dict(loss_amd_neck_0=dict(type='ATLoss'))), 'loss_amd_neck_0.*Rename'),
])
def test_clashing_names_are_refused(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(distill(dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], **options)))
