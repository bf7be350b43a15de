import copy
from functools import partial

import numpy as np
import pytest
import torch
from conftest import classification_batch, classifier, retinanet
from conftest import detection_batch as any_detection_batch
from mmdet.structures import DetDataSample
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from mmengine.visualization import Visualizer
from mmpretrain.structures import DataSample
from torch.utils.data import Dataset

from mmkd_plugin.models.algorithms.second_batch import WithUnlabelled

PKD = dict(type='mmkd_plugin.FeatureDistiller', layers=['neck'], base='pkd')
SOKD = dict(type='mmkd_plugin.SoKDDistiller', layers=['neck'], dafa=dict(), dam=dict(anchor='boxes'), base='fitnet')
POLICY = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor', policy=dict(type='Adam', lr=0.05))
KD = dict(
    type='ConfigurableDistiller',
    student_recorders=dict(fc=dict(type='ModuleOutputs', source='head.fc')),
    teacher_recorders=dict(fc=dict(type='ModuleOutputs', source='head.fc')),
    distill_losses=dict(loss_kd=dict(type='KLDivergence', tau=2, loss_weight=3.0)),
    loss_forward_mappings=dict(loss_kd=dict(preds_S=dict(from_student=True, recorder='fc'),
                                            preds_T=dict(from_student=False, recorder='fc'))))
EPOCHS = 'mmkd_plugin.UnlabelledEpochBasedTrainLoop'
ITERATIONS = 'mmkd_plugin.UnlabelledIterBasedTrainLoop'
detection_batch = partial(any_detection_batch, random=True)


def distillation(network=retinanet, distiller=PKD, **fields):
    return dict(dict(type='mmkd_plugin.TeacherStudentDistill', architecture=network(8), teacher=network(16),
                     allow_random_teacher=True, distiller=distiller), **fields)


def without_labels(batch):
    """As the pipelines of the two libraries pack an image of which no annotation was loaded."""
    detector = isinstance(batch['data_samples'][0], DetDataSample)
    samples = [DetDataSample(metainfo=sample.metainfo, gt_instances=InstanceData()) if detector else DataSample()
               for sample in batch['data_samples']]
    return dict(inputs=batch['inputs'], data_samples=samples)


def losses_of(model, *batches):
    """Returns what a train step gets for these batches, from equal parameters and random numbers."""
    torch.manual_seed(1)
    data = model.data_preprocessor(WithUnlabelled(*batches) if len(batches) == 2 else batches[0], True)
    return model(**data, mode='loss')


def values_of(losses):
    return {name: float(sum(value) if isinstance(value, list) else value) for name, value in losses.items()}


@pytest.mark.parametrize('scope, network, distiller, batch', [
    ('mmdet', retinanet, PKD, detection_batch), ('mmpretrain', classifier, KD, classification_batch)])
def test_unlabelled_images_add_the_losses_that_they_would_have_with_labels(build, scope, network, distiller, batch):
    model = build(distillation(network, distiller), scope).train()
    labelled, first, second = batch(), batch(), batch()
    alone, with_first, with_second = (values_of(losses_of(model, labelled, *others)) for others in (
        (), [without_labels(first)], [without_labels(second)]))
    assert {name: value for name, value in with_first.items() if not name.startswith('unlabelled.')} == alone
    as_labelled = values_of(losses_of(model, first))
    names = [name for name in as_labelled if name.startswith('distill.loss')]
    assert names and len(with_first) == len(alone) + len(names)
    for name in names:
        other = name.replace('distill', 'unlabelled')
        assert with_first[other] == pytest.approx(as_labelled[name], rel=1e-5)
        assert as_labelled[name] == 0 or with_first[other] != with_second[other]
    assert values_of(losses_of(model, labelled, first)) == with_first  # labels are not read


