"""No way by which a model's weights are read runs what is in their file."""
import io
import os
import runpy
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import classification_batch, classifier, retinanet
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.registry import DATASETS, HOOKS, DefaultScope
from mmengine.runner import Runner, load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader, _load_checkpoint
from mmengine.visualization import Visualizer

from mmkd_plugin.checkpoints.guard import data_only
from mmkd_plugin.checkpoints.initialize import forget_weights_files, weights_files
from mmkd_plugin.config.cfg_path import build_cfg_path

REFUSED = r'refused because of (posix|nt)\.system.*trust_checkpoint=True'


class Touch:
    """Pickles as a command that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}', )


@pytest.fixture
def ran(tmp_path):
    """Where the evil file leaves its mark."""
    return tmp_path / 'ran'


@pytest.fixture
def evil(tmp_path, ran, monkeypatch):
    """A weights file with a command in it, which the cache of downloads has under the names of some addresses too."""
    content = dict(state_dict={'backbone.conv1.weight': torch.zeros(1)}, meta=dict(epoch=1, iter=1), command=Touch(ran))
    torch.save(content, tmp_path / 'evil.pth')
    cache = tmp_path / 'cache/hub/checkpoints'
    cache.mkdir(parents=True)
    for name in ('evil.pth', 'resnet18-f37072fd.pth', 'resnet50_msra-5891d200.pth',
                 'vgg11_batch256_imagenet_20210208-4271cd6c.pth'):
        (cache / name).write_bytes((tmp_path / 'evil.pth').read_bytes())
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path / 'home'))
    return str(tmp_path / 'evil.pth')


def test_the_file_runs_its_command_without_the_guard(evil, ran):
    with data_only(trust_checkpoint=True):
        torch.load(evil, weights_only=False) if torch.__version__ >= '2' else torch.load(evil)
    assert ran.exists()


LOADERS = {
    'torch.load': lambda file: torch.load(file),
    'torch.load, options': lambda file: torch.load(file, 'cpu', weights_only=False),
    'torch.load of a buffer': lambda file: torch.load(io.BytesIO(Path(file).read_bytes())),
    'torch.load of an open file': lambda file: torch.load(io.FileIO(file), map_location='cpu'),
    'torch.serialization.load': lambda file: torch.serialization.load(file),
    'torch.jit.load': lambda file: torch.jit.load(file),
    'torch.hub': lambda file: torch.hub.load_state_dict_from_url('https://example.org/evil.pth'),
    'torch.utils.model_zoo': lambda file: torch.utils.model_zoo.load_url('https://example.org/evil.pth'),
    'CheckpointLoader': lambda file: CheckpointLoader.load_checkpoint(file),
    'https://': lambda file: CheckpointLoader.load_checkpoint('https://example.org/evil.pth'),
    'torchvision://': lambda file: CheckpointLoader.load_checkpoint('torchvision://resnet18'),
    'open-mmlab://': lambda file: CheckpointLoader.load_checkpoint('open-mmlab://detectron2/resnet50_caffe'),
    'mmcls://': lambda file: CheckpointLoader.load_checkpoint('mmcls://vgg11'),
    '_load_checkpoint': lambda file: _load_checkpoint(file),
    'load_checkpoint': lambda file: load_checkpoint(torch.nn.Linear(1, 1), file),
    'Pretrained': lambda file: BaseModule(dict(type='Pretrained', checkpoint=file)).init_weights(),
    'a prefix': lambda file: BaseModule(dict(type='Pretrained', checkpoint=file, prefix='backbone')).init_weights(),
}


@pytest.mark.parametrize('loader', LOADERS)
def test_every_loader_is_guarded(loader, evil, ran):
    before = torch.load, torch.serialization.load, torch.jit.load
    with data_only(), pytest.raises(ValueError, match='TorchScript' if 'jit' in loader else REFUSED):
        LOADERS[loader](evil)
    assert not ran.exists()
    assert before == (torch.load, torch.serialization.load, torch.jit.load)


def test_the_object_storage_of_mmengine_is_guarded(evil, ran, monkeypatch):
    """Petrel gives MMEngine the bytes, which it loads from a buffer."""
    class Storage:
        def get(self, path):
            return Path(evil).read_bytes()

    monkeypatch.setattr('mmengine.runner.checkpoint.get_file_backend', lambda *_, **__: Storage())
    with data_only(), pytest.raises(ValueError, match=REFUSED):
        CheckpointLoader.load_checkpoint('s3://bucket/evil.pth')
    assert not ran.exists()


def test_data_are_loaded_as_ever(tmp_path):
    content = dict(state_dict=dict(weight=torch.arange(3.)), meta=dict(epoch=2))
    torch.save(content, tmp_path / 'good.pth')
    module = torch.nn.Linear(3, 1, bias=False)
    with data_only():
        for source in (tmp_path / 'good.pth', str(tmp_path / 'good.pth'), (tmp_path / 'good.pth').open('rb'),
                       io.BytesIO((tmp_path / 'good.pth').read_bytes())):
            read = torch.load(source, map_location='cpu')
            assert read['meta'] == content['meta'] and torch.equal(read['state_dict']['weight'], torch.arange(3.))
        torch.save(dict(weight=torch.ones(1, 3)), tmp_path / 'good.pth')
        load_checkpoint(module, str(tmp_path / 'good.pth'), strict=True)
    assert module.weight.tolist() == [[1, 1, 1]]


def test_contexts_lie_within_each_other_and_in_every_thread(evil, ran):
    before, found = torch.load, []

    def other_thread():
        try:
            torch.load(evil)
        except ValueError as error:
            found.append(str(error))

    with data_only():
        with data_only(trust_checkpoint=True), pytest.raises(ValueError, match='refused'):
            torch.load(evil)  # what is around forbids it
        with pytest.raises(KeyError), data_only():
            raise KeyError
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert 'refused' in found[0] and not ran.exists() and torch.load is before


def test_nothing_is_downloaded_where_that_is_not_allowed(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    for address in ('https://example.org/none.pth', 'torchvision://resnet18'):
        with data_only(download=False), pytest.raises(ValueError, match='would have to be downloaded'):
            CheckpointLoader.load_checkpoint(address)
    with data_only(trust_checkpoint=True, download=False), pytest.raises(ValueError, match='downloaded'):
        torch.hub.load_state_dict_from_url('https://example.org/none.pth')


def pvt(**init):
    """A RetinaNet with a small PVT, which takes its weights from an ``init_cfg`` without ``type``."""
    model = retinanet(8)
    model['backbone'] = dict(type='mmdet.PyramidVisionTransformer', num_layers=[1] * 4, embed_dims=8, num_heads=[1] * 4,
                             **init)
    model['neck']['in_channels'] = [8] * 4
    return model


def swin(checkpoint):
    model = retinanet(8)
    model['backbone'] = dict(type='mmdet.SwinTransformer', embed_dims=8, depths=[1] * 4, num_heads=[1] * 4,
                             init_cfg=dict(checkpoint=checkpoint))
    return model


def with_backbone(model, **fields):
    return dict(model, backbone=dict(model['backbone'], **fields))


def teaching(file):
    """MMDetection's own distillation, which loads its teacher when it is built."""
    student = retinanet(8)
    return dict(student, type='mmdet.KnowledgeDistillationSingleStageDetector', teacher_ckpt=file,
                teacher_config=dict(model=retinanet(8)))


