import pytest
import torch
from conftest import classifier
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from mmpretrain.structures import DataSample

IMAGES = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
OTHER = dict(type='mmpretrain.ClsDataPreprocessor', num_classes=4, mean=[10.0, 120.0, 200.0], std=[20.0, 60.0, 90.0],
             to_rgb=False)


class Labelled(BaseDataset):
    METAINFO = dict(classes=tuple('abcd'))

    def __init__(self, labels):
        self.labels = labels
        super().__init__()

    def load_data_list(self):
        return [dict(index=i) for i in range(len(self.labels))]

    def __getitem__(self, index):
        return dict(inputs=IMAGES[index], data_samples=DataSample().set_gt_label(self.labels[index]))


@pytest.fixture
def runner(build, tmp_path):
    """Makes a Runner whose data are labelled by the teacher, fed with the teacher's own preprocessor."""
    DATASETS.register_module(module=Labelled, force=True)

    def runner(val_loop, distil=True, **fields):
        Visualizer._instance_dict.clear()
        teacher = build(dict(classifier(16), data_preprocessor=OTHER),
                        'mmpretrain', seed=3)
        teacher.init_weights()
        with torch.no_grad():
            teacher.eval()
            # A random network prefers one class: the median of each logit decides instead.
            batch = dict(inputs=list(IMAGES), data_samples=[DataSample() for _ in IMAGES])
            data = teacher.data_preprocessor(batch, False)
            logits = teacher(data['inputs'])[0] if isinstance(teacher(data['inputs']), tuple) else teacher(
                data['inputs'])
            teacher.head.fc.bias.sub_(logits.median(0).values)
            labels = [sample.pred_label.item() for sample in teacher.val_step(batch)]
        assert len(set(labels)) > 1
        torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
        model = dict(type='mmkd_plugin.TeacherStudentDistill', architecture=classifier(8),
                     teacher=dict(classifier(16), data_preprocessor=OTHER), teacher_ckpt=str(tmp_path / 'teacher.pth'),
                     distiller=dict(type='mmkd_plugin.AMDDistiller', layers=['backbone.layer3']))
        loader = dict(batch_size=4, num_workers=0, dataset=dict(type='Labelled', labels=labels),
                      collate_fn=dict(type='pseudo_collate'), sampler=dict(type='DefaultSampler', shuffle=False))
        return Runner(
            model=model if distil else classifier(8), work_dir=str(tmp_path), default_scope='mmpretrain',
            train_dataloader=loader, train_cfg=dict(by_epoch=True, max_epochs=2), val_dataloader=loader,
            val_cfg=dict(type=val_loop), val_evaluator=dict(type='Accuracy', topk=(1, )),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)), randomness=dict(seed=0),
            experiment_name=tmp_path.name, **fields)

    yield runner
    DATASETS.module_dict.pop('Labelled')


def test_without_metrics_of_the_student_there_are_none_of_the_teacher(runner, monkeypatch):
    """CocoMetric has none without detections, and the teacher's would be taken for the best of the student."""
    trained = runner('mmkd_plugin.TeacherStudentValLoop')
    trained.val_loop.teacher_metrics = {'teacher.accuracy/top1': 100.}  # of its only evaluation
    monkeypatch.setattr(type(trained.val_loop.evaluator), 'evaluate', lambda self, size: {})
    assert trained.val_loop.run() == {}


def test_both_are_evaluated_as_the_distillation_feeds_them(runner):
    trained = runner('mmkd_plugin.TeacherStudentValLoop')
    trained.train()
    metrics = trained.val_loop.run()
    assert metrics['teacher.accuracy/top1'] == 100
    alone = trained.model.student
    hits = [sample.pred_label.item() == sample.gt_label.item() for batch in trained.val_dataloader
            for sample in alone.eval().val_step(batch)]
    assert metrics['accuracy/top1'] == 100 * sum(hits) / len(hits)
    logged = trained.message_hub.log_scalars
    assert {'val/accuracy/top1', 'val/teacher.accuracy/top1'} <= set(logged)
    assert 'evaluate' not in vars(trained.val_loop.evaluator)


def test_mmrazors_loop_is_refused_before_the_first_step(runner):
    refused = runner('mmrazor.SingleTeacherDistillValLoop')
    with pytest.raises(ValueError, match=r"SingleTeacherDistillValLoop.*val_cfg.type='mmkd_plugin.TeacherStudentVal"):
        refused.train()
    assert refused.iter == 0


def test_a_model_without_a_teacher_is_refused(runner):
    with pytest.raises(ValueError, match='^val_cfg.type: .*got a ImageClassifier.*expected a TeacherStudentDistill'):
        runner('mmkd_plugin.TeacherStudentValLoop', distil=False).train()


def test_a_teacher_with_other_classes_is_refused_before_the_first_step(runner):
    refused = runner('mmkd_plugin.TeacherStudentValLoop')
    refused.model.teacher.head.num_classes = 7
    with pytest.raises(ValueError, match=r'^val_cfg.type: .*classes, and the teacher has \[7\]'):
        refused.train()
    assert refused.iter == 0
