"""The benchmark of accuracy: its configs, a miniature of it from end to end, and the report's arithmetic."""
import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import make_bccd, make_cifar10_images
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for name in ('bccd', 'cifar10') for path in (ROOT / 'configs/benchmarks' / name).glob('*.py'))


@pytest.fixture(scope='module')
def tool():
    """Imports a file of ``tools``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'tools/benchmarks')
        yield importlib.import_module


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """The data of all tasks, with a few images and random weights."""
    from mmdet.models.backbones import MobileNetV2
    root = tmp_path_factory.mktemp('data')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'tools/dataset_converters')
        importlib.import_module('bccd').convert(make_bccd(root / 'source/BCCD', 2), root / 'bccd')
        importlib.import_module('cifar10').convert(make_cifar10_images(root / 'source/cifar10'), root / 'cifar10')
    torch.save(dict(state_dict=MobileNetV2(out_indices=(1, 2, 4, 6)).state_dict()), root / 'mobilenet_v2.pth')
    return root


def small(cfg: Config) -> Config:
    """The config on the few images, for one epoch."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[name].batch_size = 2
    cfg.train_dataloader.dataset.pop('indices', None)
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    return Config(cfg.to_dict(), format_python_code=False)  # formatting takes seconds


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains_for_an_epoch(tool, path, data, tmp_path):
    cfg = Config(tool('gain')._with_data(small(Config.fromfile(path)).to_dict(), data), format_python_code=False)
    cfg.work_dir, cfg.default_hooks.checkpoint, cfg.log_level = str(tmp_path), None, 'WARNING'
    if 'teacher' in cfg.model:
        teacher = Config.fromfile(cfg.model.teacher.cfg_path)
        with DefaultScope.overwrite_default_scope(teacher.default_scope):
            torch.save(MODELS.build(teacher.model).state_dict(), tmp_path / 'teacher.pth')
        cfg.model.teacher_ckpt = str(tmp_path / 'teacher.pth')
    runner = Runner.from_cfg(cfg)
    runner.train()
    logged = {key: buffer.data[0][-1] for key, buffer in runner.message_hub.log_scalars.items() if 'loss' in key}
    assert logged and all(np.isfinite(value) for value in logged.values())


def tune(benchmark, task):
    """Results as if every experiment had been tuned, with the second of its weights the best."""
    return [dict(experiment=run.experiment, seed=run.seed, fingerprint=run.fingerprint,
                 metric=float(run.weights == task.experiments[run.experiment].weights[1]))
            for run in benchmark.tuning_runs(task, task.experiments)]


def test_every_experiment_is_another_config(tool):
    benchmark = tool('gain')
    for task in tool('gain_tasks').TASKS.values():
        experiments = task.experiments
        assert all(one.base in experiments for name, one in experiments.items() if name != 'student')
        assert all(experiments[one.weights_of].weights for one in experiments.values() if one.weights_of)
        assert not [name for name, one in experiments.items() if one.weights and one.weights_of]
        runs = benchmark.reported_runs(task, tune(benchmark, task), experiments)
        prints = {run.experiment: run.fingerprint for run in runs}
        assert len(set(prints.values())) == len(prints) == len(experiments), prints


@pytest.mark.parametrize('name', ['bccd', 'bccd_mobilenet', 'cifar10'])
def test_every_experiment_builds(tool, data, name, tmp_path):
    benchmark, task = tool('gain'), tool('gain_tasks').TASKS[name]
    teacher = Config.fromfile(ROOT / f'{task.folder}/{task.teacher}.py')
    with DefaultScope.overwrite_default_scope(teacher.default_scope):
        torch.save(MODELS.build(teacher.model).state_dict(), tmp_path / 'teacher.pth')
        for run in benchmark.reported_runs(task, [], [one for one in task.experiments if one != 'student']):
            if run.seed == 1:
                cfg = Config(benchmark._with_data(run.config.to_dict(), data), format_python_code=False)
                cfg.model.teacher_ckpt = str(tmp_path / 'teacher.pth')
                distiller = MODELS.build(cfg.model).distiller
                losses = getattr(distiller, 'loss_names', distiller.distill_losses)
                assert bool(len(losses)) == (run.experiment != 'inherited')


