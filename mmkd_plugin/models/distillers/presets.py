"""Presets of base distillers, with loss, connectors and weight.

A base is a dict with these fields. :data:`PRESETS` has the values for published methods.

``loss``
    Config of the loss. Leave the loss's own weight, if any, at 1 and use ``weight``.
``connector``, ``t_connector``
    Config of the connector of the student's or the teacher's maps, or None for no connector. Connectors in a list run
    in order. The values ``'s_channels'`` and ``'t_channels'`` are replaced by the channels of the maps.
``share``
    ``'map'``: one connector per map. ``'layer'``: one per layer, with the list of its maps as input. ``'all'``: one for
    all layers, with the list of all maps, shallow to deep, as input; the channels are then lists too.
``aligned``
    Whether ``connector`` returns maps of the teacher's shape, which SoKD's policy can compare with the teacher's maps.
``same_channels``
    Whether the loss compares channel with channel and no connector changes the number of channels.
``inputs``
    The input of each argument of the loss: ``'student'``, ``'teacher'`` or ``'data_samples'``.
``weight``
    Factor of the loss.
``at_once``
    Whether one call of the loss takes the lists of all maps and returns a vector with one value per map.
"""
from collections.abc import Sequence
from typing import Any

from ...utils import check_dict, check_number, closest

_S_T = dict(s_feature='student', t_feature='teacher')
_PREDS = dict(preds_S='student', preds_T='teacher')
_DEFAULTS = dict(connector=None, t_connector=None, share='map', aligned=False, same_channels=False,
                 inputs=_S_T, weight=1.0, at_once=False)
_POOL = dict(type='TorchFunctionalConnector', function_name='adaptive_avg_pool2d', func_args=dict(output_size=1))
_CHANNELS = dict(in_channels='s_channels', out_channels='t_channels')

PRESETS: dict[str, dict] = {
    # Romero et al., FitNets, arXiv 1412.6550. Weight: 1 for pyramids. CRD's benchmark (arXiv 1910.10699) uses 100 for
    # one stage of a classifier on CIFAR-100.
    'fitnet': dict(
        loss=dict(type='mmkd_plugin.FitNetLoss'),
        connector=dict(type='mmkd_plugin.FitNetConnector', **_CHANNELS), share='layer', aligned=True, weight=1.0),
    # Zagoruyko and Komodakis, attention transfer, arXiv 1612.03928. Weight of CRD's benchmark. The loss is a mean over
    # positions, so large maps need a larger weight.
    'at': dict(loss=dict(type='ATLoss'), weight=1000.0),
    # Cao et al., PKD, arXiv 2207.02039. Weight of MMRazor's configs of RetinaNet and FCOS. Channels must agree.
    'pkd': dict(loss=dict(type='mmkd_plugin.PKDLoss'), same_channels=True, inputs=_PREDS, weight=10.0),
    # Shu et al., channel-wise distillation, arXiv 2011.13256. Temperature and weight of MMRazor's configs of detectors.
    # Channels must agree.
    'cwd': dict(loss=dict(type='ChannelWiseDivergence', tau=1), same_channels=True, inputs=_PREDS, weight=10.0),
    # Yang et al., MGD, arXiv 2205.01529. Weight and mask of its one-stage detectors. The loss is a sum over positions,
    # so small images need a larger weight.
    'mgd': dict(
        loss=dict(type='MGDLoss', alpha_mgd=1.0),
        connector=dict(type='MGDConnector', student_channels='s_channels', teacher_channels='t_channels',
                       lambda_mgd=0.65), inputs=_PREDS, weight=2e-5),
    # Zhang and Ma, FBKD, ICLR 2021. MMRazor's configs of Faster R-CNN. Channels must agree.
    'fbkd': dict(
        loss=dict(type='FBKDLoss'),
        connector=dict(type='FBKDStudentConnector', in_channels='s_channels', mode='dot_product', sub_sample=True),
        t_connector=dict(type='FBKDTeacherConnector', in_channels='t_channels', mode='dot_product', sub_sample=True),
        same_channels=True, inputs=dict(s_input='student', t_input='teacher')),
    # Tian et al., CRD, arXiv 1910.10699, on the pooled map. The loss needs sample_n, the number of training images, and
    # mmkd_plugin.CRDDataset.
    'crd': dict(
        loss=dict(type='CRDLoss', neg_num=16384, dim_out=128),
        connector=[_POOL, dict(type='CRDConnector', dim_in='s_channels', dim_out=128)],
        t_connector=[_POOL, dict(type='CRDConnector', dim_in='t_channels', dim_out=128)],
        inputs=dict(s_feats='student', t_feats='teacher', data_samples='data_samples'), weight=0.8),
    # Chen et al., ReviewKD, arXiv 2104.09044. Weight on ImageNet.
    'reviewkd': dict(
        loss=dict(type='mmkd_plugin.ReviewKDLoss'),
        connector=dict(type='mmkd_plugin.ReviewKDConnector', **_CHANNELS), share='all', aligned=True),
    # Jeon et al., AMD, arXiv 2302.14130, in the paper's form. Weight for one layer from the same group's next paper.
    'amd': dict(loss=dict(type='mmkd_plugin.AMDLoss'), weight=1000.0, at_once=True),
    # AMD for detectors. The value does not depend on the size of the map. With the paper's local part.
    'amd-scale-free': dict(loss=dict(type='mmkd_plugin.AMDLoss', scale_free=True, local_grid=2), at_once=True),
}