STUDENTS = {
    'PVT, no type': lambda file: pvt(init_cfg=dict(checkpoint=file)),
    'Swin, no type': swin,
    'ResNet, pretrained': lambda file: with_backbone(retinanet(8), pretrained=file),
    'ResNet, init_cfg': lambda file: with_backbone(retinanet(8), init_cfg=dict(type='Pretrained', checkpoint=file)),
    'DetectoRS': lambda file: with_backbone(
        retinanet(8), type='mmdet.DetectoRS_ResNet', depth=50, base_channels=8, pretrained=file,
        conv_cfg=dict(type='ConvAWS')),
    'the whole detector': lambda file: dict(
        retinanet(8), init_cfg=dict(type='Pretrained', checkpoint=file)),
    'a list': lambda file: with_backbone(retinanet(8), init_cfg=[
        dict(type='Kaiming', layer='Conv2d'), dict(type='Pretrained', checkpoint=file, prefix='backbone.')]),
    'ImageClassifier, pretrained': lambda file: classifier(8, pretrained=file),
    'its backbone': lambda file: with_backbone(classifier(8), init_cfg=dict(type='Pretrained', checkpoint=file)),
    "MMDetection's distillation": teaching,
}


def distillation(student, **fields):
    return dict(dict(type='mmkd_plugin.TeacherStudentDistill', architecture=student,
                     teacher=classifier(8) if 'head' in student else retinanet(8), allow_random_teacher=True,
                     distiller=dict(type='mmkd_plugin.AMDDistiller', layers=['backbone'])), **fields)


