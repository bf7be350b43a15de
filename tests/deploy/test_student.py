"""What a student is outside a distillation, what becomes of its checkpoints, and what export says of it."""
import base64
import copy
import io
import json
import re
import resource
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from conftest import classification_batch, classifier, detection_batch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from mmpretrain import get_model
from test_digits_configs import data, load, teacher  # noqa: F401  fixtures

from mmkd_plugin.checkpoints.resume import add_safety_hooks
from mmkd_plugin.deploy import cost, student
from mmkd_plugin.deploy.onnx_export import export_onnx
from mmkd_plugin.deploy.report import Report
from mmkd_plugin.deploy.sample_batch import sample_batch
from mmkd_plugin.deploy.student import build_student, export_student, plain_config
from mmkd_plugin.engine import (
    CheckTeacherHook,
    PolicyOptimWrapperConstructor,
    TeacherStudentValLoop,
    UnlabelledEpochBasedTrainLoop,
)

DIGITS = Path('configs/benchmarks/digits/amd_fpn_retinanet_r18-c32_retinanet_r18-c16_digits-300.py')
HOOKS = [dict(type='EMAHook', momentum=0.5), dict(type='mmrazor.StopDistillHook', stop_epoch=2),
         dict(type='mmkd_plugin.BestStudentHook')]


@pytest.fixture
def export(monkeypatch, capsys):
    """Runs the tool; returns what it says."""
    monkeypatch.syspath_prepend('tools')
    monkeypatch.setattr(cost, 'ROUNDS', 3)

    def export(*args):
        monkeypatch.setattr(sys, 'argv', ['export_student.py', *map(str, args)])
        runpy.run_path('tools/export_student.py', run_name='__main__')
        return capsys.readouterr().out

    return export


