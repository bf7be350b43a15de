"""The benchmarks run to their end on the smallest models and maps, and count as they say."""
import importlib
import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.utils import get_installed_path

from mmkd_plugin.models.losses import AMDLoss

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(monkeypatch):
    """Imports a file of ``tools``."""
    monkeypatch.syspath_prepend(ROOT / 'tools/benchmarks')
    level = MMLogger.get_current_instance().level
    yield importlib.import_module
    MMLogger.get_current_instance().setLevel(level)


@pytest.fixture
def run(tool, monkeypatch, capsys):
    """Runs a file of ``tools`` and returns what it printed."""
    def run(name, *arguments):
        monkeypatch.setattr('sys.argv', [name, *map(str, arguments)])
        tool(name).main()
        return capsys.readouterr().out
    return run


@pytest.mark.parametrize('count, low, high', [(2, 0, 1), (5, 0, 4), (6, 0, 5), (9, 1, 7), (15, 3, 11), (100, 39, 60)])
def test_interval_is_that_of_the_tables_of_order_statistics(tool, count, low, high):
    values = torch.randperm(count).tolist()
    assert tool('benchmarking').median_interval(values) == ((count - 1) / 2, low, high)


def test_ratios_are_taken_within_rounds(tool):
    assert tool('benchmarking').ratio([2.0, 20.0, 200.0], [1.0, 10.0, 50.0]) == dict(ratio=2.0, low=2.0, high=4.0)


