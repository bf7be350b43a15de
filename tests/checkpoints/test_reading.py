"""What a weights file may do when it is loaded: nothing; and what it may hold."""
import argparse
import functools
import http.server
import io
import json
import os
import pickle
import re
import runpy
import struct
import subprocess
import sys
import tarfile
import threading
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from conftest import classification_batch, classifier
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.hub import get_config
from mmengine.logging import HistoryBuffer
from mmengine.optim import OneCycleLR
from mmengine.runner import Runner
from mmengine.visualization import Visualizer

from mmkd_plugin.checkpoints.reading import load_completely, read_checkpoint, read_weights
from mmkd_plugin.checkpoints.unpickler import read_file
from mmkd_plugin.config.cfg_path import build_cfg_path
from mmkd_plugin.config.preflight import missing_inputs

WEIGHTS = {'weight': torch.arange(6.).view(2, 3)}


class Call:
    """Pickles as the call of ``function``, and a state."""

    def __init__(self, function, *args, state=None):
        self.made = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.made


def same(a, b):
    """Whether both are the same to the bit, types included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad) \
            and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a) and (
            getattr(a, '_metadata', None) == getattr(b, '_metadata', None))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, HistoryBuffer):
        return all(same(getattr(a, key), getattr(b, key)) for key in ('_log_history', '_count_history', 'max_length'))
    return a == b


def write(content, path, kind='zip'):
    torch.save(content, path, _use_new_zipfile_serialization=kind == 'zip')
    return str(path)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / 'ran'


def hostile(marker):
    """By name, an object whose loading writes ``marker``, or would change what is loaded next."""
    touch = f'touch {marker}'
    code = f'open({str(marker)!r}, "w")'
    history = dict(max_length=1, _log_history=np.zeros(1), _count_history=np.zeros(1))
    return {
        'os.system': Call(os.system, touch),
        'eval': Call(eval, code),
        'exec': Call(exec, code),
        'subprocess': Call(subprocess.check_call, ['touch', str(marker)]),
        'runpy': Call(runpy.run_path, str(marker)),
        'open': Call(open, str(marker), 'w'),
        'types.SimpleNamespace': types.SimpleNamespace(a=1),
        'partial': Call(functools.partial, eval, code),
        'torch.load': Call(torch.load, str(marker)),
        'torch.hub': Call(torch.hub.load, str(marker.parent), 'x', 'local'),
        'torch.jit': Call(torch.jit.load, str(marker)),
        'numpy.load': Call(np.load, str(marker)),
        'mmengine config': Call(Config.fromstring, code, '.py'),
        'getattr of a class': Call(getattr, HistoryBuffer, 'update'),
        'getattr of a dunder': Call(getattr, HistoryBuffer, '__init__'),
        'a defaultdict that calls': Call(defaultdict, eval),
        'a history that calls': Call(HistoryBuffer, state=dict(history, statistics_methods=dict(mean=eval))),
        'a history with another attribute': Call(HistoryBuffer, state=dict(history, mean='x')),
        'a history with slots': Call(HistoryBuffer, state=(history, dict(mean='x'))),
        'an OrderedDict with another attribute': Call(OrderedDict, state=dict(items='x')),
        'objects in an array': np.array([Call(os.system, touch)], dtype=object),
        'objects in a dtype': np.dtype([('a', 'O')]),
        'a scalar of objects': Call(np.core.multiarray.scalar, np.dtype('O'), b'x'),
        'hooks of a tensor': Call(torch._utils._rebuild_tensor_v2, torch.zeros(1).storage(), 0, (1, ), (1, ), True,
                                  OrderedDict(x=1)),
        'a tensor beyond its data': Call(torch._utils._rebuild_tensor_v2, torch.zeros(1).storage(), 0, (99, ), (1, ),
                                         False, OrderedDict()),
        'a tensor before its data': Call(torch._utils._rebuild_tensor_v2, torch.zeros(9).storage(), 8, (9, ), (-1, ),
                                         False, OrderedDict()),
        'a module': torch.nn.Conv2d(1, 1, 1),
        'a class': torch.nn.Conv2d,
        'argparse': argparse.Namespace(a=1),
    }


@pytest.mark.parametrize('kind', ['zip', 'legacy'])
@pytest.mark.parametrize('place', ['top', 'meta', 'key of the state dict'])
def test_a_hostile_file_is_refused_and_nothing_runs(tmp_path, marker, kind, place):
    for name, bad in hostile(marker).items():
        content = {'top': [bad, WEIGHTS], 'meta': dict(meta=dict(epoch=1, info=[{'x': bad}]), state_dict=WEIGHTS),
                   'key of the state dict': dict(state_dict=OrderedDict(WEIGHTS, extra=bad))}[place]
        file = write(content, tmp_path / 'bad.pth', kind)
        with pytest.raises(ValueError, match='(?s)^teacher_ckpt: .*bad.pth.*refused because of') as error:
            read_weights(file, 'teacher_ckpt')
        assert 'trust_checkpoint=True' in str(error.value), name
        assert not marker.exists(), name


def test_the_files_would_have_run(tmp_path, marker):
    file = write(dict(state_dict=WEIGHTS, x=hostile(marker)['os.system']), tmp_path / 'bad.pth')
    with pytest.raises(ValueError, match=r'(posix|nt)\.system'):
        read_weights(file, 'teacher_ckpt')
    assert not marker.exists()
    assert same(read_weights(file, 'teacher_ckpt', trust_checkpoint=True), WEIGHTS)
    assert marker.exists()


def stream(code, kind='zip'):
    """Returns a file of torch.save whose pickle is ``code``, operation by operation."""
    out = io.BytesIO()
    if kind == 'zip':
        with zipfile.ZipFile(out, 'w') as archive:
            archive.writestr('archive/data.pkl', code)
    else:
        for part in (0x1950a86a20f9469cfc6c, 1001, dict(little_endian=sys.byteorder == 'little')):
            out.write(pickle.dumps(part, 2))
        out.write(code + pickle.dumps([], 2))
    return out.getvalue()


def text(value):
    return b'X' + struct.pack('<I', len(value)) + value.encode()


@pytest.mark.parametrize('kind', ['zip', 'legacy'])
def test_no_operation_of_pickle_calls_anything(tmp_path, marker, kind):
    command, setting = text(f'touch {marker}'), text('mean') + text('x')
    history = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
    source = b'(' + text('module') + history + text(str(marker)) + text('source') + b'tQ'
    codes = {
        'GLOBAL REDUCE': b'cos\nsystem\n' + command + b'\x85R.',
        'STACK_GLOBAL': text('os') + text('system') + b'\x93' + command + b'\x85R.',
        'STACK_GLOBAL of an attribute': text('mmengine.logging.history_buffer')
        + text('HistoryBuffer.update.__globals__') + b'\x93.',
        'INST': b'(' + command + b'ios\nsystem\n.',
        'OBJ': b'(cos\nsystem\n' + command + b'o.',
        'INST of what is allowed': b'(icollections\nOrderedDict\n.',
        'EXT1': b'\x82\x01' + command + b'\x85R.',
        'NEWOBJ_EX': history + b')}\x92.',
        'a call of data': text('os.system') + command + b'\x85R.',
        'a call of what was called': b'ccollections\nOrderedDict\n)R' + command + b'\x85R.',
        'a call of a name that is only a name': b'cnumpy\nndarray\n' + command + b'\x85R.',
        'attributes of a class': history + b'N}' + setting + b's\x86b.',
        'attributes of a made object': history + b')\x81N}' + setting + b's\x86b.',
        'source code of a module': source + b'.',
        'a persistent object as text': b'Pmodule\n.',
        'an unknown persistent object': b'(' + text('module') + text('x') + b'tQ.',
        'out of band': b'\x97.',
    }
    before = dict(vars(HistoryBuffer))
    for name, code in codes.items():
        path = tmp_path / 'bad.pth'
        path.write_bytes(stream(b'\x80\x02' + code, kind))
        with pytest.raises(ValueError, match='^student_ckpt: '):
            read_checkpoint(str(path), 'student_ckpt')
        assert not marker.exists() and not list(tmp_path.glob('*.patch')), name
        assert dict(vars(HistoryBuffer)) == before, name


def test_torchscript_and_tar_are_refused(tmp_path):
    script = tmp_path / 'script.pth'
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(script))
    hidden = tmp_path / 'hidden.pth'  # torch.load would give it to torch.jit.load
    torch.save(WEIGHTS, hidden)
    with zipfile.ZipFile(hidden, 'a') as archive:
        archive.writestr('archive/constants.pkl', b'')
    for file in (script, hidden):
        with pytest.raises(ValueError, match='teacher_ckpt: .*TorchScript archive.*trust_checkpoint=True'):
            read_weights(str(file), 'teacher_ckpt')
    tar = tmp_path / 'old.pth'
    with tarfile.open(tar, 'w') as archive:
        for name in ('storages', 'tensors', 'pickle'):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ValueError, match='teacher_ckpt: .*tar file.*trust_checkpoint=True'):
        read_weights(str(tar), 'teacher_ckpt')


@pytest.mark.parametrize('kind', ['zip', 'legacy'])
def test_a_torn_file_is_said(tmp_path, kind):
    path = tmp_path / 'torn.pth'
    write(dict(state_dict={'weight': torch.randn(100)}), path, kind)
    whole = path.read_bytes()
    for length in (0, 2, 300, len(whole) // 2, len(whole) - 50):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match='^teacher_ckpt: cannot load .*torn.pth'):
            read_weights(str(path), 'teacher_ckpt')
    if kind == 'zip':
        at = whole.index(torch.load(io.BytesIO(whole))['state_dict']['weight'].numpy().tobytes())
        path.write_bytes(whole[:at] + b'flip' + whole[at + 4:])
        with pytest.raises(ValueError, match='CRC'):
            read_weights(str(path), 'teacher_ckpt')


def honest():
    """By name, what files hold that people have."""
    base = torch.arange(24.)
    history = HistoryBuffer([1.5, 2.5], [1, 2])
    tensors = {str(dtype): torch.arange(3).to(dtype) for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.complex64, torch.complex128)}
    state = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2)).state_dict()
    return {
        'tensors': dict(tensors, scalar=torch.tensor(1.5), empty=torch.zeros(0, 3),
                        grad=torch.ones(2).requires_grad_()),
        'views': [base, base[4:10], base.view(4, 6).t(), base.view(4, 6)[:, ::2], base[:1].expand(5)],
        'parameters': dict(a=torch.nn.Parameter(base), b=torch.nn.Parameter(base, requires_grad=False)),
        'with versions': state,
        'histories': OrderedDict(loss=history, empty=HistoryBuffer()),
        'numpy': dict(f=np.float64(1.5), i=np.int64(2), b=np.bool_(True), h=np.float16(3), t=np.str_('abc'),
                      grid=np.asfortranarray(np.arange(6.).reshape(2, 3)),
                      none=np.zeros((0, 2)), point=np.array(1.5), names=np.array(['a', 'bcd']),
                      d=np.dtype('float32'), complex=np.complex64(1 + 2j),
                      **{'other byte order': np.arange(3, dtype='>i4')}),
        'containers': dict(a=OrderedDict([(1, 2)]), b=defaultdict(list, x=[1]), c=Counter({3: 1}), d={1, 2},
                           e=frozenset([3]), f=(1, (2.5, None, True, 'ä', b'\xff', b'', 10**30, -1)), g=1 + 2j),
        'torch': dict(size=torch.Size([1, 2]), dtype=torch.bfloat16, device=torch.device('cpu'),
                      cuda=torch.device('cuda', 1), shape=base.shape),
        'mmengine': dict(dataset_meta=ConfigDict(classes=('a', 'b'), palette=[(1, 2, 3)], inner=ConfigDict(x=1))),
        'old meta': dict(CLASSES=('a', 'b'), PALETTE=None, env_info='Linux', config='model = dict()', seed=0, epoch=12,
                         hook_msgs=dict(best_score=np.float64(0.5)), time='Mon'),
    }


@pytest.mark.parametrize('kind', ['zip', 'legacy'])
@pytest.mark.parametrize('protocol', [2, 4])
def test_what_files_hold_comes_back_to_the_bit(tmp_path, kind, protocol):
    for name, content in honest().items():
        torch.save(content, tmp_path / 'good.pth', pickle_protocol=protocol,
                   _use_new_zipfile_serialization=kind == 'zip')
        read = read_file(str(tmp_path / 'good.pth'))
        assert same(read, torch.load(tmp_path / 'good.pth', map_location='cpu', weights_only=False)), name
        if name == 'numpy':
            del read['other byte order'], content['other byte order']  # NumPy itself reads it into this machine's
        assert same(read, content), name


def test_what_is_shared_in_a_file_is_shared_after_it(tmp_path):
    base = torch.arange(4.)
    a, b, c = read_file(write([base, base[1:], base], tmp_path / 'a.pth'))
    a[1] = 9
    assert b[0] == 9 and a is c


class Few(BaseDataset):
    METAINFO = dict(classes=('a', 'b', 'c', 'd'))

    def load_data_list(self):
        return [dict(index=i) for i in range(4)]

    def __getitem__(self, index):
        batch = classification_batch(size=32)
        return dict(inputs=batch['inputs'][index], data_samples=batch['data_samples'][index])


def test_a_checkpoint_of_a_run_comes_back_to_the_bit(tmp_path, build):
    """Everything MMEngine writes: histories, EMA, two optimisers, schedulers, the best score."""
    Visualizer._instance_dict.clear()
    loader = dict(batch_size=2, num_workers=0, dataset=Few(), collate_fn=dict(type='default_collate'))
    model = dict(
        type='mmkd_plugin.TeacherStudentDistill', architecture=classifier(8), teacher=classifier(8),
        allow_random_teacher=True, distiller=dict(type='mmkd_plugin.SoKDDistiller', layers=['backbone.layer3'],
                                                  dafa=dict(), dam=dict(anchor='attention'), base='fitnet'))
    runner = Runner(
        model=model, work_dir=str(tmp_path), default_scope='mmpretrain',
        train_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=True)),
        val_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=False)), val_cfg=dict(),
        val_evaluator=dict(type='Accuracy'), train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3),
                           constructor='mmkd_plugin.PolicyOptimWrapperConstructor', policy=dict(type='Adam', lr=0.01)),
        param_scheduler=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=2),
                         dict(type='MultiStepLR', milestones=[1], by_epoch=True), dict(type='CosineAnnealingLR')],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, save_best='auto')),
        custom_hooks=[dict(type='EMAHook'), dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=1)],
        randomness=dict(seed=0), experiment_name=tmp_path.name)
    runner.train()
    file = str(tmp_path / 'epoch_2.pth')
    expected = torch.load(file, map_location='cpu', weights_only=False)
    content = read_file(file)
    assert {'ema_state_dict', 'optimizer', 'param_schedulers', 'message_hub'} < set(content)
    assert content['message_hub']['log_scalars']['train/loss'].mean() > 0
    assert same(content, expected)
    student = build(classifier(8), scope='mmpretrain')
    load_completely(student, file, 'student_ckpt')
    for key, value in student.state_dict().items():
        assert torch.equal(value, expected['state_dict'][f'architecture.{key}']), key


@pytest.fixture
def exotic(tmp_path, build):
    """A file that fits the classifier, but holds an object of another library."""
    weights = build(classifier(8), scope='mmpretrain', seed=5).state_dict()
    return write(dict(state_dict=weights, args=argparse.Namespace(lr=0.1)), tmp_path / 'exotic.pth'), weights


def distil(**fields):
    distiller = dict(type='mmkd_plugin.AMDDistiller', layers=['backbone.layer3'])
    return dict(type='mmkd_plugin.TeacherStudentDistill', architecture=classifier(8), teacher=classifier(8),
                allow_random_teacher=True, distiller=distiller, **fields)


@pytest.mark.parametrize('field', ['teacher_ckpt', 'student_ckpt'])
def test_a_model_loads_the_exotic_file_on_trust_only(build, exotic, field):
    file, weights = exotic
    with pytest.raises(ValueError, match=f'{field}: .*refused because of argparse.Namespace.*trust_checkpoint=True'):
        build(distil(**{field: file}), scope='mmpretrain')
    model = build(distil(**{field: file}, trust_checkpoint=True), scope='mmpretrain')
    assert same(dict((model.teacher if 'teacher' in field else model.student).state_dict()), dict(weights))


def test_what_mmengine_loads_itself_is_read_here_first(exotic, tmp_path):
    file, _ = exotic

    def refused(trust=False, **fields):
        cfg = Config(dict(default_scope='mmpretrain', model=classifier(8), **fields))
        return missing_inputs(cfg, trust_checkpoint=trust)
    init = dict(type='Pretrained', checkpoint=file)
    for fields in (dict(load_from=file), dict(load_from=file, resume=True),
                   dict(model=dict(classifier(8), backbone=dict(init_cfg=init)))):
        cfg = Config(dict(dict(default_scope='mmpretrain', model=classifier(8)), **fields))
        sentence, = missing_inputs(cfg)
        assert 'refused because of argparse.Namespace' in sentence and '--trust-checkpoint' in sentence
        assert missing_inputs(cfg, trust_checkpoint=True) == []
        cfg.model.trust_checkpoint = True
        assert missing_inputs(cfg) == []
    assert refused(load_from=write(dict(meta=dict(config='import os'), state_dict=WEIGHTS), tmp_path / 'old.pth')) == []


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An address of files in ``tmp_path / 'site'``, and an empty cache."""
    (tmp_path / 'site').mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '*')

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / 'site'))

        def log_message(self, *args):
            pass

    served = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{served.server_address[1]}'
    served.shutdown()
    served.server_close()