@pytest.mark.parametrize('name, foreign, library', [
    ('amd/cifar/amd-kd_backbone_resnet34_resnet18_b128_cifar10', None, 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'),
    ('amd/imagenet/amd-kd_backbone_resnet50_mobilenetv2_8xb32_in1k', None,
     'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py'),
    ('amd/cifar/amd-kd_backbone_wrn16-3_wrn16-1_b128_cifar10', 'backbone (mmrazor.WideResNet)', None),
    ('sokd/cifar/sokd-fitnet_backbone_resnet32x4_resnet8x4_b64_cifar100', 'backbone (mmkd_plugin.CIFARResNet)', None),
])
def test_export_says_whether_plain_mmpretrain_takes_the_file(name, foreign, library, tmp_path, export):
    config = f'configs/{name}.py'
    init_default_scope('mmpretrain')
    state = MODELS.build(plain_config(Config.fromfile(config)).model).state_dict()
    torch.save(dict(state_dict={f'architecture.{key}': value for key, value in state.items()}), tmp_path / 'epoch.pth')
    out = tmp_path / 'student.pth'
    said = export(config, tmp_path / 'epoch.pth', out)
    if foreign:
        assert f'do not have its {foreign}: load it' in said and 'after `import mmkd_plugin`' in said
    else:
        assert 'load it with the student\'s own config and neither mmkd_plugin nor mmrazor' in said
    exported = torch.load(out)
    model = get_config(library).model if library else Config.fromstring(exported['meta']['cfg'], '.py')
    model = MODELS.build(model) if library else get_model(model, pretrained=str(out))
    model.load_state_dict(exported['state_dict'], strict=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    report = json.loads(out.with_suffix('.json').read_text())
    assert report['student']['params'] == sum(parameter.numel() for parameter in model.parameters())
    assert report['student']['file_bytes'] == out.stat().st_size and report['student']['accuracy'] is None
    assert report['teacher']['params'] > report['student']['params']
    if '34' in name:
        assert report['teacher']['accuracy'] == {'accuracy/top1': 95.34}  # the metafile's
    assert 'not evaluated' in said and f'{report["student"]["flops"]:,}' in said


class Losses(Hook):
    """The names of the losses that are not zero, by epoch."""

    def __init__(self):
        self.names = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.names.append({name for name, value in outputs.items() if 'loss' in name and value != 0})


@pytest.fixture(scope='module')
def averaged(data, teacher, tmp_path_factory):  # noqa: F811
    """The config and the runner of three epochs of an averaged student that is distilled in the first two."""
    work_dir = tmp_path_factory.mktemp('averaged')
    cfg = load(DIGITS, data, teacher, work_dir)
    cfg.merge_from_dict({'train_cfg.max_epochs': 3, 'train_cfg.val_interval': 1, 'custom_hooks': HOOKS,
                         'default_hooks.checkpoint.save_best': 'auto', 'default_hooks.checkpoint.max_keep_ckpts': 3,
                         'model.architecture.test_cfg.score_thr': 0.})
    add_safety_hooks(cfg)
    Visualizer._instance_dict.clear()
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.losses = Losses()
    runner.register_hook(runner.losses)
    runner.train()
    return cfg, runner, work_dir


def student_of(state, prefix='architecture.'):
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def test_after_the_distillation_stops_its_losses_are_gone_and_training_goes_on(averaged):
    _, runner, work_dir = averaged
    first, second, third = runner.losses.names
    assert {name for name in first if name.startswith('distill')} and first == second
    assert third == {name for name in first if not name.startswith('distill')} and 'loss' in third
    saved = [torch.load(work_dir / f'epoch_{i}.pth', weights_only=False) for i in (2, 3)]
    states = [student_of(content['ema_state_dict'], 'module.architecture.') for content in saved]
    weight = 'backbone.layer4.0.conv1.weight'  # a buffer would change without training
    assert not torch.equal(states[0][weight], states[1][weight])


@pytest.mark.parametrize('name', ['epoch_2.pth', 'epoch_3.pth', 'best', 'student_best.pth', 'exported'])
def test_every_checkpoint_gives_what_was_validated(averaged, tmp_path, name, data):  # noqa: F811
    cfg, _, work_dir = averaged
    if name == 'exported':
        export_student(cfg, str(work_dir / 'epoch_3.pth'), str(tmp_path / 'before.pth'))
        path = tmp_path / 'before.pth'
    else:
        path = next(work_dir.glob('best_*.pth')) if name == 'best' else work_dir / name
    source = torch.load(path, weights_only=False)
    expected = source['state_dict']
    if name[:4] in ('epoc', 'best'):
        assert not any('teacher' in key for key in [*source['state_dict'], *source['ema_state_dict']])
        expected = student_of(expected)
        raw = student_of(source['ema_state_dict'], 'module.architecture.')  # from which training goes on
        if name != 'best':
            assert any(not torch.equal(value, raw[key]) for key, value in expected.items())
    export_student(cfg, str(path), str(tmp_path / 'student.pth'))
    exported = torch.load(tmp_path / 'student.pth')
    assert set(exported['state_dict']) == set(expected)
    assert all(torch.equal(value, expected[key]) for key, value in exported['state_dict'].items())
    assert 'mmkd_plugin' not in exported['meta']['cfg'] and 'mmrazor' not in exported['meta']['cfg']


def test_an_averaged_run_resumes_to_the_same_average(averaged, data, teacher, tmp_path):  # noqa: F811
    cfg, _, work_dir = averaged
    cfg = copy.deepcopy(cfg)
    cfg.merge_from_dict(dict(work_dir=str(tmp_path), resume=True, load_from=str(work_dir / 'epoch_2.pth'),
                             experiment_name=tmp_path.name))
    Visualizer._instance_dict.clear()
    runner = Runner.from_cfg(cfg)
    runner.losses = Losses()
    runner.register_hook(runner.losses)
    runner.train()
    assert len(runner.losses.names) == 1 and not any(name.startswith('distill') for name in runner.losses.names[0])
    once, resumed = (torch.load(path / 'epoch_3.pth', weights_only=False) for path in (work_dir, tmp_path))
    for key in ('state_dict', 'ema_state_dict'):
        for name, value in once[key].items():  # all 8 images are one batch, whose order does not matter but to rounding
            torch.testing.assert_close(resumed[key][name], value, rtol=1e-3, atol=1e-4)


def test_the_policy_goes_on_from_its_own_values_not_from_their_average(data, teacher, tmp_path):  # noqa: F811
    config = 'configs/benchmarks/digits/sokd-fitnet_fpn_retinanet_r18-c32_retinanet_r18-c16_digits-300.py'
    cfg = load(config, data, teacher, tmp_path)
    cfg.merge_from_dict({'train_cfg.max_epochs': 2, 'experiment_name': f'{tmp_path.name}_1', 'custom_hooks': [
        dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0002, update_buffers=True, priority=49),  # RTMDet's
        dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=1)]})
    Visualizer._instance_dict.clear()
    first = Runner.from_cfg(copy.deepcopy(cfg))
    first.train()
    policy = {key: value.clone() for key, value in first.model.distiller.dafa.state_dict().items()}
    cfg.merge_from_dict({'train_cfg.max_epochs': 3, 'resume': True, 'experiment_name': f'{tmp_path.name}_2'})
    Visualizer._instance_dict.clear()
    second = Runner.from_cfg(copy.deepcopy(cfg))
    second.train()
    assert second.model.distiller.dafa.frozen
    for key in ('alpha', 'beta', 'magnitude'):  # which rests after the search
        assert torch.equal(second.model.distiller.dafa.state_dict()[key], policy[key])
    export_student(cfg, str(tmp_path / 'epoch_3.pth'), str(tmp_path / 'student.pth'))