@pytest.mark.parametrize('name', [name for name in STUDENTS if 'distillation' not in name])
def test_a_student_names_the_field(name, evil, ran, build):
    """The distillation, by a Runner of anybody's, is guarded by itself."""
    model = distillation(STUDENTS[name](evil), distiller=dict(type='ConfigurableDistiller'))
    model = build(model, 'mmpretrain' if 'head' in model['architecture'] else 'mmdet')
    with pytest.raises(ValueError, match=r'architecture\.(backbone\.)?(init_cfg|pretrained)=.*' + REFUSED):
        model.init_weights()
    assert not ran.exists()


def test_a_model_that_loads_when_it_is_built(evil, ran, build, tmp_path):
    plain = tmp_path / 'plain.py'
    plain.write_text(f'default_scope = "mmdet"\nmodel = {teaching(evil)!r}\n')
    with pytest.raises(ValueError, match=REFUSED):
        build_cfg_path(str(plain), 'teacher')
    with pytest.raises(ValueError, match=REFUSED):
        build(distillation(teaching(evil)))
    with pytest.raises(ValueError, match=REFUSED):
        build(distillation(dict(cfg_path=str(plain))))
    assert not ran.exists()


@pytest.mark.parametrize('field', ['teacher_ckpt', 'student_ckpt'])
def test_checkpoints_of_the_distillation(field, evil, ran, build):
    with pytest.raises(ValueError, match=f'^{field}: .*{REFUSED}'):
        build(distillation(retinanet(8), **{field: evil}))
    assert not ran.exists()


def test_on_trust_the_student_is_initialised_by_whatever_is_in_its_file(evil, ran, build):
    model = build(distillation(STUDENTS['ResNet, init_cfg'](evil), trust_checkpoint=True,
                               distiller=dict(type='ConfigurableDistiller')))
    if torch.__version__ < '2.6':  # later ones want weights_only=False of MMEngine
        model.init_weights()
        assert ran.exists()


@pytest.mark.parametrize('path, why', [
    ('none.pth', 'none.pth can not be found'), ('torchvision://resnet51', 'resnet51')])
def test_a_weights_file_that_is_not_there_is_a_sentence(path, why, build):
    model = build(distillation(pvt(init_cfg=dict(checkpoint=path)), distiller=dict(type='ConfigurableDistiller')))
    with pytest.raises(ValueError, match=f"^architecture.backbone.init_cfg='{path}': cannot initialise .*{why}.*Name"):
        model.init_weights()


