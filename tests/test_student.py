"""What a student is outside a distillation, and what export says of it."""
import runpy
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope
from mmpretrain import get_model

from mmkd_plugin.student import plain_config


@pytest.mark.parametrize('name, foreign, library', [
    ('amd_resnet34-resnet18_cifar10', None, 'mmpretrain::resnet/resnet18_8xb16_cifar10.py'),
    ('amd_resnet50-mobilenetv2_imagenet', None, 'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py'),
    ('amd_wrn16w3-wrn16w1_cifar10', 'backbone (mmrazor.WideResNet)', None),
    ('sokd-fitnet_resnet32x4-resnet8x4_cifar100', 'backbone (mmkd_plugin.CIFARResNet)', None),
])
def test_export_says_whether_plain_mmpretrain_takes_the_file(name, foreign, library, tmp_path, monkeypatch, capsys):
    config = f'configs/{name}.py'
    init_default_scope('mmpretrain')
    state = MODELS.build(plain_config(Config.fromfile(config)).model).state_dict()
    torch.save(dict(state_dict={f'architecture.{key}': value for key, value in state.items()}), tmp_path / 'epoch.pth')
    out = tmp_path / 'student.pth'
    monkeypatch.setattr(sys, 'argv', ['export_student.py', config, str(tmp_path / 'epoch.pth'), str(out)])
    runpy.run_path('tools/export_student.py', run_name='__main__')
    said = capsys.readouterr().out
    if foreign:
        assert f'do not have its {foreign}: load it' in said and 'after `import mmkd_plugin`' in said
    else:
        assert 'load it with the student\'s own config and neither mmkd_plugin nor mmrazor' in said
    exported = torch.load(out)
    model = get_config(library).model if library else Config.fromstring(exported['meta']['cfg'], '.py')
    model = MODELS.build(model) if library else get_model(model, pretrained=str(out))
    model.load_state_dict(exported['state_dict'], strict=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
