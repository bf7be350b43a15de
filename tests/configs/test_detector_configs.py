"""Every detector config with its real models, on COCO in miniature."""
import miniature
import pytest
import sweep
from mmengine.config import Config
from mmengine.hub import get_config

from mmkd_plugin.deploy.student import plain_config

PAIRS = {  # teacher and student that the name promises
    'retinanet': ('mmdet::retinanet/retinanet_r101_fpn_1x_coco.py', 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'),
    'faster-rcnn_r101-r50': ('mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py',
                             'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'),
    'faster-rcnn_r101-r18': ('mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py',
                             'configs/_base_/models/faster-rcnn_r18_fpn_1x_coco.py'),
    'faster-rcnn_r50-mobilenetv2': ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
                                    'configs/_base_/models/faster-rcnn_mobilenetv2_fpn_1x_coco.py'),
    'fcos_r101-r50': ('mmdet::fcos/fcos_r101-caffe_fpn_gn-head-1x_coco.py',
                      'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'),
    'fcos-retinanet_r101-r50': ('mmdet::fcos/fcos_r101-caffe_fpn_gn-head-1x_coco.py',
                                'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'),
    'mask-rcnn_r101-r50': ('mmdet::mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py',
                           'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'),
    'rtmdet_l-s': ('mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py', 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py'),
}
DISTILLERS = dict(amd='mmkd_plugin.AMDDistiller', sokd='mmkd_plugin.SoKDDistiller')
detectors = pytest.mark.parametrize('config', sweep.DETECTORS, ids=lambda path: path.stem)


@pytest.fixture(scope='module')
def options(tmp_path_factory):
    root = miniature.make_coco(tmp_path_factory.mktemp('data') / 'coco')
    return dict(option.split('=', 1) for option in miniature.coco_options(root))


def test_no_config_is_forgotten():
    assert set(sweep.DETECTORS + sweep.CLASSIFIERS) == set((sweep.ROOT / 'configs').glob('*.py'))
    names = [path.stem for path in sweep.DETECTORS]
    assert sorted(names) == sorted(f'{method}_{pair}_coco' for method in DISTILLERS for pair in PAIRS)


@detectors
def test_one_step(config, options, tmp_path):
    model = sweep.check(config, options, tmp_path).model
    renormalize = model.__dict__['_renormalize']
    assert (renormalize is not None) == ('fcos-retinanet' in config.stem)
    assert renormalize is None or renormalize.reverse  # a caffe-style teacher sees BGR


@detectors
def test_teacher_and_student_are_those_of_the_name_and_nothing_else_is_changed(config):
    cfg = Config.fromfile(config)
    method, pair = config.stem.removesuffix('_coco').split('_', 1)
    teacher, student = PAIRS[pair]
    assert cfg.model.distiller.type == DISTILLERS[method]
    assert cfg.model.teacher == dict(cfg_path=teacher)
    assert cfg.model.teacher_ckpt == get_config(teacher, pretrained=True).model_path
    base = student if '::' in student else str(sweep.ROOT / student)
    alone = plain_config(Config.fromstring(f'_base_ = [{base!r}]', '.py'))
    plain = plain_config(cfg)
    assert {key: plain[key] for key in alone} == dict(alone)
    assert set(plain) - set(alone) <= {'sokd', 'custom_hooks'} and plain.custom_hooks == alone.get('custom_hooks', [])


@pytest.mark.parametrize('config', [path for path in sweep.DETECTORS if path.stem.startswith('sokd')],
                         ids=lambda path: path.stem)
def test_the_policy_is_searched_in_the_first_sixth_of_the_training(config):
    cfg = Config.fromfile(config)
    *others, freeze = cfg.custom_hooks
    assert freeze == dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=cfg.train_cfg.max_epochs // 6)
    assert [hook.type for hook in others] == (
        ['EMAHook', 'PipelineSwitchHook', 'mmrazor.StopDistillHook'] if 'rtmdet' in config.stem else [])