def test_the_files_that_a_model_names_are_found_and_forgotten(build):
    nested = dict(type='Normal', layer='Conv2d', override=dict(type='Pretrained', name='conv1', checkpoint='d.pth'))
    for model, found in (
            (pvt(init_cfg=dict(checkpoint='a.pth')), {'backbone.init_cfg': 'a.pth'}),
            (with_backbone(retinanet(8), pretrained='b.pth'), {'backbone.init_cfg': 'b.pth'}),
            (STUDENTS['the whole detector']('c.pth'), {'init_cfg': 'c.pth'}),
            (with_backbone(retinanet(8), init_cfg=nested), {'backbone.init_cfg': 'd.pth'}),
            (STUDENTS['DetectoRS']('e.pth'), {'backbone.pretrained': 'e.pth'}),
            (retinanet(8), {})):
        model = build(model)
        others = {name: module.init_cfg for name, module in model.named_modules() if getattr(module, 'init_cfg', None)
                  and f'{name}.init_cfg'.lstrip('.') not in found}
        assert weights_files(model) == found
        forget_weights_files(model)
        assert weights_files(model) == {} and all(
            model.get_submodule(name).init_cfg == value for name, value in others.items())
        model.init_weights()
    model = build(STUDENTS['a list']('f.pth'))
    forget_weights_files(model)
    assert model.backbone.init_cfg == [dict(type='Kaiming', layer='Conv2d')]


class FewImages(BaseDataset):
    METAINFO = dict(classes=tuple('abcd'))

    def load_data_list(self):
        return [dict(index=i) for i in range(4)]

    def __getitem__(self, index):
        batch = classification_batch(size=32)
        return dict(inputs=batch['inputs'][index], data_samples=batch['data_samples'][index])


def config(tmp_path, model, scope='mmpretrain', **fields):
    Visualizer._instance_dict.clear()
    loader = dict(batch_size=2, num_workers=0, dataset=dict(type='FewImages'), collate_fn=dict(type='default_collate'),
                  sampler=dict(type='DefaultSampler', shuffle=False))
    return Config(dict(dict(
        model=model, work_dir=str(tmp_path / 'work'), default_scope=scope, train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=1), optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        randomness=dict(seed=0), experiment_name=tmp_path.name), **fields))