def test_every_call_runs_once_a_round_in_changing_order(tool):
    order = []
    benchmarking = tool('benchmarking')
    seconds = benchmarking.interleave({name: lambda name=name: order.append(name) for name in 'abc'}, 8)
    rounds = [''.join(order[i:i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 8 + benchmarking.WARMUP and len(set(rounds)) > 2
    assert all(sorted(each) == ['a', 'b', 'c'] for each in rounds)
    assert all(len(values) == 8 for values in seconds.values())


def test_peak_memory_is_the_most_held_at_once(tool):
    before = torch.ones(5000)

    def step():
        first, second = torch.empty(1000), torch.empty(500)
        del first
        return torch.empty(200) + second.sum() + before[:1].sum()

    peak_memory = tool('benchmarking').peak_memory
    assert peak_memory(step) == peak_memory(step) == 4000 + 2000
    assert peak_memory(lambda: None) == 0


def test_the_plain_loss_is_the_papers(tool):
    plain = tool('loss').plain
    student, teacher = (torch.randn(2, 8, 6, 5, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    losses = plain(student, teacher), AMDLoss()(student, teacher)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in losses))


def test_benchmark_loss(run, tool, tmp_path):
    output = run('loss', '--maps', '64x32x32', '4x16x16', '--rounds', 2, '--out', tmp_path / 'loss_1.json',
                 '--plot', tmp_path / 'loss.png')
    large, small = json.loads((tmp_path / 'loss_1.json').read_text())['maps']
    assert large['map_bytes'] == 2 * 64 * 32 * 32 * 4
    assert 0 < large['variants']['lower bound']['peak_bytes'] - large['map_bytes'] < 100  # the gradient, and scalars
    for name in ('amd', 'amd scale-free'):
        assert large['map_bytes'] < large['variants'][name]['peak_bytes'] < large['variants']['plain']['peak_bytes']
        assert len(large['variants'][name]['seconds']) == 2
    assert output.count('| 2 x 4 x 16 x 16 |') == len(small['variants']) == 4
    assert (tmp_path / 'loss.png').stat().st_size > 0
    text = '\n'.join(tool('report_cost').sections(tmp_path, tmp_path))
    assert output.splitlines()[-1] in text and 'loss --maps 64x32x32 4x16x16 --rounds 2' in text
    assert '(images/results_loss_1.png)' in text and (tmp_path / 'results_loss_1.png').stat().st_size > 0


def test_benchmark_step(run, tool, monkeypatch, tmp_path):
    monkeypatch.setattr(tool('step'), 'MEMORY_STEPS', 1)
    output = run('step', '--pair', 'resnet', '--size', '32x32', '--batch', 2, '--rounds', 2, '--variants',
                 'amd', 'amd_float32', 'amd_amp', 'sokd_search', 'sokd_frozen', 'sokd_base', 'cwd',
                 '--sub-policies', 1, 36, '--clock', 'cpu', '--out', tmp_path / 'step_1.json', '--plot',
                 tmp_path / 'step.png')
    found = json.loads((tmp_path / 'step_1.json').read_text())
    variants = [(figure['variant'], figure['settings']['sub_policies']) for figure in found['variants']]
    assert variants == [('student', 1), ('lower_bound', 1), ('amd', 1), ('amd_float32', 1),
                        ('amd_amp', 1), ('sokd_search', 1), ('sokd_search', 36), ('sokd_frozen', 1),
                        ('sokd_frozen', 36), ('sokd_base', 1), ('cwd', 1)]
    figures = dict(zip(variants, found['variants']))
    assert figures['lower_bound', 1]['to_lower_bound'] == dict(ratio=1.0, low=1.0, high=1.0)
    assert figures['student', 1]['to_student'] == dict(ratio=1.0, low=1.0, high=1.0)
    weights = figures['lower_bound', 1]['peak_bytes']
    assert found['teacher_bytes'] > 21.8e6 * 4
    assert figures['lower_bound', 1]['memory_to_student'] > 1 + 0.9 * found['teacher_bytes'] / figures[
        'student', 1]['peak_bytes']
    assert weights > (21.8e6 + 11.7e6 * 2) * 4  # teacher, student, its momentum
    assert figures['sokd_search', 36]['peak_bytes'] > figures['sokd_base', 1]['peak_bytes'] > weights
    goals = [(goal['variant'], goal['below'], goal['settings']['sub_policies']) for goal in found['goals']]
    assert goals == [('amd', 'lower_bound', 1), ('sokd_search', 'lower_bound', 1), ('sokd_search', 'lower_bound', 36),
                     ('sokd_frozen', 'lower_bound', 1), ('sokd_frozen', 'lower_bound', 36),
                     ('sokd_search', 'sokd_frozen', 1), ('sokd_search', 'sokd_frozen', 36)]
    assert output.count('reached') + output.count('MISSED') == 2 * 5 + 2
    assert (tmp_path / 'step.png').stat().st_size > 0
    text = '\n'.join(tool('report_cost').sections(tmp_path, tmp_path))
    row, = (line for line in output.splitlines() if line.startswith('| cwd |'))
    assert '| variant | sub-policies | ms | time to the student\'s own step | time to the lower bound |' in output
    assert row in text and '### ResNet34 to ResNet18 against sub-policies, torch' in text
    assert '(images/results_step_1.png)' in text and (tmp_path / 'results_step_1.png').stat().st_size > 0


def test_what_sokd_is_measured_on(tool):
    for name, base in (('retinanet', 'pkd'), ('resnet', 'reviewkd'), ('resnet-fitnet', 'fitnet')):
        pair = tool('step').PAIRS[name]
        found = Config.fromfile(ROOT / pair.configs['sokd']).model.distiller.base
        assert base == (found if isinstance(found, str) else found.preset)
        assert 'AMD' in Config.fromfile(ROOT / pair.configs['amd']).model.distiller.type


def test_a_step_that_cannot_be_is_one_sentence(run):
    with pytest.raises(SystemExit, match='fbkd cannot take a step on images of .32, 32.'):
        run('step', '--pair', 'resnet', '--size', '32x32', '--batch', 2, '--variants', 'fbkd')


@pytest.mark.parametrize('options, message', [
    (['--size', '800'], 'expected HxW'),
    (['--size', '8x8'], 'at least 32x32'),
    (['--size', '64x64', '96x96', '--areas', '1', '2'], '--size and --areas have several values'),
    (['--plot', 'x.png'], '--plot needs several values'),
    (['--layers', '6'], '--layers: at most 5'),
])
def test_wrong_options_are_said(run, capsys, options, message):
    with pytest.raises(SystemExit):
        run('step', *options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('method, config', [
    ('cwd', 'cwd/cwd_fpn_retina_r101_retina_r50_1x_coco.py'),
    ('pkd', 'pkd/pkd_fpn_retina_x101_retina_r50_2x_coco.py'),
    ('mgd', 'mgd/mgd_fpn_retina_x101_retina_r50_2x_coco.py'),
    ('fbkd', 'fbkd/fbkd_fpn_faster-rcnn_r101_faster-rcnn_r50_1x_coco.py'),
])
def test_mmrazors_methods_are_as_in_its_configs(tool, method, config):
    step = tool('step')
    theirs = Config.fromfile(f'{get_installed_path("mmrazor")}/.mim/configs/distill/mmdet/{config}').model.distiller
    ours = step.razor_distiller(method, step.PAIRS['retinanet'].maps)
    defaults = dict(MGDConnector=dict(lambda_mgd=0.65), MGDLoss=dict(alpha_mgd=2e-5),
                    ChannelWiseDivergence=dict(tau=1))

    def parts(distiller):
        return [[{**defaults.get(part['type'], {}), **part} for part in distiller.get(field, {}).values()]
                for field in ('connectors', 'distill_losses')]

    assert parts(ours) == parts(theirs.to_dict())
