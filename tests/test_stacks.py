"""The two stacks of docs/stacks.md read each other's files. Only where both environments are installed."""
import os
import subprocess
import sys

import pytest
from test_digits_configs import data, teacher  # noqa: F401
from test_main_jobs import LOAD, ROOT

CONFIG = 'configs/benchmarks/digits/amd_fpn_retinanet_r18-c32_retinanet_r18-c16_digits-300.py'
ENVIRONMENTS = {'official': ROOT / '.venv', 'modern': ROOT / '.venv-modern'}

pytestmark = [pytest.mark.skipif(not (path / 'complete').exists(),
                                 reason=f'the {name} stack is not installed: make setup STACK={name}')
              for name, path in ENVIRONMENTS.items()]


def run(stack, *command):
    done = subprocess.run([ENVIRONMENTS[stack] / 'bin/python', '-W', 'ignore', *map(str, command)], cwd=ROOT, text=True,
                          capture_output=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout + done.stderr


def torch_version(stack):
    return run(stack, '-c', 'import torch; print(torch.__version__)')


def test_this_is_one_of_two_different_stacks():
    assert any(path.samefile(sys.prefix) for path in ENVIRONMENTS.values())
    assert torch_version('official') != torch_version('modern')


@pytest.mark.parametrize('first, second', [('official', 'modern'), ('modern', 'official')])
def test_one_resumes_and_loads_what_the_other_made(first, second, data, teacher, tmp_path):  # noqa: F811
    options = ['--work-dir', tmp_path, '--cfg-options', f'model.teacher_ckpt={teacher}',
               'default_hooks.checkpoint.interval=1', 'train_dataloader.dataset.indices=8']
    options += [f'{loader}_dataloader.dataset.data_root={data}/' for loader in ('train', 'val', 'test')]
    options += [f'{evaluator}_evaluator.ann_file={data}/annotations/val.json' for evaluator in ('val', 'test')]

    def export(maker, epoch, reader):
        exported = tmp_path / f'student_{epoch}.pth'
        run(maker, 'tools/export_student.py', CONFIG, tmp_path / f'epoch_{epoch}.pth', exported)
        assert 'loaded strictly' in run(reader, '-c', LOAD, exported)

    run(first, 'tools/train.py', CONFIG, *options, 'train_cfg.max_epochs=1')
    export(first, 1, second)
    output = run(second, 'tools/train.py', CONFIG, '--resume', *options, 'train_cfg.max_epochs=2')
    assert 'resumed epoch: 1' in output and 'Epoch(train) [2]' in output and 'Epoch(train) [1]' not in output
    export(second, 2, first)