def resolve(base: str | dict, field: str = 'base') -> tuple[str, dict]:
    """Returns the name of a base, as in the names of its losses, and the base with all fields.

    Args:
        base: a name in :data:`PRESETS`, or a dict. With ``preset``, its fields are merged into those of that preset.
            Otherwise they are the complete base, and ``name`` may name it.
        field: field of the config, for error messages.

    Raises:
        ValueError: the preset or a field does not exist, or a field has a wrong value.
    """
    given = dict(preset=base) if isinstance(base, str) else dict(check_dict(field, base))
    preset = given.pop('preset', None)
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise ValueError(f'{field}: no preset {preset!r}; {closest(preset, [*PRESETS, "crosskd"])}')
    name = given.pop('name', preset or 'base')
    if not isinstance(name, str):
        raise ValueError(f'{field}.name: expected a name, got {name!r}')
    unknown = sorted(set(given) - {'loss', *_DEFAULTS})
    if unknown:
        raise ValueError(f'{field}: no field {unknown[0]!r}; {closest(unknown[0], ["loss", *_DEFAULTS])}')
    whole = _merged({**_DEFAULTS, **PRESETS.get(preset, {})}, given)
    if not isinstance(whole.get('loss'), dict):
        raise ValueError(f'{field}.loss: expected the config of a loss, got {whole.get("loss")!r}')
    if whole['share'] not in ('map', 'layer', 'all'):
        raise ValueError(f"{field}.share: expected 'map', 'layer' or 'all', got {whole['share']!r}")
    roles = set(check_dict(f'{field}.inputs', whole['inputs']).values())
    if not {'student', 'teacher'} <= roles <= {'student', 'teacher', 'data_samples'}:
        raise ValueError(f"{field}.inputs: expected arguments of the loss with values 'student', 'teacher' and, if "
                         f"needed, 'data_samples', got {whole['inputs']!r}")
    check_number(f'{field}.weight', whole['weight'], least=0)
    return name.replace('-', '_'), whole


def _merged(base: dict, given: dict) -> dict:
    """Merges as MMEngine's configs, but a dict with another type is replaced."""
    found = dict(base)
    for key, value in given.items():
        old = found.get(key)
        same_kind = isinstance(value, dict) and isinstance(old, dict) and value.get('type', old.get('type')) == old.get(
            'type') and not value.get('_delete_')
        found[key] = _merged(old, value) if same_kind and key != 'inputs' else value
    return found


def fill_channels(config: Any, s_channels: int | Sequence[int], t_channels: int | Sequence[int]) -> Any:
    """Returns a config with ``'s_channels'`` and ``'t_channels'`` replaced by numbers."""
    if isinstance(config, dict):
        return {key: fill_channels(value, s_channels, t_channels) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [fill_channels(value, s_channels, t_channels) for value in config]
    numbers = dict(s_channels=s_channels, t_channels=t_channels)
    return numbers.get(config, config) if isinstance(config, str) else config