def test_budgets_are_equal_and_claims_few(tool):
    tasks = tool('gain_tasks')
    for task in tasks.TASKS.values():
        assert {len(one.weights) for one in task.experiments.values() if one.weights} == {4}
        claims = [name for name, one in task.experiments.items() if one.seeds == tasks.CLAIM]
        assert len(claims) <= 8
        assert all(task.experiments[task.experiments[name].base].seeds >= 3 for name in claims if name != 'student')
        for name in task.headlines:
            assert name in claims and task.experiments[name].base in claims


def test_an_experiment_has_the_best_weights_that_it_shall_have(tool):
    benchmark, task = tool('gain'), tool('gain_tasks').TASKS['bccd']
    runs = {run.experiment: run for run in benchmark.reported_runs(task, tune(benchmark, task), task.experiments)}
    pkd, (beside, dam) = task.experiments['pkd'].weights[1], task.experiments['sokd_pkd'].weights[1]
    for name, weight in (('pkd', pkd[0]), ('sokd_pkd', beside), ('no_dafa', beside), ('no_areas', beside)):
        distiller = runs[name].config.model.distiller
        assert distiller.base == 'pkd' and distiller.loss_weight == weight
        if name == 'pkd':
            assert distiller.get('dam') is None and runs[name].weights == pkd
        else:
            assert distiller.dam.detect_loss_weight == dam
            assert distiller.dam.area_loss_weight == (0 if name == 'no_areas' else 3 * dam)
            assert runs[name].weights == (beside, dam)
    assert runs['no_dafa'].config.model.distiller.dafa is None and 'policy' not in runs['no_dafa'].config.optim_wrapper
    assert runs['sokd_pkd'].config.optim_wrapper.policy.type == 'Adam'
    assert runs['dafa_similarity'].config.model.distiller.dam is None
    assert runs['pkd_adapter'].config.model.distiller.loss_weight == [beside, dam]
    assert runs['student'].weights == () == runs['inherited'].weights


def test_weights_without_tuning_and_with_half_of_it(tool):
    benchmark, task = tool('gain'), tool('gain_tasks').TASKS['bccd']
    assert benchmark.best_weights(task, 'sokd_pkd', []) == task.experiments['sokd_pkd'].weights[0]
    assert benchmark.best_weights(task, 'no_areas', []) == task.experiments['sokd_pkd'].weights[0]
    tuned = tune(benchmark, task)
    assert benchmark.is_tuned(task, 'no_areas', tuned) and not benchmark.is_tuned(task, 'no_areas', [])
    half = [line for line in tuned if line['experiment'] != 'pkd'] + [
        line for line in tuned if line['experiment'] == 'pkd'][:2]
    with pytest.raises(ValueError, match=r'pkd: weights \(60.0,\) are not tuned with seed 100 yet.*--tune'):
        list(benchmark.reported_runs(task, half, ['pkd']))
    assert [run.experiment for run in benchmark.tuning_runs(task, ['pkd', 'no_areas'])] == ['pkd'] * 4
    diverged = [dict(line, metric=None) for line in tuned]
    with pytest.raises(ValueError, match='pkd: the training diverged with all weights'):
        list(benchmark.reported_runs(task, diverged, ['pkd']))


def test_tuning_sees_no_test_image_and_training_none_of_both(tool):
    benchmark = tool('gain')
    for task in tool('gain_tasks').TASKS.values():
        one = task.experiments['student']
        tuning, test = (benchmark._run(task, one, 'student', 1, (), split).config for split in ('tuning', 'test'))
        assert test.val_dataloader == test.test_dataloader == tuning.test_dataloader
        files = {name: Path(loader.dataset.ann_file).stem for name, loader in (
            ('train', test.train_dataloader), ('val', tuning.val_dataloader), ('test', test.val_dataloader))}
        assert files == dict(train='train', val='val', test='test')
        for cfg, split in ((tuning, 'val'), (test, 'test')):
            assert Path(cfg.val_evaluator.get('ann_file', split)).stem == split


