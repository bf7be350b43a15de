"""Every detector config with its real models, on COCO in miniature."""
import re
from pathlib import Path

import miniature
import pytest
import sweep
from mmengine.config import Config
from mmengine.hub import get_config

from mmkd_plugin.deploy.student import plain_config

FASTER, FCOS, MASK, RETINA = (f'mmdet::{name}' for name in (
    'faster_rcnn/faster-rcnn', 'fcos/fcos', 'mask_rcnn/mask-rcnn', 'retinanet/retinanet'))
PAIRS = {  # teacher and student of the name
    'retinanet_r101_retinanet_r50_1x': (f'{RETINA}_r101_fpn_1x_coco.py', f'{RETINA}_r50_fpn_1x_coco.py'),
    'faster-rcnn_r101_faster-rcnn_r50_1x': (f'{FASTER}_r101_fpn_1x_coco.py', f'{FASTER}_r50_fpn_1x_coco.py'),
    'faster-rcnn_r101_faster-rcnn_r18_1x': (
        f'{FASTER}_r101_fpn_1x_coco.py', 'configs/_base_/models/faster-rcnn_r18_fpn_1x_coco.py'),
    'faster-rcnn_r50_faster-rcnn_mobilenetv2_1x': (
        f'{FASTER}_r50_fpn_1x_coco.py', 'configs/_base_/models/faster-rcnn_mobilenetv2_fpn_1x_coco.py'),
    'fcos_r101_fcos_r50_1x': (
        f'{FCOS}_r101-caffe_fpn_gn-head-1x_coco.py', f'{FCOS}_r50-caffe_fpn_gn-head_1x_coco.py'),
    'fcos_r101_retinanet_r50_1x': (f'{FCOS}_r101-caffe_fpn_gn-head-1x_coco.py', f'{RETINA}_r50_fpn_1x_coco.py'),
    'mask-rcnn_r101_mask-rcnn_r50_1x': (f'{MASK}_r101_fpn_1x_coco.py', f'{MASK}_r50_fpn_1x_coco.py'),
    'rtmdet_l_rtmdet_s_8xb32-300e': (
        'mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py', 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py'),
}
DISTILLERS = dict(amd='mmkd_plugin.AMDDistiller', sokd='mmkd_plugin.SoKDDistiller')
BASES = dict(pkd='PKDLoss', fitnet='FitNetLoss')
detectors = pytest.mark.parametrize('config', sweep.DETECTORS, ids=lambda path: path.stem)


def parts_of(config):
    """Returns method, base and pair of the name."""
    method, _, pair = config.stem.removesuffix('_coco').split('_', 2)
    return *(method.split('-') + [None])[:2], pair


@pytest.fixture(scope='module')
def options(tmp_path_factory):
    root = miniature.make_coco(tmp_path_factory.mktemp('data') / 'coco')
    return dict(option.split('=', 1) for option in miniature.coco_options(root))


def test_no_config_is_forgotten():
    found = set((sweep.ROOT / 'configs').rglob('*.py'))
    others = {path for path in found if {'_base_', 'benchmarks'} & set(path.parts)}
    aliases = set((sweep.ROOT / 'configs').glob('*.py'))
    assert {*sweep.DETECTORS, *sweep.CLASSIFIERS, *sweep.ALONE} == found - others - aliases
    assert len(aliases) == 4
    for method in DISTILLERS:
        assert {pair for name, _, pair in map(parts_of, sweep.DETECTORS) if name == method} == set(PAIRS)


@pytest.mark.parametrize('name', ['amd_retinanet_coco', 'amd_resnet_imagenet', 'sokd_retinanet_coco',
                                  'sokd_resnet_imagenet'])
def test_a_name_to_start_from_is_another_name_of_one_config(name):
    cfg, (base, ) = Config.fromfile(f'configs/{name}.py'), re.findall("_base_ = '(.*)'", Path(
        f'configs/{name}.py').read_text())
    assert cfg.to_dict() == Config.fromfile(Path('configs') / base).to_dict()


@pytest.mark.slow
@detectors
def test_one_step(config, options, tmp_path):
    model = sweep.check(config, options, tmp_path).model
    base = parts_of(config)[1]
    losses = {type(loss).__name__ for loss in model.distiller.distill_losses.values()}
    assert losses == ({BASES[base]} if base else {'AMDLoss'})
    renormalize = model.teachers[''].inputs
    assert (renormalize is not None) == ('fcos_r101_retinanet' in config.stem)
    assert renormalize is None or renormalize.reverse  # a caffe-style teacher sees BGR


@detectors
def test_teacher_and_student_are_those_of_the_name_and_nothing_else_is_changed(config):
    cfg = Config.fromfile(config)
    method, _, pair = parts_of(config)
    teacher, student = PAIRS[pair]
    assert cfg.model.distiller.type == DISTILLERS[method]
    assert cfg.model.teacher == dict(cfg_path=teacher)
    assert cfg.model.teacher_ckpt == get_config(teacher, pretrained=True).model_path
    base = student if '::' in student else str(sweep.ROOT / student)
    alone = plain_config(Config.fromstring(f'_base_ = [{base!r}]', '.py'))
    plain = plain_config(cfg)
    assert {key: plain[key] for key in alone} == dict(alone)
    assert set(plain) - set(alone) <= {'custom_hooks'} and plain.custom_hooks == alone.get('custom_hooks', [])


@pytest.mark.parametrize('config', [path for path in sweep.DETECTORS if path.stem.startswith('sokd')],
                         ids=lambda path: path.stem)
def test_the_policy_is_searched_in_the_first_sixth_of_the_training(config):
    cfg = Config.fromfile(config)
    *others, freeze = cfg.custom_hooks
    assert freeze == dict(type='mmkd_plugin.FreezePolicyHook', search_epochs=cfg.train_cfg.max_epochs // 6)
    assert [hook.type for hook in others] == (
        ['EMAHook', 'PipelineSwitchHook', 'mmrazor.StopDistillHook'] if 'rtmdet' in config.stem else [])
