"""The best student of a run, by the real Runner; the metric follows a script, so that the best is known."""
import copy
from pathlib import Path

import pytest
import torch
from conftest import classifier
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import METRICS
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from test_distill_visualization_hook import classification

from mmkd_plugin.engine import BestStudentHook
from mmkd_plugin.engine.hooks.best_student_hook import _main_metric

CHECKPOINTS = dict(checkpoint=dict(type='CheckpointHook', interval=1, save_best='auto'))


class Scripted(BaseMetric):
    """Returns the next of ``scores`` at each validation, as ``name``."""

    def __init__(self, scores, name='accuracy/top1'):
        super().__init__()
        self.scores, self.name = list(scores), name

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return {self.name: self.scores.pop(0), 'of no interest': 1.}


class Witness(Hook):
    """What is in the model while it is validated, and in the file after each epoch's validation."""

    def __init__(self):
        self.validated, self.files = [], []

    def after_val_iter(self, runner, batch_idx, **_):
        if batch_idx == 0:
            self.validated.append(copy.deepcopy(runner.model.student.state_dict()))

    def before_train_epoch(self, runner):
        path = Path(runner.work_dir, 'student_best.pth')
        self.files.append(torch.load(path) if path.exists() else None)

    after_train = before_train_epoch


@pytest.fixture
def train(tmp_path):
    METRICS.register_module(module=Scripted)
    runs = []

    def train(scores, hook=None, ema=False, name='accuracy/top1', epochs=None, train=True, **fields):
        Visualizer._instance_dict.clear()
        runs.append(f'{tmp_path.name}_{len(runs)}')
        fields = dict(classification(), **fields)
        hooks = [dict(hook or {}, type='mmkd_plugin.BestStudentHook')]
        hooks += [dict(type='EMAHook', momentum=0.3)] * ema
        if fields['val_dataloader']:
            fields['val_evaluator'] = dict(type='Scripted', scores=scores, name=name)
        del fields['hooks'], fields['optim']
        runner = Runner(work_dir=str(tmp_path / 'run'), custom_hooks=hooks, experiment_name=runs[-1],
                        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
                        train_cfg=dict(by_epoch=True, max_epochs=epochs or len(scores)), randomness=dict(seed=0),
                        **dict(dict(default_hooks=CHECKPOINTS), **fields))
        runner.witness = Witness()
        runner.register_hook(runner.witness, priority='LOWEST')
        runner.train() if train else runner.val()
        return runner

    yield train
    METRICS._module_dict.pop('Scripted')


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize('ema', [False, True])
def test_the_file_is_what_was_validated_best(train, tmp_path, build, ema):
    runner = train([0.3, 0.5, 0.4, 0.6], ema=ema)
    kept = [file and file['meta']['best']['score'] for file in runner.witness.files]
    assert kept == [None, 0.3, 0.5, 0.5, 0.6]
    for file, validated in zip(runner.witness.files[1:], [0, 1, 1, 3]):
        assert same(file['state_dict'], runner.witness.validated[validated])
    best = torch.load(tmp_path / 'run/student_best.pth')
    assert best['meta']['best'] == dict(metric='accuracy/top1', score=0.6, epoch=4, iter=8)
    model = build(classifier(8), 'mmpretrain')
    model.load_state_dict(best['state_dict'], strict=True)
    checkpoint = torch.load(next((tmp_path / 'run').glob('best_*.pth')), weights_only=False)
    student = {key.removeprefix('architecture.'): value for key, value in checkpoint['state_dict'].items()
               if key.startswith('architecture.')}
    assert same(best['state_dict'], student) and runner.message_hub.get_info('best_score') == 0.6
    raw = runner.model.student.state_dict()
    assert same(best['state_dict'], raw) != ema
    assert not [*(tmp_path / 'run').glob('*.unfinished')]


