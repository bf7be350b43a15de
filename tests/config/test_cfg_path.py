"""What a model in a config can be."""
import pytest
from conftest import classifier
from mmengine.config import Config

from mmkd_plugin.config.cfg_path import build_model, read_cfg_path


def test_a_library_that_is_not_installed_is_not_installed_now(monkeypatch):
    def install(*_):
        raise AssertionError('pip')
    monkeypatch.setattr('mmengine.utils.package_utils.call_command', install)
    for name, closest in (('mmyolo::yolov5/yolov5_s.py', ''), ('mmdett::retinanet/x.py', '.*mmdet')):
        with pytest.raises(ValueError, match=f'teacher: the library .*{name!r} is not installed; the closest{closest}'):
            read_cfg_path(name, 'teacher')


def test_what_is_no_model_is_answered_with_what_is(tmp_path):
    distillation = tmp_path / 'd.py'
    Config(dict(model=dict(type='mmkd_plugin.TeacherStudentDistill', architecture=classifier()))).dump(distillation)
    for model, message in (
            ('my_big.py', r'teacher must be a config or a model, got str. .* use teacher=dict\(cfg_path=...\)'),
            (dict(config='my_big.py'), 'teacher needs type or cfg_path, got config'), ({}, 'got an empty dict'),
            (dict(cfg_path=str(distillation)), "teacher: '.*d.py' is a TeacherStudentDistill with a model inside.")):
        with pytest.raises(ValueError, match=message):
            build_model('teacher', model, False)
