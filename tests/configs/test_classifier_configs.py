"""Every classifier config with its real models, on ImageNet and CIFAR in miniature."""
import miniature
import numpy as np
import pytest
import sweep
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.runner import Runner
from mmpretrain.datasets import cifar

PARAMETERS = {
    'in1k': dict(resnet50=25_557_032, resnet34=21_797_672, resnet18=11_689_512, mobilenetv2=3_504_872),
    'cifar100': {'resnet50': 23_705_252, 'mobilenetv2': 812_836, 'resnet32x4': 7_433_860, 'resnet8x4': 1_233_540,
                 'wrn40-2': 2_255_156, 'wrn16-2': 703_284, 'vgg13': 9_462_180, 'vgg8': 3_965_028},
    'cifar10': {'resnet34': 21_282_122, 'resnet18': 11_173_962, 'wrn16-3': 1_549_530, 'wrn16-1': 175_066,
                'wrn28-3': 3_294_042, 'wrn28-1': 369_498}}
BASES = dict(fitnet='FitNetLoss', at='ATLoss', crd='CRDLoss', reviewkd='ReviewKDLoss', kd='KLDivergence')
RECIPES = {  # epochs, learning rate, its milestones and factor, weight decay, images a step
    'in1k': (100, 0.1, [30, 60, 90], 0.1, 1e-4, 256),
    'cifar100': (240, 0.05, [150, 180, 210], 0.1, 5e-4, 64),
    'cifar10': (200, 0.1, [40, 80, 120, 160], 0.2, 1e-4, 128)}
BATCH = {'8xb32': 256, 'b64': 64, 'b128': 128}


@pytest.fixture(autouse=True)
def any_checksum(monkeypatch):
    """MMPretrain's CIFAR takes the true files only."""
    monkeypatch.setattr(cifar, 'check_md5', lambda *_: True)


@pytest.fixture(scope='module')
def roots(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    return miniature.make_imagenet(root / 'imagenet'), miniature.make_cifar(root / 'cifar')


def options(path, roots):
    """Where the data is; for ImageNet, images of 64 instead of 224."""
    if not path.stem.endswith('in1k'):
        return miniature.cifar_options(roots[1])
    train, test = 'train_dataloader.dataset', 'test_dataloader.dataset'
    crd = {}
    if 'crd' in path.stem:
        crd = {f'{train}.neg_num': 16, 'model.distiller.base.loss.neg_num': 16,
               'model.distiller.base.loss.sample_n': 64}
        train += '.dataset'
    return crd | {f'{train}.data_root': str(roots[0]), f'{train}.pipeline.1.scale': 64,
                  f'{test}.data_root': str(roots[0]), f'{test}.pipeline.2.crop_size': 64}


def parts_of(path):
    """Returns method, what is beside it, teacher, student and data that the name says."""
    method, _, teacher, student, _, data = path.stem.split('_')
    method, *others = method.split('-')
    return method, others, teacher, student, data


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('config', sweep.CLASSIFIERS, ids=lambda path: path.stem)
def test_one_step_of_what_the_name_says(config, roots, tmp_path):
    model = sweep.check(config, options(config, roots), tmp_path).model
    method, others, teacher, student, data = parts_of(config)
    networks = [each.network for each in model.teachers.values()]
    assert [count(network) for network in (*networks, model.student)] == [
        PARAMETERS[data][name] for name in (*teacher.split('+'), student)]
    beside = {BASES[name] for name in others if name in BASES}
    for distiller in [each.distiller for each in model.teachers.values()]:
        losses = {type(loss).__name__ for loss in distiller.distill_losses.values()}
        if method == 'amd':
            assert losses == beside | {'AMDLoss'}
            amd = [loss for loss in distiller.distill_losses.values() if type(loss).__name__ == 'AMDLoss']
            assert len(amd) == 3 and {loss.local_grid for loss in amd} == {2 if 'local' in others else 1}
            assert model.student.head.loss_module.loss_weight == (0.1 if 'kd' in others else 1.0)
        else:
            assert losses == beside and distiller.dafa is not None and len(distiller.dams)


@pytest.mark.slow
@pytest.mark.parametrize('config', sweep.ALONE, ids=lambda path: path.stem)
def test_a_network_alone_trains(config, roots, tmp_path):
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(options(config, roots))
    cfg.merge_from_dict({'work_dir': str(tmp_path), 'log_level': 'WARNING', 'default_hooks.checkpoint': None,
                         'train_cfg.max_epochs': 1})
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False, num_batch_per_epoch=1)
    runner = Runner.from_cfg(cfg)
    before = runner.model.head.fc.weight.clone()
    runner.train()
    assert torch.isfinite(runner.model.head.fc.weight).all() and (runner.model.head.fc.weight != before).any()
    assert set(runner.test()) == {'accuracy/top1'}
    name, _, data = config.stem.split('_')
    assert count(runner.model) == PARAMETERS[data][name]


