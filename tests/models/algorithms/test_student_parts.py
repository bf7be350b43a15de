"""Hooks of a student's config find in the distillation what they look for in the plain model."""
import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import classifier, detection_batch, retinanet
from mmdet.engine.hooks import YOLOXModeSwitchHook
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from mmpretrain.models.losses import LabelSmoothLoss
from mmpretrain.structures import DataSample


class Images(BaseDataset):
    METAINFO = dict(classes=tuple('abcd'))

    def load_data_list(self):
        return [dict(index=i) for i in range(4)]

    def get_gt_labels(self):
        return [0, 0, 1, 2, 3]

    def __getitem__(self, index):
        return dict(inputs=torch.full((3, 32, 32), 50 * index, dtype=torch.uint8),
                    data_samples=DataSample().set_gt_label(index))


@pytest.fixture
def train(tmp_path):
    """Trains a distillation of classifiers for two epochs with hooks of a plain config."""
    DATASETS.register_module(module=Images, force=True)

    def train(student, hooks=(), **fields):
        Visualizer._instance_dict.clear()
        model = dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student, teacher=classifier(8),
                     allow_random_teacher=True,
                     distiller=dict(type='mmkd_plugin.AMDDistiller', layers=['backbone.layer3']))
        runner = Runner(
            model=model, work_dir=str(tmp_path), default_scope='mmpretrain',
            train_dataloader=dict(batch_size=2, num_workers=0, dataset=dict(type='Images'),
                                  collate_fn=dict(type='default_collate'),
                                  sampler=dict(type='DefaultSampler', shuffle=False)),
            train_cfg=dict(by_epoch=True, max_epochs=2), optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
            custom_hooks=list(hooks), randomness=dict(seed=0), experiment_name=tmp_path.name, **fields)
        runner.train()
        return runner.model

    yield train
    DATASETS.module_dict.pop('Images')


def distil(student=None, **fields):
    return dict(dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student or retinanet(8),
                     teacher=retinanet(8), allow_random_teacher=True,
                     distiller=dict(type='mmkd_plugin.AMDDistiller', layers=['neck'])), **fields)


def test_the_students_parts_are_offered(build):
    model = build(distil())
    student = model.student
    for name in ('backbone', 'neck', 'bbox_head', 'with_neck', 'extract_feat', 'test_cfg'):
        assert getattr(model, name) == getattr(student, name)
    names = set(model.state_dict())
    model.bbox_head.use_l1 = True  # YOLOXModeSwitchHook
    assert student.bbox_head.use_l1 is True
    student.loss_lambda = 0.5
    model.loss_lambda = 0.25  # MMPretrain's DenseCLHook
    assert student.loss_lambda == 0.25 and 'loss_lambda' not in vars(model)
    model.distillation_stopped = True  # the algorithm's own
    model.new = 1
    assert not hasattr(student, 'distillation_stopped') and not hasattr(student, 'new')
    assert set(model.state_dict()) == names and all(name.split('.')[0] in ('architecture', 'distiller')
                                                    for name, _ in model.named_parameters())
    with pytest.raises(AttributeError, match="TeacherStudentDistill.*no attribute 'roi_head', nor has its student, Re"):
        model.roi_head  # noqa: B018
    assert not hasattr(model, 'module') and not hasattr(model, 'detector')


def test_copies_offer_their_own(build):
    model = build(distil())
    average = copy.deepcopy(model)
    assert average.bbox_head is average.student.bbox_head is not model.bbox_head
    average.bbox_head.use_l1 = True
    assert getattr(model.bbox_head, 'use_l1', None) is not True


def test_a_yolox_of_the_zoo_trains_with_its_hooks(build, tmp_path):
    """Its first convolution, behind Focus, reads twelve channels; its hook sets ``bbox_head.use_l1`` near the end."""
    student, teacher = (get_config(f'mmdet::yolox/yolox_{size}_8xb8-300e_coco.py').model for size in ('tiny', 's'))
    student.data_preprocessor.pop('batch_augments')  # would make the images large
    model = build(distil(student, teacher=teacher), seed=0)
    hook = YOLOXModeSwitchHook(num_last_epochs=1)
    loader = SimpleNamespace(_iterator=None, dataset=SimpleNamespace(update_skip_type_keys=lambda keys: None),
                             persistent_workers=False)
    hook.before_train_epoch(SimpleNamespace(
        epoch=1, max_epochs=2, model=model, train_dataloader=loader, logger=MMLogger.get_instance('yolox'),
        train_loop=SimpleNamespace(dataloader=loader)))
    log = model.train().train_step(detection_batch(), build_optim_wrapper(model, dict(
        optimizer=dict(type='SGD', lr=1e-4))))
    assert log['student.loss_l1'] > 0 and log['distill.loss_amd_neck_0'] > 0


def test_another_loss_from_an_epoch_on(train):
    """MMPretrain's SwitchRecipeHook looks for ``model.head.loss_module`` and ``model.data_preprocessor``."""
    hook = dict(type='mmpretrain.SwitchRecipeHook', schedule=[dict(
        action_epoch=2, loss=dict(type='mmpretrain.LabelSmoothLoss', label_smooth_val=0.1),
        batch_augments=dict(augments=[dict(type='mmpretrain.Mixup', alpha=0.8)]))])
    model = train(classifier(8), [hook])
    assert isinstance(model.student.head.loss_module, LabelSmoothLoss)
    assert model.student.data_preprocessor.batch_augments.augments
    assert 'head' not in vars(model) and 'loss_module' not in vars(model)


def test_margins_of_the_classes(train):
    student = classifier(8)
    student['head'] = dict(type='mmpretrain.ArcFaceClsHead', num_classes=4, in_channels=64)
    model = train(student, [dict(type='mmpretrain.SetAdaptiveMarginsHook', margin_min=0.1, margin_max=0.3)])
    assert model.student.head.margins.tolist() == pytest.approx([0.1, 0.3, 0.3, 0.3])  # of counts 2, 1, 1, 1


def test_other_hooks_and_options_that_name_parts(train):
    hooks = [dict(type='mmpretrain.WarmupParamHook', param_name='loss_weight', module_name='head.loss_module',
                  warmup_epochs=2), dict(type='EMAHook'),
             dict(type='SyncBuffersHook'), dict(type='mmpretrain.PreciseBNHook', num_samples=4)]
    model = train(classifier(8), hooks, cfg=Config(dict(activation_checkpointing=['backbone.layer1'])))
    assert model.student.head.loss_module.loss_weight == 0.75  # in the last of four iterations
    assert 'forward' in vars(model.student.backbone.layer1)