class LoadingHook(Hook):
    """Reads a file in the run, as MMPretrain's SwAVHook does."""

    def __init__(self, path):
        self.path = path

    def before_train_epoch(self, runner):
        torch.load(self.path)


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs a tool in this process, so that its guard is the one that is tested."""
    monkeypatch.syspath_prepend('tools')

    def tool(name, *args):
        DefaultScope._instance_dict.clear()
        monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
        runpy.run_path(f'tools/{name}', run_name='__main__')
        return capsys.readouterr().out

    return tool


def run_of(tmp_path, evil, kind):
    file, plain = evil, dict(model=classifier(8))
    changes = {
        'init_cfg': dict(model=STUDENTS['its backbone'](file)),
        'init_cfg of the student': dict(model=distillation(STUDENTS['its backbone'](file))),
        'pretrained': dict(model=STUDENTS['ImageClassifier, pretrained'](file)),
        'load_from': dict(load_from=file),
        'load_from, distillation': dict(load_from=file, model=distillation(classifier(8))),
        'resume': dict(load_from=file, resume=True),
        'teacher_ckpt': dict(model=distillation(classifier(8), teacher_ckpt=file)),
        'student_ckpt': dict(model=distillation(classifier(8), student_ckpt=file)),
        'a hook': dict(custom_hooks=[dict(type='LoadingHook', path=file)]),
    }[kind]
    return config(tmp_path, **(plain | changes))


@pytest.fixture(autouse=True)
def forgotten():
    """The toys are unregistered after the test."""
    DATASETS.register_module(module=FewImages, force=True)
    HOOKS.register_module(module=LoadingHook, force=True)
    yield
    DATASETS.module_dict.pop('FewImages')
    HOOKS.module_dict.pop('LoadingHook')


RUNS = ['init_cfg', 'init_cfg of the student', 'pretrained', 'load_from', 'load_from, distillation', 'resume',
        'teacher_ckpt', 'student_ckpt', 'a hook']


@pytest.mark.parametrize('early', [True, False], ids=['looked through', 'met'])
@pytest.mark.parametrize('kind', RUNS)
def test_train_py(kind, early, tool, tmp_path, evil, ran, monkeypatch):
    """Files are looked through before the run; what would be overlooked is refused where it is met."""
    cfg, file = run_of(tmp_path, evil, kind), tmp_path / 'x.py'
    file.touch()
    monkeypatch.setattr(Config, 'fromfile', lambda *_, **__: cfg)
    if not early:
        monkeypatch.setattr('mmkd_plugin.config.preflight.missing_inputs', lambda *_, **__: [])
    with pytest.raises((ValueError, SystemExit), match=REFUSED):
        tool('train.py', file)
    assert not ran.exists()


def test_the_others(tool, tmp_path, evil, ran, monkeypatch):
    """test.py, export_student.py, visualize.py and compose_config.py."""
    plain = tmp_path / 'plain.py'
    model = with_backbone(retinanet(8), pretrained=evil)
    dataset = dict(type='CocoDataset', metainfo=dict(classes=tuple('abc')))
    plain.write_text(f'default_scope = "mmdet"\nmodel = {model!r}\ntrain_dataloader = dict(dataset={dataset!r})\n'
                     'train_cfg = dict(by_epoch=True, max_epochs=1)\n'
                     'optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1))\n')
    for name in ('test.py', 'export_student.py'):
        with pytest.raises((ValueError, SystemExit), match=REFUSED):
            tool(name, plain, evil, *([tmp_path / 'out.pth'] if 'export' in name else []))
    distil = tmp_path / 'distil.py'
    distil.write_text(f'default_scope = "mmdet"\nmodel = {distillation(model)!r}\n')
    with pytest.raises((ValueError, SystemExit), match=REFUSED):
        tool('visualize.py', distil, evil, 'x.png')
    loads = tmp_path / 'loads.py'
    loads.write_text(plain.read_text().replace(repr(model), repr(teaching(evil))))
    with suppress(SystemExit):  # the composer builds without weights, and has to say to this pair whatever it has
        tool('compose_config.py', plain, loads, '--method', 'amd', '--teacher-ckpt', 'https://example.org/x.pth', '-o',
             tmp_path / 'other.py')
    with pytest.raises((ValueError, SystemExit), match=REFUSED):
        tool('compose_config.py', plain, plain, '--method', 'amd', '--teacher-ckpt', evil, '-o', tmp_path / 'out.py')
    # The composed student starts from the file, which the trial of the composer does not read.
    tool('compose_config.py', plain, plain, '--method', 'amd', '--teacher-ckpt', 'https://example.org/x.pth', '-o',
         tmp_path / 'out.py')
    assert not ran.exists()
    cfg = Config.fromfile(tmp_path / 'out.py')
    assert cfg.model.architecture.backbone.pretrained == evil


def test_composing_downloads_nothing(tmp_path, monkeypatch, tool):
    """MMDetection's PVT names an address in an ``init_cfg`` without a type."""
    def refuse(*_, **__):
        raise AssertionError('a download')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    address, student, teacher, out = 'https://example.org/x.pth', *(tmp_path / f'{name}.py' for name in 'sto')
    dataset = dict(type='CocoDataset', metainfo=dict(classes=tuple('abc')))
    for file, model in ((student, pvt(init_cfg=dict(checkpoint=address))), (teacher, retinanet(8))):
        file.write_text(f'default_scope = "mmdet"\nmodel = {model!r}\ntrain_dataloader = dict(dataset={dataset!r})\n'
                        'train_cfg = dict(by_epoch=True, max_epochs=1)\n'
                        'optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1))\n')
    tool('compose_config.py', student, teacher, '--method', 'amd', '--teacher-ckpt', address, '-o', out)
    assert Config.fromfile(out).model.architecture.backbone.init_cfg.checkpoint == address


def test_a_plain_runner_with_our_algorithm(tmp_path, evil, ran):
    """Without our tools: what the algorithm reads when it is built and initialised."""
    runner = Runner.from_cfg(config(tmp_path, distillation(STUDENTS['its backbone'](evil))))
    with pytest.raises(ValueError, match=r'architecture\.backbone\.init_cfg=.*' + REFUSED):
        runner.train()
    assert not ran.exists()
