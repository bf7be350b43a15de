import copy
import random
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import classification_batch, classifier, detection_batch, retinanet
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch.utils.data import Dataset

from mmkd_plugin.visualization.distill_pictures import MapView, draw_policy, draw_views, look, rgb_image


def distil(student, teacher, **distiller):
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student, teacher=teacher,
                allow_random_teacher=True, distiller=distiller)


SOKD = distil(retinanet(8, levels=3), retinanet(16, levels=3, mean=[0.] * 3, std=[255.] * 3),
              type='mmkd_plugin.SoKDDistiller', layers=['neck'], dafa=dict(), dam=dict(anchor='boxes'),
              base='fitnet')
ONE_MAP = dict(SOKD, distiller=dict(SOKD['distiller'], layers=['backbone.layer3']))
AMD = distil(classifier(8), classifier(16), type='mmkd_plugin.AMDDistiller',
             layers=['backbone.layer1', 'backbone.layer4'])
KD = distil(classifier(8), classifier(16), type='mmrazor.ConfigurableDistiller',
            student_recorders=dict(fc=dict(type='ModuleOutputs', source='head.fc')),
            teacher_recorders=dict(fc=dict(type='ModuleOutputs', source='head.fc')),
            distill_losses=dict(loss_kd=dict(type='KLDivergence')),
            loss_forward_mappings=dict(loss_kd=dict(preds_S=dict(from_student=True, recorder='fc'),
                                                    preds_T=dict(from_student=False, recorder='fc'))))
POLICY = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor', policy=dict(type='Adam', lr=0.05))
FREEZE = dict(type='mmkd_plugin.FreezePolicyHook', search_iters=3)


class Images(Dataset):
    """A few images; in validation, chance has a hand in them."""

    def __init__(self, batch, noisy):
        self.batch, self.noisy = batch, noisy

    def __len__(self):
        return len(self.batch['inputs'])

    def __getitem__(self, index):
        item = copy.deepcopy({key: values[index] for key, values in self.batch.items()})
        if self.noisy:
            noise = random.randrange(2) + np.random.randint(2) + torch.randint(2, (3, 1, 1))
            item['inputs'] = (item['inputs'] // 2 + noise).to(torch.uint8)
        return item


def loaders(batch, collate, metric):
    def loader(noisy):
        return dict(batch_size=2, num_workers=0, dataset=Images(batch, noisy), collate_fn=dict(type=collate),
                    sampler=dict(type='DefaultSampler', shuffle=not noisy))
    return dict(train_dataloader=loader(False), val_dataloader=loader(True), val_cfg=dict(), val_evaluator=metric)


def detection():
    torch.manual_seed(5)
    return dict(loaders(detection_batch(samples=4), 'pseudo_collate', dict(type='CocoMetric')),
                default_scope='mmdet', model=copy.deepcopy(ONE_MAP), hooks=[FREEZE], optim=POLICY)


def classification():
    torch.manual_seed(5)
    return dict(loaders(classification_batch(size=32), 'default_collate', dict(type='Accuracy')),
                default_scope='mmpretrain', model=copy.deepcopy(AMD), hooks=[], optim={})


@pytest.fixture
def train(tmp_path):
    """Trains, in a work dir of that name, and returns the runner; ``draw`` are arguments of the hook."""
    names = []

    def train(work_dir, draw=None, data=detection, epochs=2, **fields):
        Visualizer._instance_dict.clear()
        names.append(f'{tmp_path.name}_{len(names)}')
        fields = dict(data(), **fields)
        hooks = fields.pop('hooks')
        if draw is not None:
            hooks = [*hooks, dict(draw, type='mmkd_plugin.DistillVisualizationHook')]
        optim = dict(dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)), **fields.pop('optim'))
        runner = Runner(work_dir=str(tmp_path / work_dir), custom_hooks=hooks, optim_wrapper=copy.deepcopy(optim),
                        train_cfg=dict(by_epoch=True, max_epochs=epochs, val_begin=100), randomness=dict(seed=0),
                        experiment_name=names[-1], **fields)
        runner.train()
        return runner

    return train