def test_data_may_be_elsewhere(tool):
    config = dict(a='data/bccd/', b=[dict(c='data/x.json'), 'database', 1], d=('data/y', ))
    assert tool('gain')._with_data(config, Path('/mnt')) == dict(
        a='/mnt/bccd/', b=[dict(c='/mnt/x.json'), 'database', 1], d=('/mnt/y', ))


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
    """A task of two experiments, and a broken one, on a few images; returns how to run it."""
    benchmark, tasks = tool('gain'), tool('gain_tasks')
    configs = tmp_path / 'configs'
    configs.mkdir()
    original = tasks.TASKS['bccd']
    for name in (original.teacher, 'retinanet_r18-c16_bccd-60', 'inherit_retinanet_r18-c32_retinanet_r18-c16_bccd-60'):
        cfg = small(Config.fromfile(ROOT / f'{original.folder}/{name}.py'))
        if 'teacher' in cfg.model:
            cfg.model.teacher.cfg_path = str(configs / f'{original.teacher}.py')
            cfg.model.architecture.test_cfg.score_thr = 0.0  # it detects something; the others have learned too little
        cfg.dump(configs / f'{name}.py')
    experiments = {name: dataclasses.replace(original.experiments[name], seeds=1) for name in ('student', 'sokd_pkd')}
    experiments['sokd_pkd'] = dataclasses.replace(
        experiments['sokd_pkd'], base='student', weights=((1.0, 0.1), (2.0, 0.1), (1e39, 0.1)))  # the last is too much
    experiments['broken'] = dataclasses.replace(
        experiments['student'], options=lambda: {'optim_wrapper.optimizer.type': 'Nonsense'})
    task = dataclasses.replace(original, folder=str(configs), experiments=experiments, headlines=('sokd_pkd', ))
    monkeypatch.setitem(benchmark.TASKS, 'miniature', task)
    monkeypatch.chdir(ROOT)

    def run(**changes):
        arguments = dict(experiments=['student', 'sokd_pkd'], seeds=None, tune=False, jobs=2, data=data,
                         results=tmp_path / 'results', work_dir=tmp_path / 'work')
        return benchmark.run_task('miniature', argparse.Namespace(**{**arguments, **changes}))
    return run


def test_a_miniature_from_tuning_to_report(miniature, tool, capsys, tmp_path):
    benchmark, report = tool('gain'), tool('report_gain')
    results, tuning = tmp_path / 'results/miniature.jsonl', tmp_path / 'results/miniature_tuning.jsonl'
    with pytest.raises(ValueError, match='--data: nowhere/bccd not found. Run `python tools/.*/bccd.py'):
        miniature(data=Path('nowhere'))
    with pytest.raises(ValueError, match="--experiments: no experiment 'sokd_pk'.*sokd_pkd"):
        miniature(experiments=['sokd_pk'])
    assert miniature(tune=True) == 0
    assert 'sokd_pkd at 1e+39, 0.1, seed 100: diverged, see' in capsys.readouterr().out
    assert 'FloatingPointError' in (tmp_path / 'work/miniature/failed_sokd_pkd_1e+39_0.1_100.log').read_text()
    tried = [json.loads(line) for line in tuning.read_text().splitlines()]
    assert sorted((line['experiment'], line['seed'], line['weights']) for line in tried) == [
        ('sokd_pkd', 100, [1.0, 0.1]), ('sokd_pkd', 100, [2.0, 0.1]), ('sokd_pkd', 100, [1e39, 0.1])]
    for line in tried:
        assert (line['metric'] is None) == (line['weights'][0] == 1e39)
        line['metric'] = {1.0: 10.0, 2.0: 20.0, 1e39: None}[line['weights'][0]]
    tuning.write_text(''.join(json.dumps(line) + '\n' for line in tried))
    assert miniature() == 0
    lines = {(line['experiment'], line['seed']): line for line in map(json.loads, results.read_text().splitlines())}
    assert set(lines) == {('teacher', 0), ('student', 1), ('sokd_pkd', 1)}
    found = lines['sokd_pkd', 1]
    assert found['weights'] == [2.0, 0.1] and found['torch'] == torch.__version__ and len(found['resampled']) == 500
    assert 'coco/bbox_mAP_50' in found['metrics']
    assert np.mean(found['resampled']) == pytest.approx(found['metric'], abs=0.03)
    assert lines['student', 1]['metrics'] == {'coco/bbox_mAP': 0.0} and max(lines['student', 1]['resampled']) == 0
    assert 0 < found['policy'][-1]['entropy'] <= 1 and 'policy' not in lines['student', 1]
    assert not list((tmp_path / 'work/miniature').glob('sokd*'))  # nothing left behind

    before = results.read_bytes()
    results.write_bytes(before + b'{"experiment": "stu')  # the machine went down
    capsys.readouterr()
    assert miniature() == 0
    assert results.read_bytes() == before and '2 of 2 runs are in' in capsys.readouterr().out
    assert miniature(experiments=['broken']) == 1
    assert results.read_bytes() == before and 'broken, seed 1: failed, see' in capsys.readouterr().out
    assert 'Nonsense' in (tmp_path / 'work/miniature/failed_broken_1.log').read_text()
    for lock in (results, tmp_path / 'work/lock'):
        with benchmark.locked(lock), pytest.raises(SystemExit, match='another benchmark is running'):
            miniature(tune=True)
    results.write_bytes(before.replace(f'"teacher": "{found["teacher"]}"'.encode(), b'"teacher": "another"'))
    with pytest.raises(ValueError, match='has students of another teacher .another. than the one in .*Use another'):
        miniature()
    results.write_bytes(before)

    task = benchmark.TASKS['miniature']
    current = report.current(task, benchmark.read(results), benchmark.read(tuning))
    assert set(report.current(task, benchmark.read(results), [])) == {'teacher', 'student'}  # at other weights
    stale = [dict(line, fingerprint='other') for line in benchmark.read(results)]
    assert current == report.current(task, benchmark.read(results) + stale, benchmark.read(tuning))
    for kind in ('bars', 'policy'):
        getattr(report, kind)(task, current, tmp_path / f'{kind}.png')
        assert (tmp_path / f'{kind}.png').stat().st_size > 5000


