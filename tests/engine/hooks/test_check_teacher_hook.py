import copy

import pytest
import torch
from conftest import classifier, retinanet
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch.utils.data import Dataset

from mmkd_plugin.config.metafile import metafile_metrics
from mmkd_plugin.engine import CheckTeacherHook

CHECK = dict(type='mmkd_plugin.CheckTeacherHook')


class Colours(Dataset):
    """Images of one colour each, and noise."""

    def __init__(self, labels=None, images=16):
        generator = torch.Generator().manual_seed(0)
        colours = torch.randint(0, 200, (images, 3, 1, 1), generator=generator)
        self.images = (colours + torch.randint(0, 56, (images, 3, 32, 32), generator=generator)).to(torch.uint8)
        self.labels = labels or [0] * images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        from mmpretrain.structures import DataSample
        return dict(inputs=self.images[index], data_samples=DataSample().set_gt_label(self.labels[index]))


@pytest.fixture
def teacher(tmp_path):
    """A teacher with a normalisation and channel order of its own, its file, and what it says of each image."""
    init_default_scope('mmpretrain')
    config = classifier(16)
    config['data_preprocessor'].update(mean=[90., 120., 150.], std=[30., 60., 90.], to_rgb=False)
    torch.manual_seed(1)
    model = MODELS.build(copy.deepcopy(config)).eval()
    model.init_weights()
    inputs = model.data_preprocessor(dict(inputs=Colours().images))['inputs']
    with torch.no_grad():
        model.head.fc.weight.mul_(1000)
        model.head.fc.bias.copy_(-model(inputs).mean(0))  # so that no class has all the images
        labels = model(inputs).argmax(1).tolist()
    assert len(set(labels)) > 2
    torch.save(model.state_dict(), tmp_path / 'teacher.pth')
    return dict(teacher=config, teacher_ckpt=str(tmp_path / 'teacher.pth')), labels


@pytest.fixture
def train(tmp_path):
    names = []

    def train(teacher, labels, hooks=(CHECK, ), epochs=1, **fields):
        Visualizer._instance_dict.clear()
        torch.manual_seed(0)
        names.append(f'{tmp_path.name}_{len(names)}')
        loader = dict(batch_size=4, num_workers=0, dataset=Colours(labels), collate_fn=dict(type='default_collate'))
        model = dict(type='mmkd_plugin.TeacherStudentDistill', architecture=classifier(8),
                     distiller=dict(type='mmkd_plugin.AMDDistiller', layers=['backbone.layer3']), **teacher)
        runner = Runner(**dict(dict(
            model=model, work_dir=str(tmp_path / names[-1]), default_scope='mmpretrain', custom_hooks=list(hooks),
            train_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=True)),
            train_cfg=dict(by_epoch=True, max_epochs=epochs), val_cfg=dict(), val_evaluator=dict(type='Accuracy'),
            val_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=False)),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-4)), randomness=dict(seed=0),
            experiment_name=names[-1]), **fields))
        runner.train()
        runner.log = next((tmp_path / names[-1]).rglob('*.log')).read_text()
        return runner
    return train


def test_the_teacher_is_judged_on_its_own_kind_of_images(train, teacher):
    fields, labels = teacher
    log = train(fields, labels, [dict(CHECK, expected={'accuracy/top1': 100.0})]).log
    assert 'The teacher on the validation set: accuracy/top1: 100, expected: 100' in log
    assert 'not the 100' not in log and 'no better than' not in log
    assert log.index('The teacher on the validation set') < log.index('Epoch(train)')


def test_a_teacher_of_the_wrong_normalisation_is_found(train, teacher):
    fields, labels = teacher
    wrong = dict(fields, teacher=classifier(16))  # the student's
    log = train(wrong, labels, [dict(CHECK, expected={'accuracy/top1': 100.0})]).log
    assert 'WARNING' in log and 'not the 100 expected. Check that' in log


def test_a_teacher_that_is_no_better_is_told_once(train, teacher):
    fields, labels = teacher
    log = train(fields, [(label + 1) % 4 for label in labels], epochs=2).log
    assert 'The teacher on the validation set: accuracy/top1: 0\n' in log
    assert log.count("The teacher, accuracy/top1 0, is no better than the student's best") == 1


def test_training_is_the_same_to_the_bit(train, teacher):
    states = [train(*teacher, hooks=hooks).model.state_dict() for hooks in ([], [CHECK])]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_what_metafiles_say():
    assert metafile_metrics('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py') == {'coco/bbox_mAP': pytest.approx(0.317)}
    assert metafile_metrics('mmpretrain::resnet/resnet34_8xb32_in1k.py') == {
        'accuracy/top1': 73.62, 'accuracy/top5': 91.59}
    assert metafile_metrics('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py') == {
        'coco/bbox_mAP': pytest.approx(0.382), 'coco/segm_mAP': pytest.approx(0.347)}
    assert metafile_metrics('mine.py') == metafile_metrics('mmdet::no/such.py') == {}


def test_mistakes(train, teacher):
    fields, labels = teacher
    with pytest.raises(ValueError, match="expected must be a dict.*'top1'"):
        CheckTeacherHook('top1')
    with pytest.raises(ValueError, match="expected.'a'. must be a finite number.*got 'b'"):
        CheckTeacherHook(dict(a='b'))
    with pytest.raises(ValueError, match='no val_dataloader'):
        train(fields, labels, val_cfg=None, val_dataloader=None, val_evaluator=None)
    with pytest.raises(ValueError, match=r"student's \[4\] classes, and the teacher has \[5\]"):
        train(dict(teacher=classifier(16, num_classes=5), allow_random_teacher=True), labels)
    with pytest.raises(ValueError, match='a ImageClassifier has no teacher'):
        train(fields, labels, model=classifier(8))


def test_a_detector_is_evaluated_too(build):
    """Predictions need nothing of the training samples but what the batch has."""
    from conftest import detection_batch

    from mmkd_plugin.engine.hooks.check_teacher_hook import evaluate_teacher
    model = build(dict(type='mmkd_plugin.TeacherStudentDistill', architecture=retinanet(8), teacher=retinanet(16),
                       allow_random_teacher=True,
                       distiller=dict(type='mmkd_plugin.AMDDistiller', layers=['neck']))).eval()
    batch, seen = detection_batch(), []

    class Evaluator:
        def process(self, data_samples, data_batch):
            seen.extend(data_samples)

        def evaluate(self, size):
            return dict(size=size)

    class Loop:
        class dataloader:
            dataset = [0, 1]

            def __iter__(self):
                return iter([batch])
        dataloader, evaluator = dataloader(), Evaluator()

    with torch.no_grad():
        assert evaluate_teacher(model, Loop) == dict(size=2)
        plain = model.teacher.test_step(copy.deepcopy(batch))
    assert len(seen) == 2
    for one, other in zip(seen, plain):
        assert torch.equal(one.pred_instances.scores, other.pred_instances.scores) and len(one.pred_instances) > 0
