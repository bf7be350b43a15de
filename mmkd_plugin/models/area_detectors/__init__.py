from ..levels import to_row
from .areas import Areas, area_loss, count_areas, decode, detection_loss, find_areas
from .dam import DAM
from .heatmap_anchor import attention_loss, attention_map, centernet_loss, centernet_targets

__all__ = [
    'DAM', 'Areas', 'area_loss', 'attention_loss', 'attention_map', 'centernet_loss', 'centernet_targets',
    'count_areas', 'decode', 'detection_loss', 'find_areas', 'to_row'
]