def pictures(runner):
    """Returns the files of a run, in RGB, by name."""
    paths = Path(runner.log_dir).glob('vis_data/vis_image/*.png')
    return {path.stem: cv2.imread(str(path))[..., ::-1] for path in paths}


def item_of(batch, index=0):
    return {key: values[index] for key, values in batch.items()}


def views_of(model, batch, index=0):
    """Returns the views of one image of a batch, and its raw item."""
    item = item_of(batch, index)
    data = model.data_preprocessor(dict(inputs=[item['inputs']], data_samples=[copy.deepcopy(item['data_samples'])]))
    model.eval()
    with torch.no_grad():
        return look(model, data['inputs'], data['data_samples'], tuple(item['inputs'].shape[1:]))


@pytest.mark.parametrize('optim', [{}, dict(accumulative_counts=2, type='AmpOptimWrapper', dtype='bfloat16')])
def test_training_is_the_same_to_the_bit(train, optim, monkeypatch):
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    optim = dict(POLICY, **optim)
    states = []
    for work_dir, draw in (('without', None), ('with', dict(interval=1, num_images=1))):
        runner = train(work_dir, draw, optim=optim)
        adam = runner.optim_wrapper.policy.optimizer.state_dict()['state']
        states.append(dict(
            runner.model.state_dict(), torch=torch.get_rng_state(), python=torch.tensor(random.getstate()[1]),
            numpy=torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
            adam=torch.cat([value.flatten() for state in adam.values() for value in state.values()]),
            modes=torch.tensor([module.training for module in runner.model.modules()])))
        assert runner.model.distiller.dafa.num_draws == 4
    assert len(pictures(runner)) == 5 + 4  # of an image; of the policy, until it is frozen
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    hidden = {key: value for key, value in runner.message_hub.runtime_info.items() if key.startswith('policy')}
    assert list(hidden) == ['policy_history']


def test_when_and_where_pictures_are_drawn(train):
    runner = train('a', dict(interval=3))
    drawn = pictures(runner)
    assert set(drawn) == {f'{name}_{i}' for name in ('distill_0', 'distill_1') for i in (0, 3, 4)} | {
        f'distill_policy_{i}' for i in (0, 3)}
    assert all(image.shape[0] > 300 and image.shape[1] > 900 for image in drawn.values())
    assert all((drawn['distill_0_0'] != drawn[name]).any() for name in ('distill_0_4', 'distill_1_0'))
    assert len(pictures(train('b', dict(num_images=9), epochs=1))) == 2 * 4 + 2  # all images there are; first and last


def test_a_classifier_with_amd(train):
    assert set(pictures(train('a', dict(num_images=1), classification))) == {'distill_0_0', 'distill_0_4'}


def test_tensorboard(train):
    pytest.importorskip('tensorboard', reason='the visualizer offers TensorBoard only where it is installed')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    runner = train('a', dict(interval=2, num_images=1), visualizer=dict(
        type='Visualizer', vis_backends=[dict(type='TensorboardVisBackend')]))
    runner.visualizer.close()
    events = EventAccumulator(f'{runner.log_dir}/vis_data')
    events.Reload()
    assert [event.step for event in events.Images('distill_0')] == [0, 2, 4]
    assert [event.step for event in events.Images('distill_policy')] == [0, 2, 3]
    png = np.frombuffer(events.Images('distill_0')[-1].encoded_image_string, np.uint8)
    assert (cv2.imdecode(png, cv2.IMREAD_COLOR).std((0, 1)) > 10).all()


def test_the_policys_history_goes_on_after_a_resume(train):
    def history(runner):
        return runner.message_hub.get_info('policy_history')

    whole = train('whole', dict(interval=1, num_images=1))
    assert list(history(whole)['states']) == [0, 1, 2, 3] and history(whole)['frozen'] == 3
    assert history(whole)['states'][0]['p/Rotate'] == pytest.approx(1 / 9)  # 8 of 36 sub-policies, half the time
    assert history(whole)['states'][3] == whole.model.distiller.dafa.state() != history(whole)['states'][2]
    first = train('first', dict(interval=1, num_images=1), epochs=1)
    assert list(history(first)['states']) == [0, 1, 2] and history(first)['frozen'] is None
    second = train('second', dict(interval=1, num_images=1), resume=True, load_from=f'{first.work_dir}/epoch_1.pth')
    assert history(second) == history(whole)
    assert (pictures(second)['distill_policy_3'] == pictures(whole)['distill_policy_3']).all()
    third = train('third', dict(num_images=1), epochs=3, resume=True, load_from=f'{second.work_dir}/epoch_2.pth')
    assert history(third) == history(whole) and set(pictures(third)) == {
        'distill_0_4', 'distill_0_6', 'distill_policy_4'}