def test_predictions_of_a_classifier_are_kept(tool, data, monkeypatch, tmp_path):
    benchmark, task = tool('gain'), tool('gain_tasks').TASKS['cifar10']
    monkeypatch.chdir(ROOT)
    run = benchmark._run(task, task.experiments['student'], 'student', 1, (), 'test')
    run = dataclasses.replace(run, config=small(run.config))
    line = benchmark.train(task, run, tmp_path / 'place', data, tmp_path / 'teacher.pth')
    assert len(line['resampled']) == 500
    assert {round(value * 6 / 100, 2) % 1 for value in line['resampled']} == {0.0}  # shares of 6 images
    assert min(line['resampled']) <= line['metric'] <= max(line['resampled'])


def test_a_training_ends_with_a_killed_benchmark(tool, data, tmp_path):
    cfg = small(Config.fromfile(ROOT / 'configs/benchmarks/cifar10/resnet8_cifar10-5000.py'))
    cfg = Config(tool('gain')._with_data(cfg.to_dict(), data), format_python_code=False)
    cfg.train_cfg.update(max_epochs=10**6, val_interval=10**6)
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
    path = os.pathsep.join(['tools/benchmarks', str(ROOT)])
    with subprocess.Popen([sys.executable, script, config, log], text=True, stdout=subprocess.PIPE, cwd=ROOT,
                          env=dict(os.environ, PYTHONPATH=path)) as benchmark:
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


def line(experiment, seed, metric, **more):
    """A line of results; other test images move it by 0.02 up or down, the same for all."""
    return dict(dict(experiment=experiment, seed=seed, metric=metric, weights=[], seconds=36, commit='abc', torch='2',
                     mmdet='3', mmpretrain='1', device='cpu', threads=1,
                     resampled=(metric + np.linspace(-0.02, 0.02, 401)).tolist()), **more)


def test_the_reports_arithmetic(tool):
    """Differences 1, 2, 3 and 2: mean 2, sd 0.8165, t(0.975, 3) = 3.1824, so +- 1.2992."""
    report = tool('report_gain')
    above, below = {1: 81.0, 2: 83.0, 3: 84.0, 4: 82.0, 9: 0.0}, {1: 80.0, 2: 81.0, 3: 81.0, 4: 80.0, 8: 0.0}
    mean, half, better = report.paired(above, below)
    assert (mean, better) == (2.0, '4 of 4') and half == pytest.approx(1.2992, abs=1e-4)
    assert report.paired({1: 80.0, 2: 80.0}, {1: 80.0, 2: 81.0})[2] == '0 of 2, 1 equal'
    assert report.paired({1: 1.0}, {1: 0.0}) is None
    assert report.closed({1: 85.0, 2: 84.0}, {1: 80.0, 2: 81.0, 3: 79.0}, 90.0) == pytest.approx(45)
    assert report.closed({1: 85.0}, {}, 90.0) is None


