"""Recorders stay on their modules when batch norm is converted after the model is built."""
import copy

import torch
from conftest import classification_batch, classifier
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper


def distil(student, **distiller):
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student, teacher=classifier(8),
                allow_random_teacher=True, distiller=dict(dict(
                    type='mmkd_plugin.AMDDistiller', layers=['backbone.layer3.1.bn2', 'backbone.layer4']), **distiller))


def losses(model):
    model.train()
    data = model.data_preprocessor(classification_batch(32), True)
    return {name: float(value) for name, value in model(**data, mode='loss').items()}


def test_synchronised_norm_that_a_single_process_makes_plain(build):
    """What Runner.wrap_model does, before any training."""
    student = classifier(8)
    plain = build(distil(copy.deepcopy(student)), 'mmpretrain')
    student['backbone']['norm_cfg'] = dict(type='SyncBN')
    model = revert_sync_batchnorm(build(distil(student), 'mmpretrain'))
    model.student.load_state_dict(plain.student.state_dict())
    model.teacher.load_state_dict(plain.teacher.state_dict())
    torch.manual_seed(0)
    expected = losses(plain)
    torch.manual_seed(0)
    assert losses(model) == expected
    bn = model.student.backbone.layer3[1].bn2
    assert len(bn._forward_hooks) == 1 and len(plain.student.backbone.layer3[1].bn2._forward_hooks) == 1
    for _ in range(2):  # a hook is put on once
        model.train()
    assert len(bn._forward_hooks) == 1
    model.train_step(classification_batch(32), build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=0.1))))


def test_plain_norm_that_is_synchronised(build):
    """``sync_bn='torch'``; in eval mode, as SyncBatchNorm trains on GPUs only."""
    model = convert_sync_batchnorm(build(distil(classifier(8)), 'mmpretrain'), 'torch')
    assert isinstance(model.student.backbone.layer3[1].bn2, torch.nn.SyncBatchNorm)
    assert not model.student.backbone.layer3[1].bn2._forward_hooks
    model.eval()
    with model.distiller.student_recorders:
        model.student(torch.zeros(1, 3, 32, 32))
    recorders = model.distiller.student_recorders.recorders.values()
    assert [len(recorder.data_buffer) for recorder in recorders] == [1, 1]
