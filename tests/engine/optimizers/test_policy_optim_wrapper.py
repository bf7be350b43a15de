import copy
import types

import pytest
import torch
from conftest import detection_batch, retinanet
from mmengine.optim import AmpOptimWrapper, build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper

from mmkd_plugin.engine import PolicyOptimWrapper
from mmkd_plugin.models.refiners import DAFA

SGD = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.1)
POLICY = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor', policy=dict(type='Adam', lr=0.05))


class Model(torch.nn.Module):
    """The least with a policy."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.dafa = torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), DAFA()

    def losses(self, x):
        student = self.norm(self.linear(x)).square().mean()
        return student, sum(p.sigmoid().sum() for p in self.dafa.parameters())


def step(model, wrapper, x, policy=True):
    with wrapper.optim_context(model):
        student, aug = model.losses(x)
    wrapper.update_params(student + aug if policy else student)


def student_of(model):
    return {name: value.clone() for name, value in model.state_dict().items() if 'dafa' not in name}


@pytest.mark.parametrize('options', [
    {}, dict(clip_grad=dict(max_norm=0.01)), dict(accumulative_counts=2),
    dict(paramwise_cfg=dict(norm_decay_mult=0.0, bias_lr_mult=2.0, custom_keys=dict(linear=dict(lr_mult=0.1)))),
])
def test_the_student_is_trained_as_without_a_policy(options):
    model, xs = Model(), torch.randn(5, 4, 3)
    alone = copy.deepcopy(model)
    del alone.dafa
    alone.losses = lambda x: (alone.norm(alone.linear(x)).square().mean(), 0)
    both = build_optim_wrapper(model, dict(optimizer=SGD, **copy.deepcopy(options), **POLICY))
    single = build_optim_wrapper(alone, dict(optimizer=SGD, **copy.deepcopy(options)))
    assert isinstance(both, PolicyOptimWrapper)
    for wrapper, each in ((both, model), (single, alone)):
        wrapper.initialize_count_status(each, 0, 5)
        for x in xs:
            step(each, wrapper, x)
    for name, value in alone.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert len(both.student.optimizer.param_groups) == len(single.optimizer.param_groups)


def test_the_policy_is_trained_by_its_own_optimizer():
    model = Model()
    by_hand = copy.deepcopy(model)
    wrapper = build_optim_wrapper(model, dict(
        optimizer=SGD, accumulative_counts=2, clip_grad=dict(max_norm=1e-9), **POLICY))
    adam = torch.optim.Adam(by_hand.dafa.parameters(), lr=0.05)
    assert all(group['weight_decay'] == 0 for group in wrapper.policy.param_groups)
    for i in range(4):
        step(model, wrapper, torch.randn(4, 3))
        (by_hand.losses(torch.randn(4, 3))[1] / 2).backward()
        if i % 2:
            adam.step()
            adam.zero_grad()
    for value, expected in zip(model.dafa.parameters(), by_hand.dafa.parameters()):
        torch.testing.assert_close(value, expected)
    owned = [{id(p) for group in part.param_groups for p in group['params']}
             for part in (wrapper.student, wrapper.policy)]
    assert owned[1] == {id(p) for p in model.dafa.parameters()} and not owned[0] & owned[1]
    assert owned[0] | owned[1] == {id(p) for p in model.parameters()}


def test_a_frozen_policy_rests_in_spite_of_its_momentum():
    model = Model()
    wrapper = build_optim_wrapper(model, dict(optimizer=SGD, **POLICY))
    step(model, wrapper, torch.randn(4, 3))
    model.dafa.freeze()
    before, student = copy.deepcopy(model.dafa.state_dict()), student_of(model)
    step(model, wrapper, torch.randn(4, 3))
    assert all(torch.equal(value, before[name]) for name, value in model.dafa.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (student['linear.weight'] != model.linear.weight).any()


def test_a_waiting_policy_rests_too():
    model = Model()
    wrapper = build_optim_wrapper(model, dict(optimizer=SGD, **POLICY))
    model.dafa.wait()
    before = copy.deepcopy(model.dafa.state_dict())
    step(model, wrapper, torch.randn(4, 3))
    assert all(torch.equal(value, before[name]) for name, value in model.dafa.state_dict().items())
    model.dafa.start_search()
    step(model, wrapper, torch.randn(4, 3))
    assert (model.dafa.alpha != before['alpha']).any()


class Distiller(torch.nn.Module):
    """Scores the policy's draws by a gradient that the student's backward has recorded."""

    def __init__(self, objective):
        super().__init__()
        self.dafa, self.calls, self.pushes = DAFA(objective=objective, seed=0), [], []

    def record(self, feature):
        feature.register_hook(self.pushes.append)
        return feature

    def search_policy(self):
        push = self.pushes.pop()
        draws = self.dafa.sample()
        scores = [push.sum() * (1 + draw.index) for draw in draws]
        self.calls.append((draws, torch.stack(scores)))
        self.dafa.score_loss(draws, scores).backward()


class Searching(torch.nn.Module):
    """The least whose distiller searches after the backward."""

    def __init__(self, objective='agreement'):
        super().__init__()
        self.linear, self.norm, self.distiller = torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), Distiller(objective)

    def forward(self, x):
        return self.norm(self.distiller.record(self.linear(x))).square().mul(torch.arange(2)).mean() + \
            self.distiller.dafa.policy_loss(x, x)


def test_search_policy_comes_between_the_backward_and_the_step():
    model, plain = Searching(), Searching('similarity')
    plain.load_state_dict(model.state_dict())
    plain.distiller.dafa.freeze()
    wrappers = [build_optim_wrapper(each, dict(optimizer=SGD, **POLICY)) for each in (model, plain)]
    by_hand = copy.deepcopy(model.distiller.dafa)
    adam = torch.optim.Adam(by_hand.parameters(), lr=0.05)
    for _ in range(3):
        x = torch.randn(4, 3)
        for each, wrapper in zip((model, plain), wrappers):
            wrapper.update_params(each(x))
        adam.zero_grad()
        draws, scores = model.distiller.calls[-1]
        assert draws == by_hand.sample()
        by_hand.score_loss(draws, scores).backward()
        adam.step()
    assert len(model.distiller.calls) == 3 and not plain.distiller.calls
    for value, expected in zip(model.distiller.dafa.parameters(), by_hand.parameters()):
        assert torch.equal(value, expected)
    for name in ('linear.weight', 'norm.weight', 'norm.running_mean'):  # the student is trained as without a search
        assert torch.equal(model.state_dict()[name], plain.state_dict()[name])


def test_search_policy_runs_at_every_iteration_that_accumulates():
    model = Searching()
    wrapper = build_optim_wrapper(model, dict(
        optimizer=SGD, accumulative_counts=2, constructor=POLICY['constructor'], policy=dict(type='SGD', lr=1.)))
    wrapper.initialize_count_status(model, 0, 2)
    start = [p.detach().clone() for p in model.distiller.dafa.parameters()]
    expected = copy.deepcopy(model.distiller.dafa)
    for _ in range(2):
        wrapper.update_params(model(torch.randn(4, 3)))
    for draws, scores in model.distiller.calls:
        expected.score_loss(draws, scores).backward()
    assert len(model.distiller.calls) == 2
    for value, before, by_hand in zip(model.distiller.dafa.parameters(), start, expected.parameters()):
        torch.testing.assert_close(value, before - by_hand.grad)


@pytest.mark.parametrize('phase', ['wait', 'freeze'])
def test_search_policy_is_left_alone_outside_of_the_search(phase):
    model = Searching()
    wrapper = build_optim_wrapper(model, dict(optimizer=SGD, **POLICY))
    getattr(model.distiller.dafa, phase)()
    wrapper.update_params(model(torch.randn(4, 3)))
    assert not model.distiller.calls


def test_agreement_needs_a_distiller_that_scores():
    model = Model()
    model.dafa = DAFA(objective='agreement')
    with pytest.raises(ValueError, match="dafa.objective: is 'agreement'.*Model has no search_policy"):
        build_optim_wrapper(model, dict(optimizer=SGD, **POLICY))


def test_state_and_logs():
    model, other = Model(), Model()
    wrappers = [build_optim_wrapper(each, dict(optimizer=SGD, **POLICY)) for each in (model, other)]
    step(model, wrappers[0], torch.randn(4, 3))
    state = copy.deepcopy(wrappers[0].state_dict())
    wrappers[1].load_state_dict(copy.deepcopy(state))
    assert wrappers[1].policy.optimizer.state_dict()['state'][0]['step'] == 1
    assert wrappers[0].get_lr() == {'student.lr': [0.01], 'policy.lr': [0.05]}
    assert wrappers[0].get_momentum()['policy.momentum'] == [0.9]
    assert list(wrappers[0].items()) == [('student', wrappers[0].student)]


class Scaler:
    """Of AMP, what both optimisers need: overflow anywhere in an optimiser's gradients skips its step."""

    def __init__(self):
        self.factor, self.calls = 8.0, []

    def scale(self, loss):
        return loss * self.factor

    def unscale_(self, optimizer):
        self.calls.append(('unscale', type(optimizer).__name__))
        for group in optimizer.param_groups:
            for parameter in group['params']:
                parameter.grad.div_(self.factor)

    def step(self, optimizer):
        name = type(optimizer).__name__
        if ('unscale', name) not in self.calls:
            self.unscale_(optimizer)
        self.calls.append(('step', name))
        optimizer.step()

    def update(self, scale=None):
        self.calls.append(('update', None))


