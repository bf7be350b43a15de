"""A distillation whose losses weigh nothing trains the student as if alone, to the bit."""
import copy

import torch
from conftest import detection_batch, retinanet
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch.utils.data import Dataset

POLICY = dict(constructor='mmkd_plugin.PolicyOptimWrapperConstructor', policy=dict(type='Adam', lr=0.05))


def amd(weight):
    return dict(type='mmkd_plugin.AMDDistiller', layers=['neck'], amd=dict(scale_free=True, loss_weight=weight))


def sokd(weight):
    return dict(type='mmkd_plugin.SoKDDistiller', layers=['neck'], dafa=dict(), base='fitnet', loss_weight=weight,
                dam=dict(anchor='boxes', detect_loss_weight=weight, area_loss_weight=weight,
                         anchor_loss_weight=weight))


def distil(distiller):
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=retinanet(8), teacher=retinanet(16),
                allow_random_teacher=True, distiller=distiller)


class Images(Dataset):
    def __init__(self):
        torch.manual_seed(0)
        batches = [detection_batch(random=True) for _ in range(2)]
        self.items = [{key: batch[key][i] for key in batch} for batch in batches for i in (0, 1)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return copy.deepcopy(self.items[index])


def student_after_training(model, tmp_path, **wrapper):
    Visualizer._instance_dict.clear()
    runner = Runner(
        model=model, work_dir=str(tmp_path / str(len(list(tmp_path.iterdir())))), default_scope='mmdet',
        train_dataloader=dict(batch_size=2, num_workers=0, dataset=Images(), collate_fn=dict(type='pseudo_collate'),
                              sampler=dict(type='DefaultSampler', shuffle=True)),
        train_cfg=dict(by_epoch=True, max_epochs=2), randomness=dict(seed=0),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4), **wrapper),
        experiment_name=f'{tmp_path.name}_{len(list(tmp_path.iterdir()))}')
    runner.train()
    return getattr(runner.model, 'student', runner.model).state_dict()


def test_zero_weight_is_training_alone_to_the_bit(tmp_path):
    alone = student_after_training(retinanet(8), tmp_path)
    for name, distiller, wrapper in (('amd', amd, {}), ('sokd', sokd, POLICY)):
        student = student_after_training(distil(distiller(0.)), tmp_path, **wrapper)
        assert all(torch.equal(value, student[key]) for key, value in alone.items()), name
        weighted = student_after_training(distil(distiller(1.)), tmp_path, **wrapper)
        assert not all(torch.equal(value, weighted[key]) for key, value in alone.items()), name
