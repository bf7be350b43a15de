"""The benchmark of accuracy: its data, its configs, a miniature of it from end to end, and the report's arithmetic."""
import argparse
import dataclasses
import gzip
import importlib
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmkd_plugin.datasets.clothing import make_clothing, split_sources
from mmkd_plugin.datasets.fashion_mnist import FILES, find_fashion_mnist, read_split, unpack_fashion_mnist

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for folder in ('fashion', 'clothing') for path in (ROOT / 'configs' / folder).glob('*.py'))


@pytest.fixture(scope='module')
def tool():
    """Imports a file of ``tools``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'tools/benchmarks')
        yield importlib.import_module


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    """The four files of Fashion-MNIST with a few blots instead of clothes."""
    folder, rng = tmp_path_factory.mktemp('package'), np.random.default_rng(0)
    for split, count in (('train', 120), ('t10k', 20)):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 4:24, 6:22] = rng.integers(40, 256, (count, 20, 16))
        for name, header, data in (('images-idx3', (2051, count, 28, 28), images),
                                   ('labels-idx1', (2049, count), np.arange(count, dtype=np.uint8) % 10)):
            content = struct.pack(f'>{len(header)}i', *header) + data.tobytes()
            (folder / f'{split}-{name}-ubyte.gz').write_bytes(gzip.compress(content, mtime=0))
    return folder


@pytest.fixture(scope='module')
def data(packed, tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    assert unpack_fashion_mnist(root / 'fashion_mnist', packed)
    assert make_clothing(root / 'clothing', root / 'fashion_mnist', num_train=8, num_tuning=4, num_test=4)
    return root


def small(cfg: Config, data: Path) -> Config:
    """The config on the few images, for one epoch."""
    root = data / Path(cfg.data_root).name
    for name, count in (('train_dataloader', 8), ('val_dataloader', -4), ('test_dataloader', 4)):
        cfg[name].update(batch_size=4)
        cfg[name].dataset.update(data_root=str(root), indices=count)
    for name, split in (('val_evaluator', 'tuning'), ('test_evaluator', 'test')):
        if 'ann_file' in cfg[name]:
            cfg[name].ann_file = str(root / f'annotations/{split}.json')
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    return Config(cfg.to_dict(), format_python_code=False)  # formatting takes seconds


@pytest.fixture(scope='module')
def teachers(tmp_path_factory):
    from mmengine.registry import MODELS, DefaultScope
    paths = {}
    for path in ('fashion/resnet20_fashion_mnist', 'clothing/retinanet_r18-c32_clothing'):
        cfg = Config.fromfile(ROOT / f'configs/{path}.py')
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
        paths[Path(path).name] = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
        torch.save(model.state_dict(), paths[Path(path).name])
    return paths


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains_for_an_epoch(path, data, teachers, tmp_path):
    cfg = small(Config.fromfile(path), data)
    cfg.work_dir, cfg.default_hooks.checkpoint, cfg.log_level = str(tmp_path), None, 'WARNING'
    cfg.default_hooks.pop('best_student', None)
    if 'teacher' in cfg.model:
        cfg.model.teacher_ckpt = str(teachers[Path(cfg.model.teacher.cfg_path).stem])
    runner = Runner.from_cfg(cfg)
    runner.train()
    logged = {key: buffer.data[0][-1] for key, buffer in runner.message_hub.log_scalars.items() if 'loss' in key}
    assert all(np.isfinite(value) for value in logged.values())
    distilled = [value for key, value in logged.items() if 'distill' in key]
    assert all(value > 0 for value in distilled)
    assert bool(distilled) == ('teacher' in cfg.model and not path.stem.startswith('inherit'))


def tune(benchmark, task):
    """Results as if every row had been tuned, with the second of its weights the best."""
    lines = []
    for built_on_others in (False, True):
        lines += [dict(row=run.row, seed=run.seed, fingerprint=run.fingerprint,
                       metric=float(run.weight == task.rows[run.row].weights[1]))
                  for run in benchmark.tuning_runs(task, lines, built_on_others, task.rows)]
    return lines


def test_every_row_is_another_config(tool):
    benchmark = tool('gain')
    for task in tool('gain_tasks').TASKS.values():
        assert all(bool(row.weight) == bool(row.weights) for row in task.rows.values())
        assert all(row.base in task.rows for name, row in task.rows.items() if name != 'student')
        prints = {run.row: run.fingerprint for run in benchmark.reported_runs(task, tune(benchmark, task), task.rows)}
        assert len(set(prints.values())) == len(prints) == len(task.rows), prints


def test_a_row_has_the_best_weights_of_what_it_is_built_on(tool):
    benchmark, task = tool('gain'), tool('gain_tasks').TASKS['fashion']
    runs = {run.row: run for run in benchmark.reported_runs(task, tune(benchmark, task), task.rows)}
    base, dam = task.rows['fitnet'].weights[1], task.rows['sokd_fitnet'].weights[1]
    for row, own in (('fitnet', base), ('sokd_fitnet', dam), ('no_anchor', None), ('no_dam', None)):
        distiller = runs[row].config.model.distiller
        assert runs[row].weight == own and distiller.base.loss_weight == base
        if row in ('fitnet', 'no_dam'):
            assert distiller.get('dam') is None
        else:
            assert (distiller.dam.detect_loss_weight, distiller.dam.area_loss_weight) == (dam, 3 * dam)
    assert runs['no_anchor'].config.model.distiller.dam.anchor is None
    assert runs['half'].config.model.distiller.dafa.beta_init == 0.5
    with pytest.raises(ValueError, match='fitnet: weight 3 is not tuned with seed 100 yet'):
        list(benchmark.tuning_runs(task, [], True, task.rows))
    assert [*benchmark.tuning_runs(task, [], True, ['fitnet'])] == []
    diverged = [dict(line, metric=None) for line in tune(benchmark, task)]
    with pytest.raises(ValueError, match='fitnet: the training diverged with every weight'):
        list(benchmark.reported_runs(task, diverged, ['fitnet']))


@pytest.mark.parametrize('gpu', [False, True])
def test_all_labels_only_where_there_is_a_gpu(tool, monkeypatch, gpu):
    benchmark = tool('gain')
    monkeypatch.setattr('sys.argv', ['gain'])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    assert benchmark.parse_args().task == ['fashion', 'clothing', 'fashion_cross', *['fashion_all'] * gpu]


def test_tuning_sees_no_test_image_and_training_none_of_both(tool):
    benchmark = tool('gain')
    for task in tool('gain_tasks').TASKS.values():
        tuning, test = (benchmark._run(task, 'fitnet', 1, {}, None, split).config for split in ('tuning', 'test'))
        assert test.val_dataloader == test.test_dataloader == tuning.test_dataloader
        if 'ann_file' in tuning.val_evaluator:
            for cfg, split in ((tuning, 'tuning'), (test, 'test')):
                assert Path(cfg.val_evaluator.ann_file).stem == Path(cfg.val_dataloader.dataset.ann_file).stem == split
        else:
            assert tuning.val_dataloader.dataset.indices == -10000 and not tuning.val_dataloader.dataset.get('split')
            assert test.val_dataloader.dataset.split == 'test' and test.val_dataloader.dataset.test_mode
            assert Config.fromfile(f'{task.folder}/{task.teacher}.py').train_dataloader.dataset.indices == 50000


def test_the_fingerprint_is_that_of_config_and_teacher(tool, tmp_path):
    benchmark = tool('gain')
    (tmp_path / 'teacher.py').write_text('width = 1')

    def student(**changes):
        model = dict(teacher=dict(cfg_path=str(tmp_path / 'teacher.py')), teacher_ckpt='a.pth', weight=1.0)
        return Config(dict(model={**model, **changes.pop('model', {})}, randomness=dict(seed=1), **changes))

    first = benchmark.fingerprint(student())
    assert first == benchmark.fingerprint(student(model=dict(teacher_ckpt='b.pth')))
    other = student()
    other.randomness = dict(seed=2)
    assert first == benchmark.fingerprint(other)
    assert first != benchmark.fingerprint(student(model=dict(weight=2.0)))
    (tmp_path / 'wider.py').write_text('width = 2')
    assert first != benchmark.fingerprint(student(model=dict(teacher=dict(cfg_path=str(tmp_path / 'wider.py')))))


@pytest.fixture
def miniature(tool, data, monkeypatch, tmp_path):
    """A task of two rows, and a broken one, on a few images; returns how to run it."""
    benchmark, tasks = tool('gain'), tool('gain_tasks')
    configs = tmp_path / 'configs'
    configs.mkdir()
    for name in ('resnet20_fashion_mnist', 'resnet8_fashion_mnist-300', 'fitnet_resnet8_fashion_mnist-300'):
        cfg = small(Config.fromfile(ROOT / f'configs/fashion/{name}.py'), data)
        if 'teacher' in cfg.model:
            cfg.model.teacher.cfg_path = str(configs / 'resnet20_fashion_mnist.py')
        cfg.dump(configs / f'{name}.py')
    original = tasks.TASKS['fashion']
    fitnet = tasks.Row('SoKD', 'fitnet_resnet8_fashion_mnist-300', 'student', 1, tasks.sokd(1, 'attention'),
                       tasks.BASE, (1.0, 2.0, 1e39))  # the last makes the loss infinite
    student = tasks.Row('student alone', 'resnet8_fashion_mnist-300', seeds=1)
    broken = dataclasses.replace(student, options={'optim_wrapper.optimizer.type': 'Nonsense'})
    rows = dict(student=student, sokd=fitnet, broken=broken)
    task = tasks.Task(original.title, str(configs), original.teacher, original.metric, original.unit, 1.0, rows)
    monkeypatch.setitem(benchmark.TASKS, 'miniature', task)
    monkeypatch.setattr(benchmark, 'TUNING_SEEDS', (100, ))
    monkeypatch.chdir(ROOT)

    def run(**changes):
        arguments = dict(rows=['student', 'sokd'], seeds=None, tune=False, jobs=2, results=tmp_path / 'results',
                         work_dir=tmp_path / 'work')
        return benchmark.run_task('miniature', argparse.Namespace(**{**arguments, **changes}))
    return run


def test_a_miniature_from_tuning_to_report(miniature, tool, capsys, tmp_path):
    benchmark, report = tool('gain'), tool('report_gain')
    results, tuning = tmp_path / 'results/miniature.jsonl', tmp_path / 'results/miniature_tuning.jsonl'
    with pytest.raises(ValueError, match='sokd: weight 1 is not tuned with seed 100 yet.*--tune'):
        miniature()
    assert miniature(tune=True) == 0
    assert 'sokd, weight 1e+39, seed 100: diverged, see' in capsys.readouterr().out
    assert 'FloatingPointError' in (tmp_path / 'work/miniature/failed_sokd_1e+39_100.log').read_text()
    tried = [json.loads(line) for line in tuning.read_text().splitlines()]
    assert sorted((line['row'], line['seed'], line['weight']) for line in tried) == [
        ('sokd', 100, 1.0), ('sokd', 100, 2.0), ('sokd', 100, 1e39)]
    for line in tried:
        assert (line['metric'] is None) == (line['weight'] == 1e39)
        line['metric'] = {1.0: 10.0, 2.0: 20.0, 1e39: None}[line['weight']]
    tuning.write_text(''.join(json.dumps(line) + '\n' for line in tried))
    assert miniature() == 0
    lines = {(line['row'], line['seed']): line for line in map(json.loads, results.read_text().splitlines())}
    assert set(lines) == {('teacher', 0), ('student', 1), ('sokd', 1)}
    found = lines['sokd', 1]
    assert found['weight'] == 2.0 and found['curve'] == [[1, found['metric']]] and found['torch'] == torch.__version__
    assert 0 < found['policy'][-1]['entropy'] <= 1 and 'policy' not in lines['student', 1]
    assert not list((tmp_path / 'work/miniature').glob('sokd*'))  # nothing left behind

    before = results.read_bytes()
    results.write_bytes(before + b'{"row": "stu')  # the machine went down
    capsys.readouterr()
    assert miniature() == 0
    assert results.read_bytes() == before and '2 of 2 runs are in' in capsys.readouterr().out
    assert miniature(rows=['broken']) == 1
    assert results.read_bytes() == before and 'broken, seed 1: failed, see' in capsys.readouterr().out
    assert 'Nonsense' in (tmp_path / 'work/miniature/failed_broken_1.log').read_text()
    with benchmark.results_file(results), pytest.raises(SystemExit, match='another benchmark is running'):
        miniature()

    task = benchmark.TASKS['miniature']
    current = report.current(task, benchmark.read(results), benchmark.read(tuning))
    assert set(report.current(task, benchmark.read(results), [])) == {'teacher', 'student'}  # not tuned, not reported
    stale = [dict(line, fingerprint='other') for line in benchmark.read(results)]
    assert current == report.current(task, benchmark.read(results) + stale, benchmark.read(tuning))
    for kind in ('bars', 'curves', 'policy'):
        getattr(report, kind)(task, current, tmp_path / f'{kind}.png')
        assert (tmp_path / f'{kind}.png').stat().st_size > 5000


def test_a_training_ends_with_a_killed_benchmark(data, tmp_path):
    cfg = small(Config.fromfile(ROOT / 'configs/fashion/resnet8_fashion_mnist-300.py'), data)
    cfg.train_cfg.max_epochs = 10**6
    cfg.work_dir = str(tmp_path / 'work')
    script, config, log = tmp_path / 'script.py', tmp_path / 'config.py', tmp_path / 'train.log'
    cfg.dump(config)
    script.write_text('import sys\nfrom mmengine.config import Config\nfrom gain import PROCESSES, fit\n'
                      'if __name__ == "__main__":\n'
                      '    cfg = Config.fromfile(sys.argv[1]).to_dict()\n'
                      '    training = PROCESSES.Process(target=fit, args=(cfg, sys.argv[2]))\n'
                      '    training.start()\n'
                      '    print(training.pid, flush=True)\n'
                      '    training.join()\n')
    with subprocess.Popen([sys.executable, script, config, log], text=True, stdout=subprocess.PIPE, cwd=ROOT,
                          env=dict(os.environ, PYTHONPATH='tools')) as benchmark:
        command_line = Path('/proc', benchmark.stdout.readline().strip(), 'cmdline')
        wait_for(lambda: log.exists() and 'Epoch(train)' in log.read_text())
        assert runs(command_line)
        benchmark.kill()
    wait_for(lambda: not runs(command_line))


def runs(command_line):
    try:
        return bool(command_line.read_bytes())  # empty when it has ended and is not collected yet
    except OSError:
        return False


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it did not come'
        time.sleep(0.2)


def line(row, seed, metric, **more):
    return dict(dict(row=row, seed=seed, metric=metric, weight=None, curve=[[1, metric / 2], [2, metric]], seconds=36,
                     commit='abc', torch='2', mmdet='3', mmpretrain='1', device='cpu', threads=1), **more)


def test_the_reports_arithmetic(tool):
    """Differences 1, 2, 3 and 2: mean 2, sd 0.8165, t(0.975, 3) = 3.1824, so +- 1.2992."""
    report = tool('report_gain')
    above, below = {1: 81.0, 2: 83.0, 3: 84.0, 4: 82.0, 9: 0.0}, {1: 80.0, 2: 81.0, 3: 81.0, 4: 80.0, 8: 0.0}
    mean, half, wins, n = report.paired(above, below)
    assert (mean, wins, n) == (2.0, 4, 4) and half == pytest.approx(1.2992, abs=1e-4)
    assert report.paired({1: 80.0, 2: 80.0}, {1: 80.0, 2: 81.0})[2] == 0  # a draw is no win
    assert report.paired({1: 1.0}, {1: 0.0}) is None
    assert report.closed({1: 85.0, 2: 84.0}, {1: 80.0, 2: 81.0, 3: 0.0}, 90.0) == pytest.approx(100 * 4 / 9.5)


def test_the_table(tool):
    report, tasks = tool('report_gain'), tool('gain_tasks')
    rows = dict(student=tasks.Row('student alone', 's'),
                kd=tasks.Row('KD', 'k', 'student', weight=('w', ), weights=(1.0, )))
    task = tasks.Task('T', 'f', 't', 'acc', '%', 100.0, rows)
    found = dict(teacher={0: line('teacher', 0, 0.9)},
                 student={1: line('student', 1, 0.80), 2: line('student', 2, 0.81)},
                 kd={1: line('kd', 1, 0.84, weight=3.0), 2: line('kd', 2, 0.83, weight=3.0)})
    lines = report.table(task, found).splitlines()
    assert lines[2] == '| teacher | 90.00 | 1 |  |  |  |  |'
    assert lines[3] == '| student alone | 80.50 ± 0.71 | 2 |  |  |  |  |'
    # differences 4 and 2: mean 3, sd 1.4142, t(0.975, 1) = 12.7062, so 12.7062
    assert lines[4] == '| KD | 83.50 ± 0.71 | 2 | +3.00 ± 12.71 to student alone | 2 of 2 | 32% | 3 |'


def test_amd_against_the_size_of_the_map(tool, tmp_path):
    """Value and relative gradient of the scale-free form stay within a fifth, the paper's fall by more than 10^5."""
    sizes = tool('amd_map_sizes')
    for loss, steady in ((sizes.AMDLoss(scale_free=True), True), (sizes.AMDLoss(), False)):
        found = [sizes.measure(loss, size) for size in sizes.SIZES]
        for figures in ([value for value, _, _ in found],
                        [float(gradient.norm()) * norm for _, gradient, norm in found]):
            fall = max(figures) / min(figures)
            assert fall < 1.2 if steady else fall > 1e5
    sizes.draw(tmp_path / 'sizes.png')
    assert (tmp_path / 'sizes.png').stat().st_size > 5000