def test_a_part_of_the_student_runs_and_batch_norm_sees_each_batch_by_itself(build):
    model = build(distillation()).train()
    norm, calls = model.student.backbone.bn1, []
    norm.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output.clone())))
    model.student.bbox_head.register_forward_hook(lambda *_: calls.append('head'))
    batch = detection_batch(samples=4)
    small = {key: value[:2] for key, value in detection_batch().items()}
    losses = losses_of(model, batch, without_labels(small))
    assert [call if call == 'head' else len(call[0]) for call in calls] == [4, 'head', 2]
    for inputs, output in (calls[0], calls[2]):
        mean = inputs.mean((0, 2, 3), keepdim=True)
        std = (inputs.var((0, 2, 3), unbiased=False, keepdim=True) + norm.eps).sqrt()
        torch.testing.assert_close(output, (inputs - mean) / std)
    expected = torch.zeros(len(norm.running_mean))
    for inputs, _ in (calls[0], calls[2]):
        expected = 0.9 * expected + 0.1 * inputs.mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, expected)
    sum(value for name, value in losses.items() if name.startswith('unlabelled')).backward()
    assert model.student.backbone.conv1.weight.grad.abs().max() > 0
    assert model.student.bbox_head.retina_cls.weight.grad is None


def test_sokd_without_anchor_and_search(build):
    model = build(distillation(distiller=SOKD)).train()
    with_boxes = values_of(losses_of(model, detection_batch(), without_labels(detection_batch())))
    names = {name.removeprefix('unlabelled.') for name in with_boxes if name.startswith('unlabelled.')}
    assert names == {name.removeprefix('distill.') for name in with_boxes if name.startswith('distill.')} - {
        'loss_dam_anchor', 'loss_aug'} and {'loss_dam_area', 'loss_dam_detect'} < names
    assert model.distiller.dafa.num_draws == 2


def test_an_agreeing_policy_learns_from_the_labelled_images(build):
    policies = []
    for unlabelled in (detection_batch(), detection_batch()):
        model = build(distillation(distiller=dict(SOKD, dafa=dict(objective='agreement')))).train()
        wrapper = build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=0.01), **POLICY))
        torch.manual_seed(3)
        model.train_step(WithUnlabelled(detection_batch(), without_labels(unlabelled)), wrapper)
        policies.append(model.distiller.dafa.alpha.detach().clone())
    assert torch.equal(*policies) and policies[0].std() > 0


def test_the_schedule_of_a_loss_holds_for_both_batches(build):
    model = build(distillation(loss_schedules={'loss_pkd_neck_0': dict(start_factor=0.25)})).train()
    plain = build(distillation()).train()
    batches = detection_batch(), without_labels(detection_batch())
    found, expected = values_of(losses_of(model, *batches)), values_of(losses_of(plain, *batches))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value * (0.25 if name.endswith('loss_pkd_neck_0') else 1))


def test_mixup_leaves_unlabelled_images_alone(build):
    student = classifier(8, train_cfg=dict(augments=dict(type='Mixup', alpha=1.0)))
    student['head'].update(cal_acc=False, loss=dict(type='mmpretrain.CrossEntropyLoss', use_soft=True))
    model = build(dict(distillation(classifier, KD), architecture=student), 'mmpretrain').train()
    labelled, unlabelled = classification_batch(), without_labels(classification_batch())
    seen = []
    model.student.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    losses_of(model, labelled, unlabelled)
    mixed, plain = ([data['inputs'] for data in (model.data_preprocessor(copy.deepcopy(batch), False)
                                                 for batch in (labelled, unlabelled))])
    assert not torch.equal(seen[0], mixed) and torch.equal(seen[1], plain)


