"""What is installed has the configs and tools where OpenMMLab looks; what is said about the configs is true."""
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mmengine.config import Config
from mmengine.hub import get_config
from modelindex.load_model_index import load as load_model_index

import mmkd_plugin
from mmkd_plugin.config.cfg_path import read_cfg_path
from mmkd_plugin.config.teachers import teachers_in

ROOT = Path(__file__).parent.parent
MODELS = {model['Name']: model for method in ('amd', 'sokd') for model in yaml.safe_load(
    (ROOT / f'configs/{method}/metafile.yml').read_text())['Models']}
DISTILLED = {name: model['Metadata'] for name, model in MODELS.items()}

# In another folder, with the installed copy before the repository on the path.
INSTALLED = '''
import functools
import runpy
import sys
from pathlib import Path

import mmengine.config.config
import mmengine.config.utils
from mmengine.config import Config

import mmkd_plugin
from mmkd_plugin.config.cfg_path import read_cfg_path

mim = Path(sys.argv[1]) / 'mmkd_plugin/.mim'
assert Path(mmkd_plugin.__file__).parent == mim.parent, mmkd_plugin.__file__
mmengine.config.utils.load = functools.cache(mmengine.config.utils.load)  # the libraries' metafiles: half a second
mmengine.config.config.is_installed = functools.cache(mmengine.config.config.is_installed)

models = [Config.fromfile(file).model for file in (mim / 'configs').glob('*.py')]
models += [Config.fromfile(file).model for file in (mim / 'configs/benchmarks/digits').glob('*.py')]
teachers = {model.teacher.cfg_path for model in models if 'teacher' in model}
assert {'::' in path for path in teachers} == {True, False}
for path in teachers:
    read_cfg_path(path)

Path('mine.py').write_text("""
_base_ = [__import__('mmkd_plugin').__path__[0] + '/.mim/configs/amd_retinanet_coco.py']
model = dict(distiller=dict(amd=dict(loss_weight=2.0)))
""")
distiller = Config.fromfile('mine.py').model.distiller
assert distiller.type == 'mmkd_plugin.AMDDistiller'
assert distiller.amd == dict(scale_free=True, local_grid=2, loss_weight=2.0)

sys.argv = ['train.py', '--help']
runpy.run_path(str(mim / 'tools/train.py'), run_name='__main__')
'''


# What MMEngine reads anew for each config takes half a second: all metafiles of a library, and what is installed.
READ_ONCE = {f'{module}.{name}': functools.cache(getattr(importlib.import_module(module), name))
             for module, name in (('mmengine.config.utils', 'load'), ('mmengine.config.config', 'is_installed'),
                                  ('mmengine.utils.package_utils', 'is_installed'))}


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    for name, function in READ_ONCE.items():
        monkeypatch.setattr(name, function)


@pytest.fixture
def generator(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools/dev')
    return importlib.import_module('make_model_index')


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """The package as ``pip install .`` installs it, made from a copy, because a build leaves files behind."""
    source, site = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('site')
    for name in ('mmkd_plugin', 'configs', 'tools', 'setup.py', 'pyproject.toml', 'README.md', 'model-index.yml'):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', '--no-deps',
                    '--no-build-isolation', '--no-compile', '--target', site, source], check=True)
    return site


def files(root):
    return {path.relative_to(root).as_posix() for path in root.rglob('*')
            if path.is_file() and '__pycache__' not in path.parts}


def test_an_installed_package_has_the_files_themselves(site):
    mim = site / 'mmkd_plugin/.mim'
    for folder in ('configs', 'tools'):
        assert files(mim / folder) == files(ROOT / folder)
        for name in files(mim / folder):
            assert (mim / folder / name).read_bytes() == (ROOT / folder / name).read_bytes()
    assert os.access(mim / 'tools/dist_train.sh', os.X_OK)
    assert not any(path.is_symlink() or path.suffix == '.pyc' for path in mim.rglob('*'))


def test_openmmlabs_tools_find_every_config_in_an_installed_package(site):
    """As openmim does: the index names the file, ``mim train`` finds it by its name alone."""
    mim = site / 'mmkd_plugin/.mim'
    index = load_model_index(str(mim / 'model-index.yml'))
    index.build_models_with_collections()
    assert {model.name for model in index.models} == set(MODELS)
    names = [path.name for path in mim.parent.rglob('*')]
    for model in index.models:
        assert (mim / model.config).is_file() and names.count(Path(model.config).name) == 1


