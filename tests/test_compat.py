"""Each case in a process of its own: what is imported cannot be unimported."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Makes a top-level package unimportable, as on a machine that lacks it.
WITHOUT = '''
import sys
class Absent:
    def find_spec(self, name, *_):
        if name == {name!r} or name.startswith({name!r} + '.'):
            raise ModuleNotFoundError(f'No module named {{name!r}}')
sys.meta_path.insert(0, Absent())
'''


def python(code, **env):
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], text=True, capture_output=True,
                          env=dict(os.environ, **env))
    return done.returncode, done.stdout + done.stderr


def test_mmrazor_fails_without_us_and_works_with_us():
    code, output = python('import mmrazor.models')
    assert code != 0 and ('torch>=1.13' in output or 'Please install mmcv' in output)  # the newer stack's mmcv
    code, output = python('''
import mmkd_plugin
import mmrazor.models
from mmrazor.registry import MODELS
names = set(MODELS.module_dict)
assert {'ATLoss', 'ChannelWiseDivergence', 'PKDLoss', 'MGDLoss', 'FBKDLoss', 'KLDivergence', 'L2Loss', 'CRDLoss',
        'DKDLoss', 'SingleTeacherDistill', 'FpnTeacherDistill', 'ConfigurableDistiller', 'ConvModuleConnector',
        'MGDConnector'} <= names, names
''')
    assert code == 0, output


def test_mmrazors_losses_distillers_connectors_and_recorders_build():
    code, output = python('''
import mmkd_plugin
from mmengine.registry import init_default_scope
init_default_scope('mmrazor')
from mmrazor.registry import MODELS, TASK_UTILS
for kind, options in dict(
        ABLoss={}, ActivationLoss={}, ATLoss={}, ChannelWiseDivergence={}, CRDLoss=dict(
        neg_num=4, sample_n=8, dim_out=4), CrossEntropyLoss={}, DISTLoss={}, DKDLoss={}, FBKDLoss={}, FTLoss={},
        InformationEntropyLoss={}, KDSoftCELoss={}, KLDivergence={}, L1Loss={}, L2Loss={}, MGDLoss={}, OFDLoss={},
        OnehotLikeLoss={}, PKDLoss={}, AngleWiseRKD={}, DistanceWiseRKD={}, WSLD=dict(num_classes=4)).items():
    MODELS.build(dict(type=kind, **options))
for kind, options in dict(
        ConvModuleConnector=dict(in_channel=4, out_channel=4), Translator=dict(in_channel=4, out_channel=4),
        Paraphraser=dict(in_channel=4, out_channel=4), BYOTConnector=dict(in_channel=64, out_channel=64,
        num_classes=4), FBKDStudentConnector=dict(in_channels=8), FBKDTeacherConnector=dict(in_channels=8),
        CRDConnector=dict(dim_in=4, dim_out=4), MGDConnector=dict(student_channels=4, teacher_channels=4),
        NormConnector=dict(in_channels=4, norm_cfg=dict(type='BN')), TorchNNConnector=dict(
        module_name='AvgPool2d', module_args=dict(kernel_size=2)),
        TorchFunctionalConnector=dict(function_name='relu')).items():
    MODELS.build(dict(type=kind, **options))
MODELS.build(dict(type='ConfigurableDistiller'))
for kind in ('ModuleOutputs', 'ModuleInputs', 'Parameter'):
    TASK_UTILS.build(dict(type=kind + 'Recorder', source='a'))
for kind, source in dict(FunctionOutputs='mmrazor.utils.register_all_modules',
                         MethodOutputs='mmrazor.models.losses.ATLoss.forward').items():
    TASK_UTILS.build(dict(type=kind + 'Recorder', source=source))
''')
    assert code == 0, output


def test_a_quantiser_says_why_it_is_not_there():
    code, output = python('''
import mmkd_plugin
from mmrazor.registry import MODELS
MODELS.build(dict(type='mmrazor.AcademicQuantizer', qconfig_mapping=dict(_global_=dict())))
''')
    assert code != 0 and 'quantisation of mmrazor cannot be used with torch' in output.splitlines()[-1]


def test_a_working_mmrazor_is_left_alone():
    code, output = python('''
import sys
from types import ModuleType
real = ModuleType('mmrazor.structures.quantization')
sys.modules[real.__name__] = real
import mmkd_plugin
assert sys.modules['mmrazor.structures.quantization'] is real
''')
    assert code == 0, output


@pytest.mark.parametrize('scope, extra', [('mmdet', ''), ('mmpretrain', ''), ('mmengine', ''),
                                          ('mmrazor', 'import mmkd_plugin')])
def test_our_types_resolve_from_every_library(scope, extra):
    code, output = python(f'''
{extra}
from {scope}.registry import MODELS
from mmengine.registry import init_default_scope
init_default_scope('{scope}')
assert type(MODELS.build(dict(type='mmkd_plugin.AMDLoss'))).__name__ == 'AMDLoss'
''')
    assert code == 0, output


@pytest.mark.parametrize('package', ['mmcv._ext', 'mmpretrain', 'mmrazor', 'ordered_set', 'six'])
def test_what_is_not_installed_is_named_in_one_sentence(package):
    """``mmcv._ext`` is what mmcv-lite lacks. The registry must not swallow it."""
    code, output = python(WITHOUT.format(name=package) + '''
from mmengine.registry import MODELS
MODELS.build(dict(type='mmkd_plugin.AMDLoss'))
''')
    last = output.strip().splitlines()[-1]
    assert code != 0 and 'StackError' in last and 'run `pip install' in last, output[-2000:]
    assert package.split('.')[0] in last


def test_what_onedl_mmdetection_does_not_declare_is_named():
    code, output = python(WITHOUT.format(name='imgaug') + '''
import mmdet
mmdet.__version__ = '3.5.1'
import mmkd_plugin
''')
    last = output.strip().splitlines()[-1]
    assert code != 0 and 'StackError: mmkd_plugin cannot use imgaug' in last and '`pip install --no-deps imaug`' in last


def test_transformers_too_new_for_mmpretrain_costs_only_its_models_of_images_and_text(tmp_path):
    (tmp_path / 'transformers').mkdir()
    (tmp_path / 'transformers/__init__.py').write_text('''
class configuration_utils:  # torch 2.1 reads it; all that MMPretrain asks of version 4 is not there
    class PretrainedConfig:
        pass
''')
    information = tmp_path / 'transformers-5.0.0.dist-info/METADATA'
    information.parent.mkdir()
    information.write_text('Metadata-Version: 2.1\nName: transformers\nVersion: 5.0.0\n')
    env = dict(PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')]))
    code, output = python('import mmpretrain.models', **env)
    assert code != 0 and 'transformers' in output, output[-2000:]  # the real one gets further, to a TypeError
    code, output = python('''
import mmkd_plugin.models
from mmpretrain.registry import MODELS
assert MODELS.get('ResNet') and MODELS.get('mmkd_plugin.AMDLoss')
MODELS.build(dict(type='BlipCaption'))
''', **env)
    assert code != 0 and 'requires extra multi-modal dependencies' in output, output[-2000:]


def test_a_clash_of_versions_is_named_in_one_sentence():
    code, output = python('import mmcv; mmcv.__version__ = "9.0.0"; import mmkd_plugin')
    last = output.strip().splitlines()[-1]
    assert code != 0 and 'StackError' in last and 'MMCV==9.0.0' in last and 'Please install mmcv>=2.0.0' in last, last


# A mmcv too new for MMRazor alone: MMDetection and MMPretrain, which judge it for themselves, are imported before.
NEWER_MMCV = '''
import mmcv, mmdet, mmpretrain
mmcv.__version__ = '2.3.6'
'''


def test_a_mmcv_too_new_for_mmrazor_alone_is_taken_and_its_version_stays():
    code, output = python(NEWER_MMCV + '''
import mmkd_plugin, mmrazor.models
assert mmcv.__version__ == '2.3.6', mmcv.__version__
''')
    assert code == 0, output


def test_the_version_of_mmcv_stays_when_mmrazor_is_not_there():
    code, output = python(WITHOUT.format(name='mmrazor') + NEWER_MMCV + '''
try:
    import mmkd_plugin
except RuntimeError as error:
    assert 'mmrazor' in str(error) and mmcv.__version__ == '2.3.6', (error, mmcv.__version__)
    print('refused')
''')
    assert code == 0 and 'refused' in output, output


def test_a_mmcv_too_old_for_mmrazor_is_refused_with_its_own_version():
    code, output = python(NEWER_MMCV.replace('2.3.6', '1.7.0') + 'import mmkd_plugin')
    last = output.strip().splitlines()[-1]
    assert code != 0 and 'StackError' in last and 'mmrazor (MMCV==1.7.0' in last, last


def test_tools_leave_it_to_us_to_import_mmrazor():
    """Sorted imports would put it first, where it refuses the newer stack's mmcv."""
    tools = sorted((Path(__file__).parent.parent / 'tools').rglob('*.py'))
    assert len(tools) > 10
    for tool in tools:
        for node in ast.walk(ast.parse(tool.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [
                node.module] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split('.')[0] == 'mmrazor' for name in names), tool.name