@pytest.fixture(scope='module')
def reported(averaged, tmp_path_factory):
    """What the tool writes and says with all that it can do."""
    pytest.importorskip('onnxruntime')
    cfg, runner, work_dir = averaged
    folder = tmp_path_factory.mktemp('reported')
    cfg.dump(folder / 'config.py')
    arguments = [folder / 'config.py', work_dir / 'epoch_3.pth', folder / 'student.pth', '--evaluate', '--onnx',
                 '--int8', '--calibrate', 4, '--report', '--baseline', work_dir / 'epoch_2.pth']
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.syspath_prepend('tools')
        patch.setattr(cost, 'ROUNDS', 3)
        patch.setattr(sys, 'argv', ['export_student.py', *map(str, arguments)])
        runpy.run_path('tools/export_student.py', run_name='__main__')
    return folder, json.loads((folder / 'student.json').read_text()), said.getvalue(), runner


def test_the_report_has_all_of_them_side_by_side(reported):
    folder, report, said, runner = reported
    validated = runner.message_hub.get_scalar('val/coco/bbox_mAP').current()
    assert report['student']['accuracy']['coco/bbox_mAP'] == pytest.approx(validated)
    assert report['onnx']['accuracy']['coco/bbox_mAP'] == pytest.approx(validated, abs=1e-3)
    assert report['teacher']['accuracy_from'] == 'evaluated' and report['input'] == [1, 3, 128, 128]
    assert report['onnx']['outputs'] == ['boxes', 'scores', 'labels']
    assert abs(report['int8']['drop']) <= 1 and report['int8']['calibrated_with'] == 4
    for name in ('teacher', 'baseline', 'student', 'onnx', 'int8'):
        found = report[name]
        assert found['latency_p95_ms'] >= found['latency_ms'] > 0 and 'coco/bbox_mAP' in found['accuracy']
    assert report['int8']['file_bytes'] == (folder / 'student.int8.onnx').stat().st_size
    assert report['int8']['file_bytes'] < 0.5 * report['onnx']['file_bytes']
    assert {path.name for path in folder.iterdir()} == {
        'config.py', 'student.pth', 'student.onnx', 'student.int8.onnx', 'student.json', 'student.html'}
    assert 'ONNX, 8 bits' in said


