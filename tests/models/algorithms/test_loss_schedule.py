import pytest
from mmengine.logging import MessageHub

from mmkd_plugin.models.algorithms.loss_schedule import LossSchedule, build_schedules


def at(schedule, iteration, max_iters=100, max_epochs=10):
    hub = MessageHub.get_instance('test')
    hub.update_info('iter', iteration)
    hub.update_info('max_iters', max_iters)
    hub.update_info('max_epochs', max_epochs)
    return schedule()


@pytest.mark.parametrize('options, expected', [
    (dict(start_factor=0, end=50), {0: 0, 25: 0.5, 50: 1, 99: 1}),  # warm-up
    (dict(end_factor=0), {0: 1, 50: 0.5, 100: 0}),  # decay to zero at the end of training
    (dict(end_factor=0, begin=40, end=60), {0: 1, 40: 1, 50: 0.5, 60: 0, 90: 0}),
    (dict(type='cosine', end_factor=0), {0: 1, 25: 0.8535533905932737, 50: 0.5, 100: 0}),
    (dict(type='constant', end_factor=0.3), {0: 0.3, 77: 0.3}),
    (dict(start_factor=0, end=2, by_epoch=True), {0: 0, 10: 0.5, 20: 1, 30: 1}),
], ids=str)
def test_factor(options, expected):
    schedule = LossSchedule(**options)
    assert {i: at(schedule, i) for i in expected} == pytest.approx(expected)


def test_outside_a_runner_it_is_at_its_beginning():
    assert LossSchedule(start_factor=0.25)() == 0.25


def test_patterns_and_lists():
    losses = ['loss_amd_neck_0', 'loss_amd_neck_1', 'loss_kd']
    schedules = build_schedules({'loss_amd*': [dict(start_factor=0, end=10), dict(end_factor=0, begin=90)],
                                 'loss_kd': dict(end_factor=0)}, losses)
    assert {name: len(entries) for name, entries in schedules.items()} == {
        'loss_amd_neck_0': 2, 'loss_amd_neck_1': 2, 'loss_kd': 1}


@pytest.mark.parametrize('options', [dict(type='exp'), dict(start_factor=-1), dict(end_factor='0'), dict(begin=-1),
                                     dict(begin=5, end=5)], ids=str)
def test_nonsense_is_refused(options):
    with pytest.raises(ValueError, match='loss_schedules'):
        LossSchedule(**options)