def test_what_is_at_an_address_is_downloaded_once_and_read_the_same(server, tmp_path, marker):
    site, cache = tmp_path / 'site', tmp_path / 'cache/hub/checkpoints'
    write(WEIGHTS, site / 'good.pth')
    assert same(read_weights(f'{server}/good.pth', 'teacher_ckpt'), WEIGHTS)
    (site / 'good.pth').unlink()
    assert same(read_weights(f'{server}/good.pth?x=1', 'teacher_ckpt'), WEIGHTS)  # from the cache
    write([WEIGHTS, hostile(marker)['os.system']], site / 'bad.pth')
    for _ in range(2):
        with pytest.raises(ValueError, match='teacher_ckpt: .*/bad.pth.*refused because of .*system'):
            read_weights(f'{server}/bad.pth', 'teacher_ckpt')
    assert not marker.exists() and {path.name for path in cache.glob('*.pth')} == {'good.pth', 'bad.pth'}
    with pytest.raises(ValueError, match='teacher_ckpt: cannot load .*404'):
        read_weights(f'{server}/none.pth', 'teacher_ckpt')
    (site / 'other').mkdir()
    others = {key: value + 1 for key, value in WEIGHTS.items()}
    write(others, site / 'other/good.pth')
    assert same(read_weights(f'{server}/other/good.pth', 'teacher_ckpt'), others)
    assert same(read_weights(f'{server}/good.pth', 'teacher_ckpt'), WEIGHTS)
    for content in ((cache / 'good.pth').read_bytes()[:50], b'<html>'):  # an interrupted copy, an error page
        (cache / 'good.pth').write_bytes(content)
        cfg = Config(dict(model=dict(architecture=dict(type='X'), teacher_ckpt=f'{server}/good.pth')))
        sentence, = missing_inputs(cfg)
        assert re.match('model.teacher_ckpt: cannot load .*Delete its copy .*/good.pth, and try again', sentence)