def test_the_permutation_test(tool):
    """Of the 16 sums of 1, 2, 3 and 2 with any signs 2 are 8 or -8, and 8 are 4 or more, or -4 or less."""
    test = tool('report_gain').permutation_test
    assert test({1: 1.0, 2: 2.0, 3: 3.0, 4: 2.0, 9: 5.0}, dict.fromkeys((1, 2, 3, 4), 0.0)) == 2 / 16
    assert test({1: 1.0, 2: 2.0, 3: 3.0, 4: -2.0}, dict.fromkeys((1, 2, 3, 4), 0.0)) == 8 / 16
    assert test(dict.fromkeys(range(10), 1.0), dict.fromkeys(range(10), 0.5)) == 2 / 1024
    assert test({1: 1.0, 2: 1.0}, {1: 1.0, 2: 1.0}) == 1


def test_intervals_over_images(tool):
    over_images = tool('report_gain').over_images
    steps = np.linspace(0, 100, 401)
    assert over_images({1: steps, 2: steps + 10}) == pytest.approx((7.5, 102.5))
    # the images' part is the same in both and leaves nothing but the difference of 3
    assert over_images({1: steps + 3, 9: steps}, {1: steps, 8: steps}) == pytest.approx((3.0, 3.0))


@pytest.fixture
def results(tool):
    """A task of two experiments and what was found of it."""
    tasks = tool('gain_tasks')
    experiments = dict(student=tasks.Experiment('student alone', 's'),
                       kd=tasks.Experiment('KD', 'k', 'student', weights=((3.0, ), )))
    task = tasks.Task('T', {}, 'f', 't', 'acc', '%', 100.0, experiments, ('kd', ))
    return task, dict(teacher={0: line('teacher', 0, 0.9)},
                      student={1: line('student', 1, 0.80), 2: line('student', 2, 0.81)},
                      kd={1: line('kd', 1, 0.84, weights=[3.0]), 2: line('kd', 2, 0.83, weights=[3.0])})


def test_the_table(tool, results, monkeypatch):
    report = tool('report_gain')
    for tuned in (True, False):
        monkeypatch.setattr(report, 'is_tuned', lambda *_: tuned)  # noqa: B023
        lines = report.table(*results, []).splitlines()
        assert lines[2] == '| teacher | 90.0 | 88.1 to 91.9 | 1 |  |  |  |  |  |  |'
        assert lines[3] == '| student alone | 80.5 ± 0.7 | 78.6 to 82.4 | 2 |  |  |  |  |  |  |'
        # differences 4 and 2: mean 3, sd 1.4142, t(0.975, 1) = 12.7062, so 12.7062
        assert lines[4] == ('| KD | 83.5 ± 0.7 | 81.6 to 85.4 | 2 | +3.00 ± 12.71 to student alone | +3.00 to +3.00 | '
                            f'2 of 2 | 0.500 | 32% | 3{"" if tuned else " (not tuned)"} |')
    task, found = results
    gone = dict(found, kd=found['kd'] | {3: line('kd', 3, 0.8) | dict(metric=None)})
    assert '| 2, 1 diverged |' in report.table(task, gone, []).splitlines()[4]
    assert report.table(task, dict(found, kd={3: gone['kd'][3]}), []).splitlines()[4] == (
        '| KD |  |  | 0, 1 diverged |  |  |  |  |  |  |')
    biased = {1: dict(found['kd'][1], resampled=[0.86, 0.90])}  # mean 0.88; the metric is 0.84
    assert report.resampled(task, dict(kd=biased), 'kd')[1] == pytest.approx([82, 86])
    for seed, weight in ((1, 31.25), (2, 28.0)):
        results[1]['kd'][seed].update(weights=[], measured=dict(pkd=weight))
    assert report.table(*results, []).splitlines()[4].endswith('| 32% | 28 to 31.2 (measured) |')


def test_the_first_sentences(tool, results):
    assert tool('report_gain').summary(*results) == (
        'T: the teacher has 90.0 %, the student alone 80.5, and with KD 83.5, which closes 32% of the gap. KD differs '
        'from student alone by +3.00 ± 12.71 points over seeds (better in 2 of 2, p = 0.500; over images +3.00 to '
        '+3.00).')


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
