import pytest
import torch
from conftest import detection_batch, retinanet
from mmengine.logging import MessageHub

from mmkd_plugin.models.algorithms import loss_log
from mmkd_plugin.models.algorithms.loss_log import ZeroWatch


@pytest.fixture
def messages(monkeypatch):
    said = []
    monkeypatch.setattr(loss_log, 'print_log', lambda text, **_: said.append(text))
    return said


def distil(distiller, **fields):
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=retinanet(8), teacher=retinanet(16),
                allow_random_teacher=True, distiller=distiller, **fields)


def amd(**options):
    return dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=dict(scale_free=True, **options))


def losses_of(model):
    torch.manual_seed(4)
    return model(**model.data_preprocessor(detection_batch(), True), mode='loss')


def test_weights_and_schedules_multiply(build):
    MessageHub.get_instance('test')
    MessageHub.get_current_instance().update_info('max_iters', 10)
    plain = losses_of(build(distil(amd(loss_weight=1.0))))
    weighted = losses_of(build(distil(amd(loss_weight=8.0), loss_schedules={
        'loss_amd_neck_0': dict(type='constant', end_factor=0.25)})))
    for level in range(4):
        factor = 8 * (0.25 if level == 0 else 1)  # a power of two, so exact
        assert torch.equal(weighted[f'distill.loss_amd_neck_{level}'], factor * plain[f'distill.loss_amd_neck_{level}'])


def test_the_parts_of_dam_have_their_weights(build):
    weights, results = dict(detect=2., area=4., anchor=8.), []
    for factor in (1, 0):
        dam = {f'{part}_loss_weight': weight**factor for part, weight in weights.items()}
        model = build(distil(dict(type='mmkd_plugin.SoKDDistiller', layers=['neck'], base='fitnet', loss_weight=0.5,
                                  dafa=None, dam=dict(anchor='boxes', **dam))))
        results.append(losses_of(model))
        assert model.distiller.weight_of('loss_fitnet_neck_0') == 0.5
        assert {part: model.distiller.weight_of(f'loss_dam_{part}') for part in weights} == {
            part: weight**factor for part, weight in weights.items()}
    for part, weight in weights.items():
        assert results[0][f'distill.loss_dam_{part}'] == weight * results[1][f'distill.loss_dam_{part}'] != 0


def test_a_weight_of_zero_is_no_reason_for_a_warning(build, messages):
    model = build(distil(amd(loss_weight=0.0))).train()
    model._zero_watch.window = 2
    losses = [losses_of(model) for _ in range(2)][0]
    assert losses['distill.loss_amd_neck_0'] == 0 and not messages


def test_a_loss_that_stays_zero_is_told_once_by_name(build, messages):
    model = build(distil(amd())).train()
    model._zero_watch.window = 3
    for steps, told in ((2, 0), (1, 1), (6, 1)):
        for _ in range(steps):
            assert losses_of(model)['distill.loss_amd_neck_3'] == 0  # a level of one cell
        assert len(messages) == told
    assert messages[0].startswith('distill.loss_amd_neck_3 has been exactly 0 for 3 iterations')
    model.eval()
    for _ in range(9):
        losses_of(model)
    assert len(messages) == 1


def test_one_value_in_a_window_is_enough(messages):
    watch = ZeroWatch(4)
    for step in range(8):
        watch(dict(loss_a=torch.tensor(float(step % 4 == 1)), loss_b=torch.zeros(()), acc=torch.zeros(()),
                   loss_c=[torch.zeros(2), torch.tensor([0., -1.])], loss_d=torch.tensor(float('nan'))), {'loss_e'})
    assert [text.split()[0] for text in messages] == ['loss_b']


def test_a_new_loss_gets_a_whole_window(messages):
    watch = ZeroWatch(3)
    for names in (['loss_a'], ['loss_a'], ['loss_a', 'loss_b'], ['loss_a', 'loss_b']):
        watch({name: torch.zeros(()) for name in names})
    assert not messages
    watch(dict(loss_a=torch.ones(()), loss_b=torch.zeros(())))
    assert [text.split()[0] for text in messages] == ['loss_b']
    watch({})
