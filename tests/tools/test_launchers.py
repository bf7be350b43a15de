"""Scripts for several GPUs and machines: their command lines, and two processes on two "machines" of the loopback."""
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_digits_configs import data  # noqa: F401  fixture

TOOLS = Path('tools').absolute()
# On a machine without a GPU MMEngine's launcher asks CUDA for one, and its wrapper names one
WITHOUT_GPU = '''
import runpy, sys, torch
torch.cuda.set_device = lambda device: None
sys.argv[0] = {tool!r}
sys.path.insert(0, {folder!r})
runpy.run_path({tool!r}, run_name='__main__')
'''


def environment(**variables):
    """Of a shell in which `python` and `torchrun` are this environment's."""
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    return dict(os.environ, PATH=path, OMP_NUM_THREADS='1', **variables)


@pytest.fixture
def spoken(tmp_path):
    """Runs a script with stand-ins for `srun` and `torchrun` that say how they were called."""
    for name in ('srun', 'torchrun'):
        (tmp_path / name).write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" {name} "$@"\n')
        (tmp_path / name).chmod(0o755)

    def run(script, *arguments, **variables):
        done = subprocess.run([TOOLS / script, *arguments], capture_output=True, text=True, env=dict(
            os.environ, PATH=f'{tmp_path}{os.pathsep}{os.environ["PATH"]}', **variables))
        return done.returncode, done.stdout.splitlines(), done.stderr
    return run


def test_slurm_gets_tasks_and_gpus(spoken):
    code, words, _ = spoken('slurm_train.sh', 'gpu', 'job', 'a.py', '--work-dir', 'a folder', GPUS='16',
                            SRUN_ARGS='--time=1:00 --account=me')
    assert code == 0 and words[0] == 'srun'
    assert {'--partition=gpu', '--job-name=job', '--ntasks=16', '--ntasks-per-node=8', '--gres=gpu:8',
            '--cpus-per-task=5', '--time=1:00', '--account=me'} < set(words)
    assert words[-7:] == ['-u', f'{TOOLS}/train.py', 'a.py', '--launcher', 'slurm', '--work-dir', 'a folder']
    code, words, _ = spoken('slurm_test.sh', 'gpu', 'job', 'a.py', 'a.pth', '--work-dir', 'b', GPUS='2')
    assert {'--ntasks=2', '--ntasks-per-node=2', '--gres=gpu:2'} < set(words)
    assert words[-7:] == [f'{TOOLS}/test.py', 'a.py', 'a.pth', '--launcher', 'slurm', '--work-dir', 'b']


def test_torchrun_gets_the_machines(spoken):
    code, words, _ = spoken('dist_train.sh', 'a.py', '4', '--amp', NNODES='2', NODE_RANK='1', MASTER_ADDR='first',
                            PORT='29600')
    assert code == 0 and words == [
        'torchrun', '--nnodes=2', '--node_rank=1', '--master_addr=first', '--master_port=29600', '--nproc_per_node=4',
        f'{TOOLS}/train.py', 'a.py', '--launcher', 'pytorch', '--amp']
    _, words, _ = spoken('dist_test.sh', 'a.py', 'a.pth', '2')
    assert words[1:] == ['--nnodes=1', '--node_rank=0', '--master_addr=127.0.0.1', '--master_port=29500',
                         '--nproc_per_node=2', f'{TOOLS}/test.py', 'a.py', 'a.pth', '--launcher', 'pytorch']


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh'])
def test_a_call_without_its_arguments_says_how_it_is_made(spoken, script):
    code, words, said = spoken(script, 'a.py')
    assert code == 2 and not words and said.startswith('Usage: ') and len(said.splitlines()) == 1


def test_two_machines_train_one_model(data, tmp_path):  # noqa: F811
    """Two calls of dist_train.sh, each with a process of its own, meet over gloo and keep equal weights."""
    for name in ('dist_train.sh', ):
        (tmp_path / name).write_bytes((TOOLS / name).read_bytes())
        (tmp_path / name).chmod(0o755)
    (tmp_path / 'train.py').write_text(WITHOUT_GPU.format(tool=str(TOOLS / 'train.py'), folder=str(TOOLS)))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    options = [f'{loader}.dataset.data_root={data}/' for loader in ('train_dataloader', 'val_dataloader')]
    options += [f'val_evaluator.ann_file={data}/annotations/val.json', 'env_cfg.dist_cfg.backend=gloo',
                'model_wrapper_cfg.type=MMDistributedDataParallel', 'model_wrapper_cfg.device_ids=None',
                'train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'default_hooks.logger.interval=1',
                'train_dataloader.batch_size=2', 'randomness.seed=3', 'train_dataloader.dataset.indices=8']
    calls = [subprocess.Popen(
        [tmp_path / 'dist_train.sh', 'configs/benchmarks/digits/retinanet_r18-c16_digits-300.py', '1', '--work-dir',
         tmp_path / f'work{rank}', '--cfg-options', *options], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=environment(
            NNODES='2', NODE_RANK=str(rank), MASTER_ADDR=('127.0.0.1', 'localhost')[rank], PORT=str(port)))
        for rank in range(2)]
    outputs = [call.communicate()[0] for call in calls]
    assert [call.returncode for call in calls] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert 'Distributed launcher: pytorch' in outputs[0] and 'GPU number: 2' in outputs[0]
    steps = re.findall(r'Epoch\(train\)\s+\[1\]\[\s*(\d+)/\s*(\d+)\]', outputs[0])
    assert steps[-1] == ('2', '2')  # 8 images in batches of 2 on 2 processes
    assert re.search(r'Epoch\(val\)\s+\[1\]', outputs[0])  # on what both found, collected
    assert torch.load(tmp_path / 'work0/epoch_1.pth', weights_only=False)['meta']['epoch'] == 1
    assert not (tmp_path / 'work1/epoch_1.pth').exists()  # the first machine writes