def test_names_of_zoos_become_addresses(server, tmp_path, monkeypatch):
    home = tmp_path / 'home'
    home.mkdir()
    monkeypatch.setenv('MMENGINE_HOME', str(home))
    (home / 'open_mmlab.json').write_text(f'{{"mine": "{server}/good.pth", "local": "here.pth"}}')
    write(WEIGHTS, tmp_path / 'site/good.pth')
    write({'weight': torch.ones(1)}, home / 'here.pth')
    assert same(read_weights('open-mmlab://mine', 'teacher_ckpt'), WEIGHTS)
    assert same(read_weights('openmmlab://local', 'teacher_ckpt'), {'weight': torch.ones(1)})
    with pytest.raises(ValueError, match="teacher_ckpt: .*no model 'resnet51'.*resnet50"):
        read_weights('torchvision://resnet51', 'teacher_ckpt')
    with pytest.raises(ValueError, match='teacher_ckpt: .*s3://.*trust_checkpoint=True'):
        read_weights('s3://bucket/x.pth', 'teacher_ckpt')


def test_official_weights_of_a_library_are_read_as_data(server, tmp_path, monkeypatch, marker):
    """``pretrained=True`` takes the address in the library's metafile."""
    from mmkd_plugin.config import cfg_path as module
    name = 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'
    monkeypatch.setattr(module, 'get_config', lambda path, pretrained=False: (
        Config(dict(model_path=f'{server}/r18.pth')) if pretrained else get_config(path)))
    write([WEIGHTS, hostile(marker)['os.system']], tmp_path / 'site/r18.pth')
    with pytest.raises(ValueError, match='teacher.pretrained: .*refused because of .*system'):
        build_cfg_path(name, 'teacher', pretrained=True)
    assert not marker.exists()