def test_the_page_shows_them_beside_the_truth(reported):
    folder, report, *_ = reported
    text = (folder / 'student.html').read_text()
    assert 'http' not in re.sub('data:image/png;base64,[^"]*', '', text)  # one file, which loads nothing
    captions = re.findall('<figcaption>(.*?)</figcaption>', text)
    assert captions == ['truth', 'teacher', 'student alone', 'student', 'ONNX', 'ONNX, 8 bits'] * 4
    pictures = re.findall('base64,([^"]*)"', text)
    assert all(base64.b64decode(picture).startswith(b'\x89PNG') for picture in pictures)
    for value in (report['config'], report['checkpoint'], report['data'], report['environment']['commit']):
        assert value in text


def test_the_page_opens_in_a_browser(reported, tmp_path):
    browser = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if browser is None:
        pytest.skip('neither chromium nor google-chrome is installed')
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', f'--user-data-dir={tmp_path}']
    shown = subprocess.run([browser, *flags, '--dump-dom', f'file://{reported[0]}/student.html'], text=True,
                           timeout=300, capture_output=True).stdout
    assert shown.count('<figcaption>') == 24 and '<td>ONNX, 8 bits</td>' in shown
    assert len(re.findall(r'<tr>', shown)) >= 6 and 'Predictions' in shown


@pytest.mark.parametrize('options, message', [
    (['--int8'], '--int8: needs the ONNX file. Add --onnx'),
    (['--onnx', '--onnx-raw', '--int8'], '--int8: raw outputs cannot be evaluated'),
    (['--report'], "--report: '.*student.html' exists"),
    (['--onnx', '--int8', '--calibrate', '0'], '--calibrate: expected at least one image'),
])
def test_what_would_stop_it_is_said_before_anything_is_written(options, message, tmp_path, export, data):  # noqa: F811
    (tmp_path / 'student.html').write_text('mine')
    checkpoint = tmp_path / 'none.pth'
    with pytest.raises(SystemExit, match=message):
        export(DIGITS, checkpoint, tmp_path / 'student.pth', *options)
    assert [path.name for path in tmp_path.iterdir()] == ['student.html']


def test_a_model_without_a_graph_is_refused_before_anything_is_written(tmp_path, export):
    config = 'configs/benchmarks/digits/retinanet_r18-c16_digits-300.py'
    init_default_scope('mmdet')
    torch.save(MODELS.build(Config.fromfile(config).model).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match='--onnx: test_cfg.nms is .*soft_nms'):
        export(config, tmp_path / 'a.pth', tmp_path / 'student.pth', '--onnx', '--cfg-options',
               'model.test_cfg.nms.type=soft_nms')
    assert [path.name for path in tmp_path.iterdir()] == ['a.pth']


@pytest.mark.parametrize('step, message', [
    ("dict(type='Normalize', mean=[0, 0, 0], std=[1, 1, 1])", '--onnx: the test pipeline has Normalize'),
    ("dict(type='PackDetInputs', meta_keys=('img_id', 'img_shape'))", '--onnx: meta_keys of PackDetInputs .*img_path'),
])
def test_a_pipeline_that_gives_no_pixels_of_known_order_is_refused(step, message, tmp_path, export):
    base = Path('configs/benchmarks/digits/retinanet_r18-c16_digits-300.py').resolve()
    (tmp_path / 'c.py').write_text(f"""_base_ = {str(base)!r}
test_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'), {step}]))
""")
    init_default_scope('mmdet')
    torch.save(MODELS.build(Config.fromfile(base).model).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match=message):
        export(tmp_path / 'c.py', tmp_path / 'a.pth', tmp_path / 'student.pth', '--onnx')
    assert {path.name for path in tmp_path.iterdir()} == {'a.pth', 'c.py'}


