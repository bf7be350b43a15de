import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import detection_batch, retinanet
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch.utils.data import Dataset

POLICY = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor', policy=dict(type='Adam', lr=0.05))
MODEL = dict(
    type='mmkd_plugin.TeacherStudentDistill', architecture=retinanet(8), teacher=retinanet(16),
    allow_random_teacher=True, distiller=dict(
        type='mmkd_plugin.SoKDDistiller', layers=['neck'], dafa=dict(), dam=dict(anchor='boxes'),
        base='fitnet'))


class Images(Dataset):
    """A few images, the same in every run."""

    def __init__(self, images=4, seed=0):
        torch.manual_seed(seed)
        batches = [detection_batch(random=True) for _ in range(images // 2)]
        self.items = [dict(inputs=batch['inputs'][i], data_samples=batch['data_samples'][i])
                      for batch in batches for i in (0, 1)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return copy.deepcopy(self.items[index])


def loader(seed=0):
    return dict(batch_size=2, num_workers=0, dataset=Images(seed=seed), collate_fn=dict(type='pseudo_collate'),
                sampler=dict(type='DefaultSampler', shuffle=True))


@pytest.fixture
def train(tmp_path):
    """Trains, in a work dir of that name, and returns the runner."""
    names = []

    def train(work_dir, epochs=2, hooks=({'search_epochs': 1}, ), loop=None, policy=POLICY, resume=False, **fields):
        Visualizer._instance_dict.clear()
        torch.manual_seed(0)
        hooks = [dict(dict(type='mmkd_plugin.FreezePolicyHook'), **hook) for hook in hooks]
        names.append(f'{tmp_path.name}_{len(names)}')
        runner = Runner(
            model=copy.deepcopy(fields.pop('model', MODEL)), work_dir=str(tmp_path / work_dir), default_scope='mmdet',
            train_dataloader=loader(),
            train_cfg=loop or dict(by_epoch=True, max_epochs=epochs),
            custom_hooks=hooks, randomness=dict(seed=0), resume=resume, experiment_name=names[-1], **dict(dict(
                optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4), **policy),
                default_hooks=dict(logger=dict(type='LoggerHook', interval=1))), **fields))
        runner.train()
        runner.log = (tmp_path / work_dir / runner.timestamp / f'{runner.timestamp}.log').read_text()
        return runner

    return train


def dafa_of(runner):
    return runner.model.distiller.dafa


def test_freezes_logs_and_shows(train):
    runner = train('a', epochs=3, hooks=[dict(search_epochs=2)])
    assert dafa_of(runner).frozen and dafa_of(runner).num_draws == 6
    assert runner.log.count('The search of policy ended after 4 iterations') == 1
    assert runner.log.count('policy after 2 iterations') == 1 and runner.log.count('policy after 4 iterations') == 1
    assert 'policy after 6' not in runner.log and runner.log.count('sub-policy') == 3
    scalars = [json.loads(line) for line in (Path(runner.log_dir) / 'vis_data/scalars.json').read_text().splitlines()]
    assert [line['step'] for line in scalars if 'policy/entropy' in line] == [2, 4]
    assert len(runner.message_hub.get_scalar('policy/p/Rotate').data[0]) == 2


def test_begins_later(train):
    runner = train('a', epochs=3, hooks=[dict(search_epochs=1, begin=1)])
    assert 'The search of policy starts at epoch 1, counted from 0. Until then' in runner.log
    assert 'The search of policy starts after 2 iterations' in runner.log
    assert 'The search of policy ended after 4 iterations' in runner.log
    assert runner.log.count('policy after 4 iterations') == 1 and 'policy after 2 iterations' not in runner.log
    assert dafa_of(runner).num_draws == 4 and dafa_of(runner).num_searches == 2 and dafa_of(runner).frozen


def test_by_iterations(train):
    runner = train('a', hooks=[dict(search_iters=3)])
    assert 'The search of policy ended after 3 iterations' in runner.log
    runner = train('b', hooks=[dict(search_iters=0)])
    assert 'The search of policy ended after 0 iterations' in runner.log
    assert (dafa_of(runner).alpha == dafa_of(runner).alpha[0]).all()
    runner = train('c', hooks=[dict(search_iters=3)], loop=dict(by_epoch=False, max_iters=4))
    assert 'The search of policy ended after 3 iterations' in runner.log and 'policy after 2 it' in runner.log
    assert 'never frozen' not in runner.log


def test_a_search_as_long_as_the_run_is_warned_of(train):
    runner = train('a', epochs=2, hooks=[dict(search_epochs=2)])
    assert 'the search would end after 2 epochs, and the run has 2, so the policy is never frozen' in runner.log
    assert 'search_epochs=1' in runner.log


@pytest.mark.parametrize('search_epochs, begin', [(3, 0), (1, 0), (1, 2)])
def test_a_resumed_run_is_the_uninterrupted_one(train, search_epochs, begin):
    hooks = [dict(search_epochs=search_epochs, begin=begin)]
    whole = train('whole', epochs=4, hooks=hooks)
    first = train('first', epochs=2, hooks=hooks)
    parts = train('second', epochs=4, hooks=hooks, resume=True, load_from=f'{first.work_dir}/epoch_2.pth')
    assert 'resumed epoch: 2, iter: 4' in parts.log
    for (key, value), (_, expected) in zip(parts.model.state_dict().items(), whole.model.state_dict().items()):
        assert torch.equal(value, expected), key
    states = [runner.optim_wrapper.policy.optimizer.state_dict()['state'] for runner in (parts, whole)]
    assert float(states[0][0]['step']) == 2 * search_epochs
    for index, state in states[1].items():
        assert all(torch.equal(value, states[0][index][key]) for key, value in state.items())
    assert parts.log.count('The search of policy ended') == (search_epochs + begin == 3)
    assert dafa_of(parts).num_searches == 2 * search_epochs


def test_the_students_schedule_leaves_the_policy_alone(train):
    schedule = [dict(type='MultiStepLR', milestones=[1], gamma=0.1, by_epoch=True)]
    runner = train('a', hooks=[dict(search_epochs=2)], param_scheduler=schedule,
                   auto_scale_lr=dict(enable=True, base_batch_size=1))
    assert all(lr == pytest.approx(0.002) for lr in runner.optim_wrapper.get_lr()['student.lr'])
    assert runner.optim_wrapper.get_lr()['policy.lr'] == [0.05]
    assert 'student.lr' in runner.log or 'lr: ' in runner.log


def test_mmrazors_stop_distill_hook(train):
    stop = dict(type='mmrazor.StopDistillHook', stop_epoch=1)
    runner = train('a', hooks=[stop, dict(search_epochs=2)])
    assert runner.model.distillation_stopped and dafa_of(runner).num_draws == 2
    assert runner.log.count('loss_unused: 0.0000') == 2  # of four steps


def test_a_held_out_split_with_mmrazors_loop(train):
    loop = dict(type='mmrazor.DartsEpochBasedTrainLoop', max_epochs=3)
    runner = train('a', hooks=[dict(search_epochs=2)], loop=dict(loop, mutator_dataloader=loader(seed=5)))
    assert dafa_of(runner).num_draws == 6 and dafa_of(runner).num_searches == 4
    on_others = dafa_of(train('b', hooks=[dict(search_epochs=2)], loop=dict(loop, mutator_dataloader=loader())))
    assert dafa_of(runner).alpha.std() > 0 and not torch.equal(dafa_of(runner).alpha, on_others.alpha)


@pytest.mark.parametrize('hook, message', [
    (dict(), 'either search_epochs or search_iters'),
    (dict(search_epochs=1, search_iters=1), 'either search_epochs or search_iters'),
    (dict(search_epochs=-1), 'search_epochs must be.*-1'),
    (dict(search_iters=0.5), 'search_iters must be.*0.5'),
    (dict(search_iters=1, begin=-1), 'begin must be.*-1'),
])
def test_wrong_lengths_are_refused(train, hook, message):
    with pytest.raises(ValueError, match=message):
        train('a', hooks=[hook])


def test_a_policy_in_the_students_optimizer_is_refused(train):
    with pytest.raises(ValueError, match='PolicyOptimWrapperConstructor'):
        train('a', policy={})


def test_epochs_in_an_iteration_based_loop_are_refused(train):
    loop = dict(type='IterBasedTrainLoop', max_iters=4, val_interval=5)
    with pytest.raises(ValueError, match='search_epochs: IterBasedTrainLoop does not count epochs.*search_iters'):
        train('a', hooks=[dict(search_epochs=1)], loop=loop)
    runner = train('b', hooks=[dict(search_iters=3)], loop=loop)
    assert dafa_of(runner).frozen and dafa_of(runner).num_searches == 3


def test_a_model_without_a_policy_is_refused(train):
    model = copy.deepcopy(MODEL)
    model['distiller']['dafa'] = None
    with pytest.raises(ValueError, match='FreezePolicyHook: TeacherStudentDistill has no DAFA'):
        train('a', policy={}, model=model)