def test_no_function_of_python_is_within_reach():
    """The names a file may use are made by functions of ours, or by none."""
    from mmkd_plugin.checkpoints import unpickler
    for maker in unpickler._MAKERS.values():
        assert maker.__module__ == 'mmkd_plugin.checkpoints.unpickler' and isinstance(maker, types.FunctionType)
    assert not any(callable(value) for value in unpickler._DTYPES.values())
    assert not callable(unpickler.Name('x')) and not hasattr(unpickler.Name('x'), '__dict__')


def test_a_one_cycle_schedule_is_read(tmp_path):
    """Its state holds a function, which is not called but named."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    state = OneCycleLR(optimizer, eta_max=0.1, total_steps=10).state_dict()
    torch.save(dict(param_schedulers=[state]), tmp_path / 'a.pth')
    read = read_checkpoint(str(tmp_path / 'a.pth'), 'file')['param_schedulers'][0]
    assert read['_schedule_phases'] == state['_schedule_phases'] and not callable(read['anneal_func'])


def safetensors(tensors, **changes):
    """A file of the format, written by hand after its documentation."""
    header, data = dict(__metadata__=dict(format='pt')), b''
    names = {torch.float32: 'F32', torch.bfloat16: 'BF16', torch.int64: 'I64', torch.bool: 'BOOL'}
    for name, tensor in tensors.items():
        part = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[len(data), len(data) + len(part)])
        data += part
    for name, change in changes.items():
        header[name].update(change)
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data


def test_safetensors_are_read(tmp_path, build):
    tensors = dict(a=torch.arange(6.).view(2, 3), b=torch.tensor([1.5, -2]).bfloat16(), c=torch.tensor(7),
                   d=torch.tensor([True, False]), e=torch.zeros(0, 3))
    (tmp_path / 'a.safetensors').write_bytes(safetensors(tensors))
    assert same(read_weights(str(tmp_path / 'a.safetensors'), 'teacher_ckpt'), tensors)
    model = build(classifier(8), 'mmpretrain')
    file = tmp_path / 'whole.safetensors'
    file.write_bytes(safetensors(model.state_dict()))
    other = build(classifier(8), 'mmpretrain', seed=1)
    load_completely(other, str(file), 'teacher_ckpt')
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    for change, why in ((dict(shape=[2, 4]), 'do not fit F32 of shape'), (dict(dtype='F4'), 'dtype F4'),
                        (dict(data_offsets=[-24, 0]), 'whole numbers'), (dict(data_offsets=[99, 123]), 'beyond')):
        file.write_bytes(safetensors(tensors, a=change))
        with pytest.raises(ValueError, match=f'^teacher_ckpt: cannot load .*whole.safetensors.*{why}'):
            read_weights(str(file), 'teacher_ckpt')
