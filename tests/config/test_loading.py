import pytest

from mmkd_plugin.config.loading import read_config

CONFIG = '''
model = dict(teacher=dict(cfg_path='big.py'), teacher_ckpt='big.pth', student_ckpt='https://a/b.pth',
             architecture=dict(type='X'))
load_from = 'elsewhere.pth'
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A config and its teacher in a folder of the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'mine'
    folder.mkdir()
    (folder / 'small.py').write_text(CONFIG)
    for name in ('big.py', 'big.pth'):
        (folder / name).write_text('')
    return folder


def test_a_path_beside_the_config_is_found(folder):
    cfg = read_config('mine/small.py')
    assert cfg.model.teacher.cfg_path == 'mine/big.py' and cfg.model.teacher_ckpt == 'mine/big.pth'
    assert cfg.load_from == 'elsewhere.pth' and cfg.model.student_ckpt == 'https://a/b.pth'


def test_the_working_directory_comes_first(folder):
    (folder.parent / 'big.pth').write_text('')
    cfg = read_config('mine/small.py')
    assert cfg.model.teacher_ckpt == 'big.pth' and cfg.model.teacher.cfg_path == 'mine/big.py'


def test_options_are_relative_to_the_working_directory(folder):
    (folder / 'other.pth').write_text('')
    assert read_config('mine/small.py', {'model.teacher_ckpt': 'other.pth'}).model.teacher_ckpt == 'other.pth'


def test_a_missing_config_is_answered_with_the_closest(monkeypatch):
    with pytest.raises(ValueError, match="config: 'configs/amd_retinanet_cooc.py' not found .*amd_retinanet_coco.py"):
        read_config('configs/amd_retinanet_cooc.py')
    with pytest.raises(ValueError, match='not found .*sokd-fitnet_backbone_vgg13_vgg8_b64_cifar100.py'):
        read_config('configs/sokd-fitnet_vgg13-vgg8_cifar100.py')  # its name in version 0.1
