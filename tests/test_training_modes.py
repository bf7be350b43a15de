"""Ways of training that must not change what is learned: recomputed activations, accumulated gradients, bfloat16."""
import copy

import pytest
import torch
from conftest import classification_batch, classifier, detection_batch, retinanet
from mmengine.optim import build_optim_wrapper

AMD = dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=dict(scale_free=True))
SOKD = dict(type='mmkd_plugin.SoKDDistiller', layers=['neck'], dafa=dict(), dam=dict(anchor='boxes'),
            base='fitnet')
METHODS = {'AMD': AMD, 'SoKD': SOKD}


@pytest.fixture
def distil(build):
    def distil(distiller, student=None, teacher=None, scope='mmdet'):
        return build(dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student or retinanet(8),
                          teacher=teacher or retinanet(16), allow_random_teacher=True,
                          distiller=copy.deepcopy(distiller)), scope).train()
    return distil


def losses(model, batch):
    """Returns the sum of the losses, and each as the log has it."""
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    return model.parse_losses(model(**data, mode='loss'))


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize('method', METHODS)
def test_recomputing_the_backbone_changes_nothing(distil, method):
    batch, found = detection_batch(), []
    for with_cp in (False, True):
        student = retinanet(8)
        student['backbone']['with_cp'] = with_cp
        model = distil(METHODS[method], student)
        assert model.student.backbone.layer1[0].with_cp == with_cp
        total, log = losses(model, batch)
        total.backward()
        found.append((log, gradients(model)))
    for plain, recomputed in zip(*found):
        assert plain.keys() == recomputed.keys()
        for name in plain:
            torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-4, atol=1e-4)


def still(base_channels):
    """A classifier whose batch norm is in eval mode, so that samples know nothing of each other."""
    model = classifier(base_channels)
    model['backbone']['norm_eval'] = True
    return model


CLASSIFIERS = {
    'AMD': dict(type='mmkd_plugin.AMDDistiller', layers=['backbone.layer4'], amd=dict(loss_weight=10.0)),
    'DAM': dict(type='mmkd_plugin.SoKDDistiller', layers=['backbone.layer4'], dam=dict(anchor='attention'),
                base='fitnet', dafa=None),
}


@pytest.mark.parametrize('method', CLASSIFIERS)
def test_accumulated_gradients_are_those_of_the_whole_batch(distil, method):
    batch, after = classification_batch(samples=4), []
    for parts in (1, 2):
        model = distil(CLASSIFIERS[method], still(8), still(16), 'mmpretrain')
        model.distiller.connectors.eval()
        getattr(model.distiller, 'dams', model.distiller.connectors).eval()
        wrapper = build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=0.01), accumulative_counts=parts))
        wrapper.initialize_count_status(model, 0, 2 * parts)
        for _ in range(2):
            for part in range(parts):
                size = 4 // parts
                some = {key: value[part * size:(part + 1) * size] for key, value in batch.items()}
                model.train_step(some, wrapper)
        after.append(model.state_dict())
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-4, atol=1e-6)


def test_the_policy_steps_when_the_student_does(distil):
    model = distil(SOKD)
    wrapper = build_optim_wrapper(model, dict(
        optimizer=dict(type='SGD', lr=0.01), accumulative_counts=2,
        constructor='mmkd_plugin.PolicyOptimWrapperConstructor', policy=dict(type='Adam', lr=0.1)))
    wrapper.initialize_count_status(model, 0, 4)
    seen = [[], []]
    for _ in range(4):
        model.train_step(detection_batch(), wrapper)
        seen[0].append(model.distiller.dafa.alpha.detach().clone())
        seen[1].append(model.student.bbox_head.retina_cls.weight.detach().clone())
    for values in seen:
        assert not torch.equal(values[0], values[1]) and torch.equal(values[1], values[2])
        assert not torch.equal(values[2], values[3])


@pytest.mark.parametrize('device, dtype, wrapper', [
    ('cpu', torch.bfloat16, 'mmkd_plugin.AutocastOptimWrapper'),
    pytest.param('cuda', torch.float16, 'AmpOptimWrapper', marks=pytest.mark.gpu),
])
@pytest.mark.parametrize('method', METHODS)
def test_mixed_precision(distil, method, device, dtype, wrapper):
    model, dtypes = distil(METHODS[method]).to(device), []
    model.student.backbone.layer2.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    policy = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor') if method == 'SoKD' else {}
    wrapper = build_optim_wrapper(model, dict(type=wrapper, optimizer=dict(type='SGD', lr=0.001), **policy))
    for _ in range(3):
        log = model.train_step(detection_batch(), wrapper)
    assert set(dtypes) == {dtype}
    assert all(value.isfinite() for value in log.values())
    ours = [value for name, value in log.items() if name.startswith(('distill.loss_amd', 'distill.loss_dam',
                                                                     'distill.loss_aug'))]
    assert ours and all(value.dtype == torch.float32 for value in ours)
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())
