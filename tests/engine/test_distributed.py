"""Two processes on CPU: what a parallel wrapper demands of SoKD in each of its phases."""
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import classification_batch, classifier, detection_batch, retinanet
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmkd_plugin.engine import NonFiniteLossHook
from mmkd_plugin.models.algorithms.second_batch import WithUnlabelled
from mmkd_plugin.models.refiners import DAFA

SOKD = dict(type='mmkd_plugin.SoKDDistiller', layers=['neck'], dafa=dict(), dam=dict(anchor='boxes'),
            base='fitnet')
ALIGNED = dict(SOKD, base='at', dam=None)
AMD = dict(type='mmkd_plugin.AMDDistiller', layers=['backbone.layer4'], amd=dict(loss_weight=10.0))
DAM = dict(type='mmkd_plugin.SoKDDistiller', layers=['backbone.layer4'], dam=dict(anchor='attention'), dafa=None,
           base='fitnet')
# What is gathered, and from what, outlives the process group: a thread of gloo's that frees the last reference waits
# for the interpreter's lock, which `destroy_process_group` holds while it waits for the thread.
KEPT = []


def gather(tensor):
    gathered = [torch.empty_like(tensor) for _ in range(2)]
    KEPT.append((tensor, gathered))
    dist.all_gather(gathered, tensor)
    return gathered


def train(rank, distiller):
    torch.manual_seed(0)
    teacher = retinanet(16) if 'type' in distiller else {name: retinanet(16) for name in distiller}
    model = MODELS.build(dict(
        type='mmkd_plugin.TeacherStudentDistill', architecture=retinanet(8), teacher=teacher,
        allow_random_teacher=True, distiller=distiller))
    parallel = MMDistributedDataParallel(model, broadcast_buffers=False).train()
    wrapper = build_optim_wrapper(parallel, dict(
        optimizer=dict(type='SGD', lr=1e-4, momentum=0.9), policy=dict(type='Adam', lr=0.1),
        constructor='mmkd_plugin.PolicyOptimWrapperConstructor'))
    torch.manual_seed(rank + 1)  # other images on each
    policies = [module for module in model.modules() if isinstance(module, DAFA)]
    start = [policy.alpha.clone() for policy in policies]

    def steps(count, pairs=False):
        for _ in range(count):
            batch = detection_batch(random=True)
            parallel.train_step((batch, detection_batch(random=True)) if pairs else batch, wrapper)
            weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
            assert torch.equal(*gather(weights)) and weights.isfinite().all()

    steps(3)
    steps(1, pairs=True)
    for policy, old in zip(policies, start, strict=True):
        assert (policy.alpha != old).any()
        policy.freeze()
    frozen = [policy.alpha.clone() for policy in policies]
    steps(2)
    steps(1, pairs=True)
    model.distillation_stopped = True
    steps(2)
    for policy, old in zip(policies, frozen):
        assert torch.equal(old, policy.alpha) and gather(policy.num_draws) == [7, 7]


def equals_one_process(rank, distiller, unlabelled=False):
    """Two processes with half a batch each end with the weights of one with the whole, as far as floats add up alike.

    Student and adapter have batch norm in eval mode, for that alone knows of the other samples.
    """
    ends, whole, others = [], classification_batch(samples=4), classification_batch(samples=4)
    for parts in (1, 2):
        torch.manual_seed(0)
        student = classifier(8)
        student['backbone']['norm_eval'] = True
        model = MODELS.build(dict(
            type='mmkd_plugin.TeacherStudentDistill', architecture=student, teacher=classifier(16),
            allow_random_teacher=True, distiller=distiller)).train()
        for module in model.distiller.modules():
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                module.eval()
        start = model.student.head.fc.weight.detach().clone()
        wrapper = build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=0.01)))
        runs = MMDistributedDataParallel(model, broadcast_buffers=False) if parts == 2 else model
        mine = slice(2 * rank, 2 * rank + 2) if parts == 2 else slice(None)
        for _ in range(3):
            first, second = ({key: value[mine] for key, value in batch.items()} for batch in (whole, others))
            log = runs.train_step(WithUnlabelled(first, second) if unlabelled else first, wrapper)
            assert any(name.startswith('unlabelled.loss') for name in log) is unlabelled
        assert (model.student.head.fc.weight - start).abs().max() > 1e-4
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