def test_views_are_what_the_networks_put_out(build):
    model = build(SOKD)
    item = item_of(detection_batch(size=64))
    item['inputs'] = item['inputs'][:, :40, :50]  # padded to 64 x 64
    item['data_samples'].set_metainfo(dict(img_shape=(40, 50)))
    batch = {key: [value] for key, value in item.items()}
    raw = item['inputs'].flip(0).float()  # the teacher's own preprocessing, by hand
    own = F.pad(raw / 255, (0, 14, 0, 24))
    views = views_of(model, batch)
    data = model.data_preprocessor(copy.deepcopy(batch))
    with torch.no_grad():
        t_maps, s_maps = model.teacher.extract_feat(own[None]), model.student.extract_feat(data['inputs'])
    sizes = [(5, 7), (3, 4), (2, 2)]
    for level, (view, s_map, t_map, cells) in enumerate(zip(views, s_maps, t_maps, sizes, strict=True)):
        stride = 8 * 2**level
        assert view.name == f'neck, level {level}' and view.stride == (stride, stride)
        for attention, feature in ((view.s_attention, s_map), (view.t_attention, t_map)):
            expected = (feature[0]**2).mean(0)[:cells[0], :cells[1]]
            torch.testing.assert_close(torch.from_numpy(attention), expected, rtol=1e-4, atol=1e-7)
    dam = model.distiller.dams['neck']
    with torch.no_grad():
        levels = dam.detect(dam.adapt(s_maps), list(t_maps))
    for level, view in zip(levels, views):
        rows, columns = view.t_attention.shape
        for given, expected in ((view.s_heatmap, level['s_heatmap'][0, :rows, :columns]),
                                (view.t_heatmap, level['t_heatmap'][0, :rows, :columns]),
                                (view.boxes, level['boxes'][0, level['valid'][0]].double() * view.stride[0]),
                                (view.scores, level['scores'][0, level['valid'][0]])):
            torch.testing.assert_close(torch.from_numpy(given), expected, rtol=1e-4, atol=1e-7)


