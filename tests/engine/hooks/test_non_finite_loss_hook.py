"""A loss that is no number stops the run before the weights are touched."""
import copy
import re

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from test_freeze_policy_hook import MODEL, train  # noqa: F401

HOOK = dict(logger=dict(type='LoggerHook', interval=1), non_finite_loss=dict(type='mmkd_plugin.NonFiniteLossHook'))


class Spoil(Hook):
    """Makes the third step's loss NaN or infinite by an input that is, and remembers the weights before."""

    def __init__(self, value, at=2):
        self.value, self.at = value, at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            self.before = copy.deepcopy(runner.model.state_dict())
            data_batch['inputs'][0] = torch.full(data_batch['inputs'][0].shape, self.value)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_stops_before_the_step_with_names_and_inputs(train, value):  # noqa: F811
    spoil = Spoil(value)
    with pytest.raises(FloatingPointError) as error:
        train('a', epochs=3, default_hooks=dict(HOOK, spoil=spoil))
    said = str(error.value)
    assert said.startswith('iteration 3: ') and 'student.loss_cls is ' in said and 'distill.loss_fitnet' in said
    assert re.search(r'shape \(2, 3, 64, 64\), range .* \d+ values that are not finite', said)


@pytest.mark.parametrize('search_epochs', [1, 3], ids=['frozen', 'in search'])
def test_the_weights_are_those_of_the_step_before(train, search_epochs):  # noqa: F811
    torch.compile(lambda: 0, backend='eager')()  # after which torch calls no hooks of optimisers any more
    spoil, seen = Spoil(float('nan')), []

    class Keep(Hook):
        def before_train(self, runner):
            seen.append(runner.model)

    with pytest.raises(FloatingPointError):
        train('b', epochs=3, hooks=[dict(search_epochs=search_epochs)], default_hooks=dict(
            HOOK, spoil=spoil, keep=Keep()))
    after = seen[0].state_dict()
    parameters = dict(seen[0].named_parameters())
    assert parameters and all(torch.equal(after[name], spoil.before[name]) for name in parameters)


def test_says_so_within_accumulation(train):  # noqa: F811
    with pytest.raises(FloatingPointError, match='iteration 3: '):
        train('c', epochs=3, default_hooks=dict(HOOK, spoil=Spoil(float('nan'))),
              optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01), accumulative_counts=4,
                                 constructor='mmkd_plugin.PolicyOptimWrapperConstructor'))


def test_a_scaler_skips_and_the_run_goes_on(train):  # noqa: F811
    @OPTIM_WRAPPERS.register_module()
    class Scaled(OptimWrapper):
        """Skips what is not finite as AmpOptimWrapper does, which needs a GPU."""

        loss_scaler = None

        def step(self, **kwargs):
            if all(parameter.grad is None or parameter.grad.isfinite().all()
                   for group in self.param_groups for parameter in group['params']):
                super().step(**kwargs)

    try:
        model = dict(MODEL, distiller=dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=dict(scale_free=True)))
        runner = train('d', epochs=3, hooks=[], model=model, policy={},
                       default_hooks=dict(HOOK, spoil=Spoil(float('nan'))),
                       optim_wrapper=dict(type='Scaled', optimizer=dict(type='SGD', lr=0.01)))
    finally:
        OPTIM_WRAPPERS.module_dict.pop('Scaled')
    assert runner.iter == 6 and all(value.isfinite().all() for value in dict(runner.model.named_parameters()).values())


def test_a_scaler_does_not_skip_for_ever(train, monkeypatch):  # noqa: F811
    monkeypatch.setattr('mmkd_plugin.engine.hooks.non_finite_loss_hook.PATIENCE', 2)
    monkeypatch.setattr(OptimWrapper, 'loss_scaler', None, raising=False)
    with pytest.raises(FloatingPointError, match='iteration 4: '):
        train('g', epochs=3, default_hooks=dict(HOOK, a=Spoil(float('nan')), b=Spoil(float('nan'), at=3)))


def test_costs_no_bit(train):  # noqa: F811
    plain = train('e', epochs=1).model.state_dict()
    checked = train('f', epochs=1, default_hooks=HOOK).model.state_dict()
    assert all(torch.equal(value, checked[name]) for name, value in plain.items())
