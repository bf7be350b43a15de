"""Two processes on CPU: what a parallel wrapper demands of SoKD in each of its phases."""
import socket

import torch
import torch.distributed as dist
from conftest import detection_batch, retinanet
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

import mmkd_plugin  # noqa: F401

SOKD = dict(type='mmkd_plugin.SoKDDistiller', layers=['neck'], dafa=dict(), dam=dict(anchor='boxes'),
            base=dict(type='L2Loss', normalize=False, div_element=True))
ALIGNED = dict(SOKD, base=dict(type='ATLoss'), connect=False, dam=None)
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
    model = MODELS.build(dict(
        type='mmkd_plugin.TeacherStudentDistill', architecture=retinanet(8), teacher=retinanet(16),
        allow_random_teacher=True, distiller=distiller))
    parallel = MMDistributedDataParallel(model, broadcast_buffers=False).train()
    wrapper = build_optim_wrapper(parallel, dict(
        optimizer=dict(type='SGD', lr=1e-4, momentum=0.9), policy=dict(type='Adam', lr=0.1),
        constructor='mmkd_plugin.PolicyOptimWrapperConstructor'))
    torch.manual_seed(rank + 1)  # other images on each
    start = model.distiller.dafa.alpha.clone()

    def steps(count, pairs=False):
        for _ in range(count):
            batch = detection_batch()
            parallel.train_step((batch, detection_batch()) if pairs else batch, wrapper)
            weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
            assert torch.equal(*gather(weights)) and weights.isfinite().all()

    steps(3)
    steps(1, pairs=True)
    assert (start != model.distiller.dafa.alpha).any()
    model.distiller.dafa.freeze()
    frozen = model.distiller.dafa.alpha.clone()
    steps(2)
    steps(1, pairs=True)
    model.distillation_stopped = True
    steps(2)
    assert torch.equal(frozen, model.distiller.dafa.alpha)
    assert gather(model.distiller.dafa.num_draws) == [8, 8]


def work(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    init_default_scope('mmdet')
    for distiller in (SOKD, ALIGNED):
        train(rank, distiller)
    dist.destroy_process_group()


def test_search_frozen_and_stopped_under_ddp():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, ), nprocs=2, daemon=True)