def test_an_installed_package_works_without_the_repository(site, tmp_path):
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', INSTALLED, str(site)], cwd=tmp_path, text=True,
                          capture_output=True, env=dict(os.environ, PYTHONPATH=str(site)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'train config file' in done.stdout


def test_an_editable_installation_has_the_repositorys_files():
    mim = Path(mmkd_plugin.__file__).parent / '.mim'
    for name in ('configs', 'tools', 'model-index.yml'):
        assert (mim / name).samefile(ROOT / name)


def test_metafile_and_tables_say_what_the_configs_say(generator):
    for path, text in generator.pages().items():
        assert (ROOT / path).read_text() == text, f'{path} is old: run `python tools/dev/make_model_index.py`'


def test_the_index_is_well_formed():
    index = load_model_index(str(ROOT / 'model-index.yml'))
    assert not index.check(silent=True)


def test_every_config_has_an_entry_and_each_name_is_true():
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'configs').rglob('*.py')
             if path.parts[-2] in ('coco', 'imagenet') or {'amd', 'sokd'} & {*path.parts, path.stem.split('_')[0]}}
    found = {path for path in found if '/_base_/' not in path and '/benchmarks/' not in path}
    assert {model['Config'] for model in MODELS.values()} == found
    for name, model in MODELS.items():
        assert Path(model['Config']).stem == name
        data = model['Metadata']['Training Data'].lower().replace('-', '')
        assert name.rpartition('_')[2].replace('in1k', 'imagenet1k') in (data, data.removesuffix('1k'))
        assert model['In Collection'].lower() == re.match('amd|sokd', name)[0]


@pytest.mark.parametrize('name', DISTILLED)
def test_teacher_and_student_are_those_of_the_config(name):
    metadata = DISTILLED[name]
    student, teachers = metadata['Student'], metadata.get('Teachers') or [metadata['Teacher']]
    cfg = Config.fromfile(ROOT / MODELS[name]['Config'], format_python_code=False)
    found = [(config.cfg_path, weights) for _, config, weights in teachers_in(cfg.model)]
    for teacher, (cfg_path, teacher_ckpt) in zip(teachers, found, strict=True):
        if '::' in teacher['Config']:
            official = get_config(teacher['Config'], pretrained=True).model_path
            assert teacher_ckpt == teacher['Weights']
            assert Path(teacher['Weights']).name == Path(official).name  # forks of the libraries have it elsewhere
        else:
            assert Path(cfg_path).samefile(ROOT / teacher['Config'])
            epochs = Config.fromfile(ROOT / teacher['Config']).train_cfg.max_epochs
            last = f'work_dirs/{Path(teacher["Config"]).stem}/epoch_{epochs}.pth'
            assert teacher_ckpt == last and 'Weights' not in teacher
    alone = read_cfg_path(student['Config'] if '::' in student['Config'] else str(ROOT / student['Config'])).model
    for part in ('backbone', 'neck'):
        assert _bare(alone.get(part)) == _bare(cfg.model.architecture.get(part))


@pytest.mark.parametrize('folder', ['bccd', 'cifar10', 'digits'])
def test_teachers_of_the_benchmarks_have_the_last_checkpoint_of_their_training(folder):
    found = []
    for path in sorted((ROOT / 'configs/benchmarks' / folder).glob('*.py')):
        for _, config, weights in teachers_in(Config.fromfile(path, format_python_code=False).model):
            epochs = Config.fromfile(config.cfg_path, format_python_code=False).train_cfg.max_epochs
            found.append((path.name, '/'.join(Path(weights).parts[-2:])))
            assert found[-1] == (path.name, f'{Path(config.cfg_path).stem}/epoch_{epochs}.pth')
    assert found


def _bare(part):
    return {key: value for key, value in (part or {}).items() if key not in ('_scope_', 'init_cfg')}


def test_results_of_the_papers_are_not_ours(generator):
    for name, results in generator.PAPER_RESULTS.items():
        assert MODELS[name]['Metadata'][generator.NOT_MEASURED] == results
        assert 'Results' not in MODELS[name]
        lines = (ROOT / 'configs/sokd/README.md').read_text().splitlines()
        row = next(line for line in lines if f'/{name}.py`' in line)
        assert generator.NOT_MEASURED in row and all(str(value) in row for value in results.values())


def test_what_cannot_be_said_is_an_error(generator, monkeypatch, tmp_path):
    file = tmp_path / 'amd_x_moon.py'
    file.write_text('model = dict(type="A")\ntrain_cfg = dict(max_epochs=1)\n'
                    'train_dataloader = dict(dataset=dict(type="R", dataset=dict(data_root="data/moon/")))\n')
    with pytest.raises(ValueError, match="amd_x_moon.py: expected .*data_root.*coco.* got 'moon'"):
        generator.data(Config.fromfile(file), file)
    with pytest.raises(ValueError, match='amd_x_moon.py: expected a comment'):
        generator.first_sentence(file)
    with pytest.raises(ValueError, match='amd_x_moon.py: none of its bases has a student'):
        generator.student(file)