def test_the_best_so_far_survives_a_resume_from_before_it(train, tmp_path):
    train([0.3, 0.5])
    path = tmp_path / 'run/student_best.pth'
    before = path.read_bytes()
    runner = train([0.4, 0.45], epochs=3, resume=True, load_from=str(tmp_path / 'run/epoch_1.pth'))
    kept = [file['meta']['best']['score'] for file in runner.witness.files]
    assert kept == [0.5, 0.5, 0.5] and path.read_bytes() == before  # epochs 2 and 3: 0.4 and 0.45
    runner = train([0.6], epochs=4, resume=True, load_from=str(tmp_path / 'run/epoch_3.pth'))
    assert torch.load(path)['meta']['best'] == dict(metric='accuracy/top1', score=0.6, epoch=4, iter=8)


def test_a_new_run_begins_anew(train, tmp_path):
    train([0.9])
    train([0.2])
    assert torch.load(tmp_path / 'run/student_best.pth')['meta']['best']['score'] == 0.2


@pytest.mark.parametrize('hook, name, best', [
    (dict(), 'loss', 0.1), (dict(rule='less'), 'odd', 0.1), (dict(rule='greater'), 'odd', 0.4),
    (dict(save_best='loss'), 'loss', 0.1)])
def test_less_or_greater(train, tmp_path, hook, name, best):
    train([0.2, 0.1, 0.4], hook, name=name, default_hooks={})
    assert torch.load(tmp_path / 'run/student_best.pth')['meta']['best']['score'] == best


def test_a_write_that_fails_leaves_the_file_before_it(train, tmp_path, monkeypatch):
    train([0.3])
    path = tmp_path / 'run/student_best.pth'
    before = path.read_bytes()
    monkeypatch.setattr('os.fsync', lambda _: (_ for _ in ()).throw(OSError('No space left on device')))
    with pytest.raises(OSError, match='No space left'):
        train([0.5])
    assert path.read_bytes() == before and not [*path.parent.glob('*.unfinished')]


def test_a_validation_by_itself_writes_nothing(train, tmp_path):
    train([0.3], train=False, default_hooks=dict(checkpoint=None))  # MMEngine's fails without a training
    assert not (tmp_path / 'run/student_best.pth').exists()


@pytest.mark.parametrize('hook, fields, message', [
    (dict(rule='more'), {}, "rule must be 'greater', 'less' or None, got 'more'"),
    (dict(save_best=3), {}, 'save_best must be the name of one metric, got 3'),
    (dict(save_best='mAP'), {}, "the evaluator does not return 'mAP', expected one of accuracy/top1, of no interest"),
    ({}, dict(val_dataloader=None, val_cfg=None, val_evaluator=None), 'val_dataloader is None'),
])
def test_what_is_wrong_is_said(train, hook, fields, message):
    with pytest.raises(ValueError, match=message):
        train([0.3], hook, default_hooks={}, **fields)


def test_an_unknown_metric_is_warned_of_and_stops_nothing(train, tmp_path, caplog):
    runner = train([0.3, 0.5], name='odd', default_hooks={})
    log = Path(runner.log_dir, f'{runner.timestamp}.log').read_text()
    assert "cannot infer from the name 'odd' whether larger is better" in log
    assert not list(tmp_path.rglob('student_best.pth'))


def test_it_runs_before_ema_takes_the_average_out():
    assert BestStudentHook.priority == 'HIGHEST'


@pytest.mark.parametrize('metrics, main', [
    ({'coco/person_precision': 0.9, 'coco/bbox_mAP': 0.3, 'coco/bbox_mAP_50': 0.5}, 'coco/bbox_mAP'),
    ({'confusion_matrix/result': torch.zeros(2, 2), 'single-label/precision': [0.1, 0.2], 'accuracy/top1': 71.0},
     'accuracy/top1'),
    ({'a/precision': float('nan'), 'b/precision': 0.4}, 'b/precision'),
    ({'confusion_matrix/result': torch.zeros(2, 2)}, None),
])
def test_the_metric_that_stands_for_the_others(metrics, main):
    assert _main_metric(metrics) == main