class Searching(torch.nn.Module):
    """The least whose distiller scores the policy's draws after the backward, by what this rank has recorded."""

    def __init__(self, rank):
        super().__init__()
        self.distiller = torch.nn.Module()
        torch.manual_seed(100 + rank)
        self.linear, self.distiller.dafa = torch.nn.Linear(3, 2), DAFA(objective='agreement')
        self.distiller.search_policy = self.search_policy

    def forward(self, x):
        feature = self.linear(x)
        feature.register_hook(lambda push: setattr(self, 'push', push))
        return feature.square().mean() + self.distiller.dafa.policy_loss(x, x)

    def search_policy(self):
        draws = self.distiller.dafa.sample()
        scores = [self.push.sum() * (1 + draw.index) for draw in draws]
        self.seen = draws, torch.stack(scores)
        self.distiller.dafa.score_loss(draws, scores).backward()


def policies_search_alike(rank):
    """Other seeds and other scores on each: the draws are those of the first, the step is that of the mean."""
    model = Searching(rank)
    parallel = MMDistributedDataParallel(model, broadcast_buffers=False)
    wrapper = build_optim_wrapper(parallel, dict(
        optimizer=dict(type='SGD', lr=0.1), policy=dict(type='SGD', lr=1.),
        constructor='mmkd_plugin.PolicyOptimWrapperConstructor'))
    for _ in range(2):
        before = model.distiller.dafa.alpha.detach().clone()
        wrapper.update_params(parallel(torch.randn(4, 3)))
        draws, scores = model.seen
        assert torch.equal(*gather(torch.tensor([draw.index for draw in draws])))
        scores = gather(scores)
        assert not torch.equal(*scores)
        after = model.distiller.dafa.alpha.detach().clone()
        assert torch.equal(*gather(after))
        with torch.no_grad():
            model.distiller.dafa.alpha.copy_(before)
        loss = model.distiller.dafa.score_loss(draws, sum(scores) / 2)
        torch.testing.assert_close(before - torch.autograd.grad(loss, model.distiller.dafa.alpha)[0], after)
        with torch.no_grad():
            model.distiller.dafa.alpha.copy_(after)


def all_stop_when_one_has_no_number(rank):
    model = torch.nn.Linear(1, 1)
    runner = SimpleNamespace(model=model, iter=4, optim_wrapper=build_optim_wrapper(model, dict(
        optimizer=dict(type='SGD', lr=0.01))))
    hook = NonFiniteLossHook()
    hook.before_train(runner)
    loss = model(torch.ones(1)) * (float('inf') if rank else 1)
    hook._after_forward(model, (), dict(mode='loss'), dict(loss_x=loss))
    with pytest.raises(FloatingPointError, match='loss_x is -?inf' if rank else 'a loss of another process'):
        runner.optim_wrapper.update_params(loss)


def work(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    init_default_scope('mmdet')
    for distiller in (SOKD, ALIGNED, dict(big=SOKD, other=ALIGNED)):
        train(rank, distiller)
    all_stop_when_one_has_no_number(rank)
    policies_search_alike(rank)
    init_default_scope('mmpretrain')
    for distiller, unlabelled in ((AMD, False), (DAM, False), (DAM, True)):
        torch.manual_seed(0)
        equals_one_process(rank, distiller, unlabelled)
    dist.destroy_process_group()


def test_search_frozen_stopped_and_equal_to_one_process_under_ddp():
    """The assertions are in the processes; ``spawn`` raises what one of them raises."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, ), nprocs=2, daemon=True)