@pytest.mark.parametrize('clip', [None, dict(max_norm=1e-3)])
def test_one_loss_scale_for_both(monkeypatch, clip):
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    plain, scaled = Model(), Model()
    scaled.load_state_dict(plain.state_dict())
    config = dict(optimizer=SGD, clip_grad=clip, **POLICY)
    config['policy'] = dict(type='SGD', lr=0.1)  # unlike Adam, it feels a wrong scale
    wrapper = build_optim_wrapper(plain, copy.deepcopy(config))
    amp = build_optim_wrapper(scaled, dict(copy.deepcopy(config), type='AmpOptimWrapper', loss_scale='dynamic'))
    assert type(amp.student) is AmpOptimWrapper
    amp.student.loss_scaler = scaler = Scaler()
    amp.policy.optimizer.__class__ = type('Policy', (torch.optim.SGD, ), {})
    x = torch.randn(4, 3)
    step(plain, wrapper, x)
    amp.update_params(sum(scaled.losses(x)))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(scaled.state_dict()[name], value, msg=name)
    assert scaler.calls.count(('update', None)) == 1 and scaler.calls[-1] == ('update', None)
    assert {('step', 'Policy'), ('step', 'SGD')} < set(scaler.calls)


def test_the_policy_of_search_policy_loses_the_loss_scale(monkeypatch):
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    plain, scaled = Searching(), Searching()
    scaled.load_state_dict(plain.state_dict())
    config = dict(optimizer=SGD, constructor=POLICY['constructor'], policy=dict(type='SGD', lr=0.1))
    wrapper = build_optim_wrapper(plain, copy.deepcopy(config))
    amp = build_optim_wrapper(scaled, dict(copy.deepcopy(config), type='AmpOptimWrapper', loss_scale='dynamic'))
    amp.student.loss_scaler = Scaler()
    amp.policy.optimizer.__class__ = type('Policy', (torch.optim.SGD, ), {})
    x = torch.randn(4, 3)
    for each, its in ((plain, wrapper), (scaled, amp)):
        its.update_params(each(x))
    torch.testing.assert_close(scaled.distiller.calls[0][1], 8 * plain.distiller.calls[0][1])
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(scaled.state_dict()[name], value, msg=name)