def test_a_look_leaves_nothing_behind(build):
    model = build(SOKD)
    before = copy.deepcopy(model.state_dict())
    hooks = [len(module._forward_hooks) for network in (model.student, model.teacher) for module in network.modules()]
    views_of(model, detection_batch())
    assert hooks == [len(module._forward_hooks) for network in (model.student, model.teacher)
                     for module in network.modules()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for recorders in (model.distiller.student_recorders, model.distiller.teacher_recorders):
        assert not any(recorder.data_buffer for recorder in recorders.recorders.values())
    assert model.distiller._outputs is None and model.distiller.dafa.last_draw is None


@pytest.mark.parametrize('distiller, names', [
    (dict(layers=['neck'], dafa=dict(), dam=None, base='at'),
     [f'neck, level {i}' for i in range(3)]),
    (dict(layers=['backbone.layer2', 'backbone.layer3'], dafa=dict(), dam=dict(anchor='boxes'),
          base='reviewkd'), ['backbone.layer2', 'backbone.layer3']),
])
def test_other_sokd_is_seen_too(build, distiller, names):
    model = dict(SOKD, distiller=dict(distiller, type='mmkd_plugin.SoKDDistiller'))
    views = views_of(build(model), detection_batch())
    assert [view.name for view in views] == names
    assert all((view.boxes is None) == (distiller['dam'] is None) for view in views)


def test_colours(build):
    detector, of_rgb = build(SOKD).data_preprocessor, build(SOKD).data_preprocessor
    of_rgb._channel_conversion = False
    batch = detection_batch()
    red = torch.zeros(3, 4, 6, dtype=torch.uint8)
    red[2] = 200  # BGR, as MMCV reads a file
    item = dict(inputs=red, data_samples=batch['data_samples'][0])
    assert rgb_image(item, detector).shape == (4, 6, 3) and (rgb_image(item, detector) == [200, 0, 0]).all()
    assert (rgb_image(item, of_rgb) == [0, 0, 200]).all()
    item['data_samples'].set_metainfo(dict(img_path='a.jpg'))
    assert (rgb_image(item, of_rgb) == [200, 0, 0]).all()
    assert (rgb_image(dict(item, inputs=red[2:]), detector) == 200).all()
    normalised = torch.tensor([-1., 0., 1.]).view(3, 1, 1).expand(3, 4, 6)
    assert (rgb_image(dict(item, inputs=normalised), detector) == [255, 127, 0]).all()


def test_a_picture_shows_image_boxes_and_maps():
    image = np.full((40, 80, 3), [200, 100, 0], np.uint8)
    attention = np.zeros((5, 10))
    attention[0, 0] = 1
    view = MapView('neck', (8., 8.), attention, attention)
    plain = draw_views(image, [view], 'title')
    assert (plain == [200, 100, 0]).all(2).sum() > 10_000
    lime = (draw_views(image, [view._replace(
        t_heatmap=attention, s_heatmap=attention, boxes=np.array([[20., 10, 60, 30]]), scores=np.array([0.5]))],
        'title') == [0, 255, 0]).all(2)
    rows, columns = np.flatnonzero(lime.any(1)), np.flatnonzero(lime.any(0))
    width, height = columns[-1] - columns[0], rows[-1] - rows[0]
    assert width == pytest.approx(2 * height, rel=0.05) and 100 < width < 200
    drawn = draw_views(image, [view, view], 'title')
    assert drawn.shape[0] > plain.shape[0] and drawn.shape[1] == plain.shape[1] and abs(plain.shape[1] - 990) <= 1
    nothing = attention * np.nan
    draw_views(image, [MapView('neck', (8., 8.), *[nothing] * 4, np.zeros((0, 4)), np.zeros(0))], 'diverged')


def test_a_policy_is_drawn_as_curves():
    states = {i: {'entropy': 1 - i / 100, 'p/Rotate': 0.1 + i / 100, 'p/Noise': 0.1, 'm/Noise': 0.5} for i in (0, 10)}
    blue, orange = (31, 119, 180), (255, 127, 14)  # matplotlib's C0, C1

    def ends(image, colour):
        """Of a curve, left of the legend: the rows of its first and last column."""
        rows, columns = np.nonzero(np.abs(image[:, :780].astype(int) - colour).sum(2) < 30)
        return rows[columns.argmin()], rows[columns.argmax()]

    searching, frozen = draw_policy(states), draw_policy(states, 10)
    assert (searching != frozen).any()
    (first, last), (flat_first, flat_last) = ends(searching, blue), ends(searching, orange)
    assert last + 150 < first and abs(flat_first - flat_last) < 10 and abs(first - flat_first) < 20


@pytest.mark.parametrize('draw, message', [
    (dict(interval=0), 'DistillVisualizationHook.interval must be a whole number >= 1, got 0'),
    (dict(interval=1.5), 'interval must be.*1.5'),
    (dict(num_images=0), 'num_images must be a whole number >= 1, got 0'),
])
def test_wrong_arguments_are_refused(train, draw, message):
    with pytest.raises(ValueError, match=message):
        train('a', draw, classification)


@pytest.mark.parametrize('fields, message', [
    (dict(model=classifier(8)), 'pictures need mmkd_plugin.TeacherStudentDistill, got ImageClassifier'),
    (dict(model=KD), 'ConfigurableDistiller has no layers, so there are no feature maps to draw'),
    (dict(val_dataloader=None, val_cfg=None, val_evaluator=None), 'val_dataloader is None'),
])
def test_what_cannot_be_drawn_is_refused(train, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train('a', {}, classification, **copy.deepcopy(fields))