class Images(Dataset):
    """A few images with noise that differs every time; the same in every run."""

    def __init__(self, images, labelled, batch=detection_batch, seed=0):
        torch.manual_seed(seed)
        batches = [batch(samples=2) for _ in range((images + 1) // 2)]
        batches = batches if labelled else map(without_labels, batches)
        self.items = [dict(inputs=batch['inputs'][i], data_samples=batch['data_samples'][i])
                      for batch in batches for i in (0, 1)][:images]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = copy.deepcopy(self.items[index])
        item['inputs'] = item['inputs'] // 2 + np.random.randint(100)
        return item


def loader(images, labelled=False, workers=0, batch=detection_batch, **fields):
    return dict(dict(
        batch_size=2, num_workers=workers, persistent_workers=workers > 0, collate_fn=dict(type='pseudo_collate'),
        dataset=Images(images, labelled, batch), sampler=dict(type='DefaultSampler', shuffle=True)), **fields)


@pytest.fixture
def make(tmp_path):
    """Makes a runner with a work dir of that name."""
    def make(name, loop, model=None, scope='mmdet', batch=detection_batch, **fields):
        Visualizer._instance_dict.clear()
        torch.manual_seed(0)
        return Runner(
            model=copy.deepcopy(model or distillation()), work_dir=str(tmp_path / name), default_scope=scope,
            train_dataloader=loader(4, True, batch=batch), train_cfg=loop, randomness=dict(seed=0),
            custom_hooks=[dict(type='mmkd_plugin.ReseedHook')], experiment_name=f'{tmp_path.name}_{name}', **dict(dict(
                default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=loop['type'] == EPOCHS)),
                optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))), **fields))

    return make


@pytest.mark.parametrize('kind, workers, scope, network, distiller, batch', [
    (EPOCHS, 1, 'mmdet', retinanet, PKD, detection_batch),
    (EPOCHS, 0, 'mmpretrain', classifier, KD, classification_batch),
    (ITERATIONS, 0, 'mmdet', retinanet, PKD, detection_batch),
])
def test_a_resumed_run_is_the_uninterrupted_one(make, kind, workers, scope, network, distiller, batch):
    """With one unlabelled batch, two of three images, so that their loader begins anew with every step."""
    def train(name, length, **fields):
        key = 'max_epochs' if kind == EPOCHS else 'max_iters'
        runner = make(name, {'type': kind, key: length, 'unlabelled_dataloader': loader(
            3, workers=workers, batch=batch, drop_last=True)}, distillation(network, distiller), scope, batch, **fields)
        seen = []
        runner.model.student.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        runner.train()
        return runner, seen

    whole, images = train('whole', 4)
    first, _ = train('first', 2)
    file = f'{first.work_dir}/{"epoch" if kind == EPOCHS else "iter"}_2.pth'
    second, rest = train('second', 4, resume=True, load_from=file)
    assert second.iter == whole.iter == (8 if kind == EPOCHS else 4)
    assert len(images) == 2 * whole.iter and len(rest) == len(images) // 2
    assert all(map(torch.equal, images[len(rest):], rest))
    for (key, value), (_, expected) in zip(second.model.state_dict().items(), whole.model.state_dict().items()):
        assert torch.equal(value, expected), key


def test_a_folder_of_images(make, tmp_path):
    import mmcv
    for i in range(3):
        mmcv.imwrite(np.full((40, 60, 3), 40 * i, np.uint8), str(tmp_path / f'images/{i}.png'))
    folder = dict(type='mmpretrain.CustomDataset', data_root=str(tmp_path / 'images'), with_label=False, pipeline=[
        dict(type='LoadImageFromFile'), dict(type='mmdet.Resize', scale=(64, 64), keep_ratio=True),
        dict(type='mmdet.PackDetInputs')])
    runner = make('folder', dict(type=EPOCHS, max_epochs=1, unlabelled_dataloader=loader(1, dataset=folder)))
    runner.train()
    assert 0 < runner.message_hub.get_scalar('train/unlabelled.loss_pkd_neck_0').current() < 100