def test_the_stock_train_step_works(build):
    model = build(dict(
        type='mmkd_plugin.TeacherStudentDistill', architecture=retinanet(8), teacher=retinanet(16),
        allow_random_teacher=True, distiller=dict(
            type='mmkd_plugin.SoKDDistiller', layers=['neck'], dafa=dict(), dam=dict(anchor='boxes'),
            base='fitnet')))
    wrapper = build_optim_wrapper(model, dict(optimizer=SGD, **POLICY))
    before = copy.deepcopy(dict(model.named_parameters()))
    for _ in range(2):
        model.train().train_step(detection_batch(), wrapper)
    after = dict(model.named_parameters())
    for part in ('architecture.neck', 'distiller.connectors', 'distiller.dams', 'distiller.dafa.alpha'):
        assert any((before[key] != after[key]).any() for key in before if key.startswith(part)), part


def test_no_sync_is_the_students():
    model = Model()
    wrapper = build_optim_wrapper(model, dict(optimizer=SGD, accumulative_counts=2, **POLICY))
    entered = []

    class NoSync:
        def __enter__(self):
            entered.append(1)

        def __exit__(self, *_):
            pass

    parallel = types.SimpleNamespace(no_sync=NoSync)
    for _ in range(4):
        with wrapper.optim_context(parallel):
            losses = model.losses(torch.randn(4, 3))
        wrapper.update_params(sum(losses))
    assert len(entered) == 2


def test_a_model_without_a_policy_is_refused():
    with pytest.raises(ValueError, match='Linear has no DAFA'):
        build_optim_wrapper(torch.nn.Linear(2, 2), dict(optimizer=SGD, **POLICY))


def test_the_models_parameters_are_back_if_the_optimizer_fails():
    model = Model()
    with pytest.raises(ValueError):
        build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=-1), **POLICY))
    assert model.dafa.alpha is model.dafa._parameters['alpha']