def test_a_torn_checkpoint_or_an_existing_file_leaves_nothing_behind(averaged, tmp_path):
    cfg, _, work_dir = averaged
    whole = (work_dir / 'epoch_3.pth').read_bytes()
    (tmp_path / 'torn.pth').write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match='cannot load'):
        export_student(cfg, str(tmp_path / 'torn.pth'), str(tmp_path / 'student.pth'))
    (tmp_path / 'mine.pth').write_text('mine')
    with pytest.raises(ValueError, match='exists'):
        export_student(cfg, str(work_dir / 'epoch_3.pth'), str(tmp_path / 'mine.pth'))
    assert {path.name for path in tmp_path.iterdir()} == {'torn.pth', 'mine.pth'}
    assert (tmp_path / 'mine.pth').read_text() == 'mine'


@pytest.fixture
def small_disk():
    """No file can be larger than 100,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_in_mid_export_leaves_nothing_behind(averaged, build, tmp_path, small_disk):
    cfg, _, work_dir = averaged
    with pytest.raises(ValueError, match=r"out: cannot write '.*student.pth': File too large. No file was written"):
        export_student(cfg, str(work_dir / 'epoch_3.pth'), str(tmp_path / 'student.pth'))
    model = build(classifier(8), 'mmpretrain').eval()
    with pytest.raises(ValueError, match=r"--onnx: cannot write '.*a.onnx': File too large. No file was written"):
        export_onnx(model, classification_batch(32), str(tmp_path / 'a.onnx'))
    assert not [*tmp_path.iterdir()]


def mask2former():
    """Panoptic segmentation, small."""
    cfg = get_config('mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py')
    cfg.model.backbone.update(depth=18, base_channels=8, init_cfg=None)
    cfg.model.data_preprocessor.batch_augments = None
    head = cfg.model.panoptic_head
    head.update(in_channels=[8, 16, 32, 64], feat_channels=32, out_channels=32, num_queries=8)
    head.positional_encoding.num_feats = head.pixel_decoder.positional_encoding.num_feats = 16
    for part, attention in ((head.pixel_decoder.encoder, ['self_attn_cfg']),
                            (head.transformer_decoder, ['self_attn_cfg', 'cross_attn_cfg'])):
        part.num_layers = 1
        part.layer_cfg.ffn_cfg.update(embed_dims=32, feedforward_channels=32)
        for name in attention:
            part.layer_cfg[name].update(embed_dims=32, num_heads=4)
    cfg.test_dataloader.dataset.pipeline[1].scale = (128, 96)
    return cfg


def several_tasks():
    heads = {name: dict(type='LinearClsHead', num_classes=count) for name, count in (('color', 3), ('kind', 4))}
    model = dict(classifier(8), head=dict(type='MultiTaskHead', in_channels=64, task_heads=heads))
    pack = dict(type='PackMultiTaskInputs', multi_task_fields=['gt_label'])
    return Config(dict(default_scope='mmpretrain', model=model, test_dataloader=dict(dataset=dict(
        type='CIFAR10', data_root='not here', pipeline=[pack]))))


@pytest.mark.parametrize('make, kinds', [(mask2former, {torch.int64}), (several_tasks, {torch.float32})],
                         ids=['panoptic', 'several tasks'])
def test_a_student_of_any_kind_is_checked_by_what_it_returns(make, kinds, tmp_path, monkeypatch):
    cfg = make()
    init_default_scope(cfg.default_scope)
    torch.save(dict(state_dict=MODELS.build(copy.deepcopy(cfg.model)).state_dict()), tmp_path / 'a.pth')
    compared = []
    monkeypatch.setattr(student, '_tensors', lambda found, real=student._tensors: compared.append(real(found)) or
                        compared[-1])
    assert export_student(cfg, str(tmp_path / 'a.pth'), str(tmp_path / 'student.pth')) == []
    assert kinds <= {tensor.dtype for tensor in compared[-1]} and len(compared[-1]) >= 2
    model = build_student(cfg, str(tmp_path / 'student.pth')).eval()
    batch, _ = sample_batch(cfg)
    with pytest.raises(ValueError, match='--onnx: (Mask2Former is neither|ImageClassifier with MultiTaskHead)'):
        export_onnx(model, batch, str(tmp_path / 'a.onnx'))


def test_a_file_that_puts_out_something_else_is_not_written(tmp_path, monkeypatch):
    init_default_scope('mmpretrain')
    loader = dict(dataset=dict(type='CIFAR10', data_root=str(tmp_path / 'none'), pipeline=[dict(type='PackInputs')]))
    student = classifier(8)
    cfg = Config(dict(default_scope='mmpretrain', test_dataloader=loader, model=dict(
        type='mmkd_plugin.TeacherStudentDistill', architecture=student, teacher=classifier(16))))
    state = MODELS.build(copy.deepcopy(student)).state_dict()
    torch.save({f'architecture.{key}': value for key, value in state.items()}, tmp_path / 'a.pth')
    export_student(cfg, str(tmp_path / 'a.pth'), str(tmp_path / 'good.pth'))
    # a config that says of itself something else than what was built: another normalisation
    monkeypatch.setattr('mmkd_plugin.deploy.student.plain_config', _with_other_mean(plain_config))
    with pytest.raises(ValueError, match='outputs of the exported student differ .*No file was written'):
        export_student(cfg, str(tmp_path / 'a.pth'), str(tmp_path / 'bad.pth'))
    assert {path.name for path in tmp_path.iterdir()} == {'a.pth', 'good.pth'}


def _with_other_mean(function):
    def changed(cfg):
        cfg = function(cfg)
        cfg.model.data_preprocessor.mean = [100., 100., 100.]
        return cfg
    return changed


def test_the_plain_config_has_the_hooks_of_mmengine_only():
    cfg = Config.fromfile(DIGITS)
    add_safety_hooks(cfg)
    cfg.optim_wrapper.type = 'mmkd_plugin.AutocastOptimWrapper'
    plain = plain_config(cfg)
    checkpoint = plain.default_hooks.checkpoint
    assert (checkpoint.type, checkpoint.interval, checkpoint.max_keep_ckpts) == ('CheckpointHook', 1, 1)
    assert cfg.default_hooks.checkpoint.type == 'mmkd_plugin.SafeCheckpointHook'
    assert 'best_student' in cfg.default_hooks and 'best_student' not in plain.default_hooks
    assert not re.search('mmkd_plugin|mmrazor', Config(plain.to_dict(), format_python_code=False).pretty_text)
    alone = Config.fromfile('configs/benchmarks/digits/retinanet_r18-c16_digits-300.py')
    add_safety_hooks(alone)
    assert 'mmkd_plugin' not in Config(plain_config(alone).to_dict(), format_python_code=False).pretty_text


def test_rtmdets_configs_average_the_student_and_end_the_distillation():
    for method in ('amd/coco/amd', 'sokd/coco/sokd-fitnet'):
        cfg = Config.fromfile(f'configs/{method}_fpn_rtmdet_l_rtmdet_s_8xb32-300e_coco.py')
        ema, switch, stop = cfg.custom_hooks[:3]
        assert ema.type == 'EMAHook' and stop.type == 'mmrazor.StopDistillHook'
        assert stop.stop_epoch == switch.switch_epoch == 280 < cfg.train_cfg.max_epochs


def test_the_report_leaves_out_a_teacher_with_other_classes_or_that_does_not_run(tmp_path):
    init_default_scope('mmdet')
    for change, message in ((dict(num_classes=7), r'\[7\] classes and the student \[10\]'),
                            (dict(in_channels=9), 'channels')):
        cfg = Config.fromfile(DIGITS)
        cfg.model.teacher = Config.fromfile('configs/benchmarks/digits/retinanet_r18-c32_digits.py').model
        cfg.model.teacher.bbox_head.update(change)
        cfg.model.teacher_ckpt = None
        torch.save(dict(meta={}, state_dict=MODELS.build(plain_config(cfg).model).state_dict()), tmp_path / 's.pth')
        report = Report(cfg, str(tmp_path / 's.pth'), detection_batch(size=64))
        assert set(report.models) == {'student'} and re.search(message, report.found['teacher']['missing'])


def test_a_teacher_without_a_preprocessor_gets_the_students_in_the_report(tmp_path):
    cfg = Config.fromfile(DIGITS)
    cfg.model.teacher = Config.fromfile('configs/benchmarks/digits/retinanet_r18-c32_digits.py').model
    cfg.model.teacher.pop('data_preprocessor', None)
    cfg.model.teacher_ckpt = None
    torch.save(dict(meta={}, state_dict=MODELS.build(plain_config(cfg).model).state_dict()), tmp_path / 's.pth')
    models = Report(cfg, str(tmp_path / 's.pth'), detection_batch(size=64)).models
    mean = models['student'].data_preprocessor.mean
    assert mean.sum() > 0 and torch.equal(models['teacher'].data_preprocessor.mean, mean)


def test_the_report_resizes_the_images_of_a_teacher_as_the_distillation_does(tmp_path):
    cfg = Config.fromfile(DIGITS)
    cfg.model.teacher = Config.fromfile('configs/benchmarks/digits/retinanet_r18-c32_digits.py').model
    cfg.model.teacher_ckpt = str(tmp_path / 't.pth')
    init_default_scope('mmdet')
    torch.save(dict(meta={}, state_dict=MODELS.build(cfg.model.teacher).state_dict()), cfg.model.teacher_ckpt)
    torch.save(dict(meta={}, state_dict=MODELS.build(plain_config(cfg).model).state_dict()), tmp_path / 's.pth')
    batch = detection_batch(size=64)
    plain = Report(cfg, str(tmp_path / 's.pth'), batch).found['teacher']
    cfg.model.teacher_input_size = (128, 160)
    report = Report(cfg, str(tmp_path / 's.pth'), batch)
    assert 'missing' not in report.found['teacher'], report.found['teacher']
    assert report.found['teacher']['flops'] == pytest.approx(5 * plain['flops'], rel=0.05)
    found = report.models['teacher'].test_step(batch)
    algorithm = MODELS.build(cfg.model).eval()
    images = algorithm.data_preprocessor(batch, False)
    frozen = algorithm.teachers['']
    with torch.no_grad():
        expected = frozen.network(*frozen.batch(images['inputs'], images['data_samples']), mode='predict')
    for one, other in zip(found, expected):
        assert len(one.pred_instances) > 0
        torch.testing.assert_close(one.pred_instances.bboxes, other.pred_instances.bboxes)


def test_types_that_are_classes_and_fields_that_are_none():
    cfg = Config.fromfile(DIGITS)
    cfg._cfg_dict['custom_hooks'] = [dict(type=CheckTeacherHook), dict(type=EMAHook)]
    cfg._cfg_dict['val_cfg'] = dict(type=TeacherStudentValLoop)
    cfg._cfg_dict['train_cfg'] = dict(type=UnlabelledEpochBasedTrainLoop, max_epochs=1, unlabelled_dataloader={})
    cfg._cfg_dict['optim_wrapper'] = dict(constructor=PolicyOptimWrapperConstructor, policy={})
    cfg._cfg_dict['default_hooks'] = None
    plain = plain_config(cfg)
    assert plain.custom_hooks == [dict(type=EMAHook)] and 'constructor' not in plain.optim_wrapper
    assert plain.train_cfg == dict(type='EpochBasedTrainLoop', max_epochs=1) and plain.val_cfg == {}
    cfg._cfg_dict['train_cfg'] = dict(type='mmrazor.DartsEpochBasedTrainLoop', max_epochs=1, mutator_dataloader={})
    assert plain_config(cfg).train_cfg == plain.train_cfg
    cfg._cfg_dict['custom_hooks'] = None
    assert plain_config(cfg).custom_hooks == []