def test_losses_that_read_labels_skip_them(build, make, caplog):
    inside = copy.deepcopy(KD)
    for network in ('student', 'teacher'):
        inside[f'{network}_recorders']['inputs'] = dict(type='ModuleInputs', source='')
    inside['distill_losses']['loss_labels'] = dict(type='L1Loss')
    inside['loss_forward_mappings']['loss_labels'] = dict(
        s_feature=dict(from_student=True, recorder='inputs', data_idx=1),
        t_feature=dict(from_student=False, recorder='inputs', data_idx=1))
    model = build(distillation(classifier, inside), 'mmpretrain').train()
    assert model.teachers[''].unlabelled.losses == ['loss_kd']
    assert model.teachers[''].unlabelled.skipped == ['loss_labels']
    model.distiller.distill_losses['loss_labels'] = Labels()
    names = {name for name in losses_of(model, classification_batch(), without_labels(classification_batch()))
             if name.startswith(('distill', 'unlabelled'))}
    assert names == {'distill.loss_kd', 'distill.loss_labels', 'unlabelled.loss_kd'}


class Labels(torch.nn.Module):
    def forward(self, s_feature, t_feature):
        return torch.stack([sample.gt_label.float() for sample in s_feature]).mean()


def in_the_loss_only():
    recorders = dict(loss=dict(type='ModuleOutputs', source='head.loss_module'))
    return dict(
        type='ConfigurableDistiller', student_recorders=recorders, teacher_recorders=recorders,
        distill_losses=dict(loss_l1=dict(type='L1Loss')), loss_forward_mappings=dict(loss_l1=dict(
            s_feature=dict(from_student=True, recorder='loss'), t_feature=dict(from_student=False, recorder='loss'))))


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_activation_checkpointing_is_refused_with_several_processes(make, one_process):
    model = distillation()
    for with_cp in (True, False):
        model['architecture']['backbone']['with_cp'] = with_cp
        runner = make(f'cp_{with_cp}', dict(type=EPOCHS, max_epochs=1, unlabelled_dataloader=loader(2)), model)
        runner.model = MMDistributedDataParallel(runner.model, device_ids=None)
        if with_cp:
            with pytest.raises(ValueError, match='^train_cfg.type: with several processes, .*Set with_cp=False'):
                runner.train()
        else:
            runner.train()


def test_processes_with_seeds_of_their_own_shuffle_alike(make, monkeypatch):
    runner = make('a', dict(type=EPOCHS, max_epochs=1, unlabelled_dataloader=loader(2)))
    assert runner.build_train_loop(runner._train_loop).unlabelled_dataloader.sampler.seed == 0
    runner = make('b', dict(type=EPOCHS, max_epochs=1, unlabelled_dataloader=loader(2)))
    runner._randomness_cfg['diff_rank_seed'] = True
    monkeypatch.setattr('mmengine.dataset.sampler.sync_random_seed', lambda: 7)
    assert runner.build_train_loop(runner._train_loop).unlabelled_dataloader.sampler.seed == 7


@pytest.mark.parametrize('model, options, message', [
    (distillation(), dict(unlabelled_dataloader=loader(3, drop_last=True, batch_size=4)), 'has no batch, got 3 images'),
    (distillation(), dict(mutator_dataloader=loader(2)), 'mutator_dataloader: a separate split for the policy search'),
    (retinanet(), dict(), 'got a RetinaNet, expected a TeacherStudentDistill'),
    (distillation(distiller=dict(type='ConfigurableDistiller')), dict(), 'no distillation loss .* got no loss'),
    (distillation(classifier, in_the_loss_only()), dict(), "loss_l1 .*records of the teacher's loss"),
])
def test_what_teaches_nothing_is_refused_before_the_first_step(make, model, options, message):
    for kind, length in ((EPOCHS, 'max_epochs'), (ITERATIONS, 'max_iters')):
        runner = make(length, {'type': kind, length: 1, 'unlabelled_dataloader': loader(2), **options}, model)
        with pytest.raises(ValueError, match=f'^train_cfg.*{message}'):
            runner.train()