def test_what_is_written_by_hand_stays(tool):
    insert, (begin, end) = tool('report_gain').insert, (tool('report_gain').BEGIN, tool('report_gain').END)
    page = f'# Results\nhello\n{begin}\nold\n{end}\nbye\n'
    assert insert(page, 'new') == f'# Results\nhello\n{begin}\n\nnew\n\n{end}\nbye\n'
    assert insert(insert(page, 'new'), 'new') == insert(page, 'new')
    for broken in ('# Results\n', f'{end}\n{begin}\n', f'{begin}\n{begin}\n{end}\n'):
        with pytest.raises(ValueError, match='expected the line'):
            insert(broken, 'new')


def test_unpacked_files_are_those_of_the_package(packed, data, tmp_path):
    from mmpretrain.datasets import FashionMNIST
    images, labels = read_split(data / 'fashion_mnist', 'train')
    assert images.shape == (120, 28, 28) and labels.tolist() == [i % 10 for i in range(120)]
    read = FashionMNIST(str(data / 'fashion_mnist'), download=False, pipeline=[], indices=-20)
    assert len(read) == 20 and (read[0]['img'] == images[100]).all() and read[0]['gt_label'] == labels[100]
    assert not unpack_fashion_mnist(data / 'fashion_mnist', packed)  # there already
    (tmp_path / FILES[0]).write_text('')
    with pytest.raises(FileExistsError, match=FILES[1]):
        unpack_fashion_mnist(tmp_path, packed)
    with pytest.raises(FileNotFoundError, match=f'{FILES[0]}.gz is not there'):
        unpack_fashion_mnist(tmp_path / 'new', tmp_path)
    assert not (tmp_path / 'new').exists()