@pytest.mark.parametrize('config', sweep.CLASSIFIERS + sweep.ALONE, ids=lambda path: path.stem)
def test_the_recipe_is_the_authors(config):
    cfg = Config.fromfile(config)
    optimizer, schedule = cfg.optim_wrapper.optimizer, cfg.param_scheduler
    epochs, lr, milestones, factor, decay, batch = RECIPES[config.stem.rpartition('_')[2]]
    if 'mobilenetv2_b64_cifar' in config.stem:
        lr = 0.01
    assert (optimizer.type, optimizer.momentum, schedule.type) == ('SGD', 0.9, 'MultiStepLR')
    assert (cfg.train_cfg.max_epochs, optimizer.lr, list(schedule.milestones), schedule.gamma,
            optimizer.weight_decay) == (epochs, lr, milestones, factor, decay)
    gpus = 8 if config.stem.endswith('in1k') else 1
    assert gpus * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == batch
    assert batch == BATCH[config.stem.split('_')[-2]]


@pytest.mark.parametrize('augment', ['mixup', 'cutmix'])
def test_mixed_labels_reach_the_loss_and_the_teacher_sees_the_mixed_images(augment, roots, tmp_path):
    config = sweep.ROOT / f'configs/amd/cifar/amd-kd-{augment}_backbone_wrn16-3_wrn16-1_b128_cifar10.py'
    cfg = sweep.load(config, options(config, roots) | {'train_dataloader.batch_size': 8}, tmp_path)
    model = Runner.from_cfg(cfg).model.train()
    batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    np.random.seed(0)
    data = model.data_preprocessor(batch, True)
    scores = torch.stack([sample.gt_score for sample in data['data_samples']])
    mixed = ((scores > 0.05) & (scores < 0.95)).any(1)
    assert mixed.sum() >= 4
    plain = model.data_preprocessor(batch, False)['inputs']
    assert (data['inputs'] != plain).flatten(1).any(1)[mixed].all()

    seen = {}
    for name, network in (('student', model.student), ('teacher', model.teacher)):
        network.backbone.register_forward_pre_hook(lambda _, args, name=name: seen.update({f'{name} sees': args[0]}))
        network.head.fc.register_forward_hook(lambda _, __, out, name=name: seen.update({f'{name} says': out}),
                                              prepend=True)  # before the teacher is stopped
    losses = model(**data, mode='loss')
    assert torch.equal(seen['student sees'], data['inputs']) and torch.equal(seen['teacher sees'], data['inputs'])
    logits = seen['student says']
    soft = 0.1 * -(scores * logits.log_softmax(1)).sum(1).mean()
    assert abs(soft - 0.1 * F.cross_entropy(logits, scores.argmax(1))) > 1e-4
    torch.testing.assert_close(losses['student.loss'], soft)
    kd = 0.9 * 4**2 * F.kl_div((logits / 4).log_softmax(1), (seen['teacher says'] / 4).softmax(1),
                               reduction='batchmean')
    torch.testing.assert_close(losses['distill.loss_kd'], kd)
