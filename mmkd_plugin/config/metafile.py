"""Metrics of a library's weights from its metafiles."""
from mmengine.config.utils import _get_cfg_metainfo, _get_package_and_cfg_path
from mmengine.utils import get_installed_path

# Name of a metric in metafiles; its name in MMDetection and MMPretrain, and the factor between the units.
_METAFILE = {'box AP': ('coco/bbox_mAP', 0.01), 'mask AP': ('coco/segm_mAP', 0.01), 'PQ': ('coco_panoptic/PQ', 1.0),
             'Top 1 Accuracy': ('accuracy/top1', 1.0), 'Top 5 Accuracy': ('accuracy/top5', 1.0)}


def metafile_metrics(cfg_path: str) -> dict[str, float]:
    """Returns the metrics in the metafile of a library's config, in the names and units of the evaluators."""
    if '::' not in cfg_path:
        return {}
    package, name = _get_package_and_cfg_path(cfg_path)
    try:
        results = _get_cfg_metainfo(get_installed_path(package), name).get('Results') or []
    except ValueError:  # a config without weights
        return {}
    found = {}
    for result in results if isinstance(results, list) else [results]:
        for metric, value in (result.get('Metrics') or {}).items():
            if metric in _METAFILE and isinstance(value, (int, float)):
                known, unit = _METAFILE[metric]
                found.setdefault(known, value * unit)
    return found