def test_a_missing_package_is_said_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))  # no dpkg
    with pytest.raises(FileNotFoundError, match='apt-get install dataset-fashion-mnist.*--source.*train-images'):
        find_fashion_mnist()


def test_clothing_splits_share_neither_piece_nor_photograph(data):
    sources = split_sources(data / 'fashion_mnist')
    assert {split: source.indices.tolist() for split, source in sources.items()} == dict(
        train=[*range(100)], tuning=[*range(100, 120)], test=[*range(120, 140)])
    columns = {split: {(photo, left + i) for part, (photo, left) in zip(source.parts, source.origins)
                       for i in range(part.shape[1])} for split, source in sources.items()}
    assert sum(map(len, columns.values())) == len(set.union(*columns.values())) == 2 * 640
    for split, source in sources.items():
        book = json.loads((data / f'clothing/annotations/{split}.json').read_text())
        assert book['annotations']
        for piece in book['annotations']:
            place = piece['piece'] - source.indices[0]
            assert piece['category_id'] == source.labels[place]


def test_the_same_settings_make_the_same_clothing(data, tmp_path):
    settings = dict(num_train=8, num_tuning=4, num_test=4)
    assert not make_clothing(data / 'clothing', data / 'fashion_mnist', **settings)
    make_clothing(tmp_path / 'clothing', data / 'fashion_mnist', **settings)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob('*') if path.is_file()]
    assert len(files) == 16 + 3 + 1
    assert all((tmp_path / file).read_bytes() == (data / file).read_bytes() for file in files)
