"""What runs on a GPU runs on a CPU to its last path, in miniature."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ['jobs', 'loss']  # test_benchmarks.py runs what the others do


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools/benchmarks')
    return importlib.import_module('gpu')


@pytest.mark.slow
def test_the_script_on_a_cpu(tmp_path):
    env = dict(os.environ, OUT=str(tmp_path / 'out'), PYTHON=sys.executable)
    command = [ROOT / 'tools/benchmarks/gpu.sh', '--device', 'cpu', '--limit', '580', '--stages', *STAGES]
    done = subprocess.run(command, text=True, capture_output=True, cwd=tmp_path, env=env)
    logs = ''.join(path.read_text()[-3000:] for path in sorted((tmp_path / 'out').glob('*.log')))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        'benchmarks.log', 'jobs.log', 'results.json', 'summary.md']
    results = json.loads((tmp_path / 'out/results.json').read_text())
    assert list(results) == STAGES
    jobs = {job['name']: job['outcome'] for job in results['jobs']['found']['jobs']}
    assert len(jobs) == 9 and set(jobs.values()) == {'ok'}
    page = (tmp_path / 'out/summary.md').read_text()
    environment = results['jobs']['found']['environment']
    assert page.startswith(f'# This package on {environment["device"]}') and f'torch {environment["torch"]}' in page
    assert '| amd: resume | ok |' in page and '| 2 x 4 x 16 x 16 | lower bound |' in page


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next(gpu, monkeypatch, capsys, tmp_path):
    def stages(device, folder):
        return [gpu.Stage('tests', 60, ['-c', 'print("3 passed, 1 skipped")'], 'a.log'),
                gpu.Stage('hangs', 2, ['-c', 'import time; time.sleep(600)'], 'b.log'),
                gpu.Stage('fails', 60, ['-c', 'raise ValueError("on purpose")'], 'b.log'),
                gpu.Stage('works', 60, ['-c', 'print("| a table |")'], 'b.log')]

    monkeypatch.setattr(gpu, 'stages', stages)
    monkeypatch.setattr('sys.argv', ['gpu', '--out', str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    results = json.loads((tmp_path / 'results.json').read_text())
    assert {name: result['outcome'] for name, result in results.items()} == dict(
        tests='FAILED: not all tests ran', hangs='FAILED: stopped after 2 s', fails='FAILED with code 1', works='ok')
    assert 'on purpose' in (tmp_path / 'b.log').read_text()
    page = (tmp_path / 'summary.md').read_text()
    assert '| a table |' in page and '| tests | FAILED: not all tests ran | ' in page
    assert capsys.readouterr().out.count('FAILED') == 3


def test_the_stages_of_a_gpu_end_in_time_and_hold_the_goals(gpu, tmp_path):
    together, alone = [], []
    for stage in gpu.stages('cuda', tmp_path):
        (together if stage.name in ('tests', 'jobs') else alone).append(stage)
    assert max(stage.limit for stage in together) + sum(stage.limit for stage in alone) <= 8 * 60 + 30
    assert gpu.LIMIT < 8 * 60
    from step import VARIANTS
    assert set(gpu.VARIANTS) <= set(VARIANTS) and gpu.GOALS.keys() <= set(gpu.VARIANTS)
    assert gpu.GOALS_STAGE in [stage.name for stage in alone]
    figures = [dict(variant=name, to_student=dict(ratio=1.25), peak_bytes=330) for name in gpu.GOALS]
    found = dict(variants=[dict(variant='student', peak_bytes=200), *figures], teacher_bytes=100)
    rows = gpu.goals({gpu.GOALS_STAGE: dict(found=found)})[-1].splitlines()[2:]
    assert rows == ['| amd | 1.250 | 1.20 | MISSED | 1.100 | 1.10 | reached |',
                    '| sokd_search | 1.250 | 1.30 | reached | 1.100 | 1.10 | reached |',
                    '| sokd_frozen | 1.250 | 1.30 | reached | 1.100 | 1.10 | reached |']


def test_gpu_tests_are_found_by_their_marker(gpu):
    names = {Path(path).name for path in gpu.gpu_test_files()}
    assert {'test_amd_loss.py', 'test_devices.py', 'test_training_modes.py'} <= names
