"""Pictures, (H, W, 3) uint8 RGB, of a distillation: attention, areas, predictions and DAFA's policy."""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from mmengine.model import BaseDataPreprocessor
from mmengine.structures import BaseDataElement
from mmengine.visualization.utils import img_from_canvas
from mmrazor.models.task_modules import RecorderManager
from torch import Tensor, nn

from ..models.algorithms import TeacherStudentDistill
from ..models.algorithms.frozen_teacher import FrozenTeacher
from ..models.algorithms.teacher_inputs import reverses_channels
from ..models.area_detectors.heatmap_anchor import level_stride
from ..models.losses import AMDLoss, amd_logits
from ..models.recording import PartialForward


class MapView(NamedTuple):
    """The maps of student and teacher at one level for one image. Their h x w cells cover the image without padding."""
    name: str  # name of the layer, and of the level if there are several
    stride: tuple[float, float]  # pixels per cell, x and y
    t_attention: np.ndarray  # (h, w), mean square over channels
    s_attention: np.ndarray
    t_heatmap: np.ndarray | None = None  # (h, w), DAM's heatmap, in [0, 1]
    s_heatmap: np.ndarray | None = None
    boxes: np.ndarray | None = None  # (n, 4), DAM's areas, x1 y1 x2 y2 in pixels, by descending score
    scores: np.ndarray | None = None  # (n, )
    t_positive: np.ndarray | None = None  # (h, w), AMD's logits without their scale: cos(m acos Q), at most 1
    s_positive: np.ndarray | None = None
    t_negative: np.ndarray | None = None  # 1 - Q, in [0, 1]
    s_negative: np.ndarray | None = None


def check_drawable(model: nn.Module) -> None:
    """Raises ``ValueError`` unless the model distils feature maps."""
    if not isinstance(model, TeacherStudentDistill):
        raise ValueError('model.type: pictures need mmkd_plugin.TeacherStudentDistill, got '
                         f'{type(model).__name__}')
    distillers = [teacher.distiller for teacher in model.teachers.values()]
    if not any(getattr(distiller, 'layers', ()) for distiller in distillers):
        raise ValueError(f'model.distiller: {", ".join(type(each).__name__ for each in distillers)} has no layers, so '
                         'there are no feature maps to draw. Use a FeatureDistiller, AMDDistiller or SoKDDistiller '
                         'with layers=[...]')


def look(model: TeacherStudentDistill, inputs: Tensor, data_samples: list | None,
         image_shape: tuple[int, int]) -> list[MapView]:
    """Returns a view of each map of the distiller's layers. The networks run only as far as these layers.

    The teacher's features are not augmented. The state of the model does not change if it is in eval mode. With
    several teachers, the maps are in the order of the teachers.

    Args:
        model: the algorithm.
        inputs: (1, C, H, W), from the preprocessor.
        data_samples: those of the image, from the preprocessor.
        image_shape: (h, w) of the image in the upper left of the padded ``inputs``.
    """
    return [view for teacher in model.teachers.values() if getattr(teacher.distiller, 'layers', ())
            for view in _look(model.student, teacher, inputs, data_samples, image_shape)]


def _look(student: nn.Module, teacher: FrozenTeacher, inputs: Tensor, data_samples: list | None,
          image_shape: tuple[int, int]) -> list[MapView]:
    distiller = teacher.distiller
    views = []
    try:
        _record(student, distiller.student_recorders, distiller.calls(True), inputs, data_samples)
        _record(teacher.network, distiller.teacher_recorders, distiller.calls(False),
                *teacher.batch(inputs, data_samples))
        for layer in distiller.layers:
            s_maps, t_maps = distiller.maps(layer, True), distiller.maps(layer, False)
            found = getattr(distiller, 'detect_areas', lambda layer: None)(layer) or [None] * len(t_maps)
            for level, (s_map, t_map, areas) in enumerate(zip(s_maps, t_maps, found)):
                name = (f'{teacher.name}: ' if teacher.name else '') + layer + (
                    f', level {level}' if len(t_maps) > 1 else '')
                amd = _amd_of(distiller, layer, level)
                views.append(_view(name, s_map, t_map, areas, amd, inputs.shape[2:], image_shape))
    finally:
        teacher.forget_records()
    return views


def _record(network: nn.Module, recorders: RecorderManager, calls: dict[str, int], inputs: Tensor,
            data_samples: list | None) -> None:
    """Fills the recorders in ``calls``, without deliveries."""
    wanted = RecorderManager()
    wanted.recorders.update({name: recorders.get_recorder(name) for name in calls})
    forward = PartialForward(network, wanted, calls)
    try:
        forward(inputs, data_samples)
    finally:
        forward.remove()


def _amd_of(distiller: nn.Module, layer: str, level: int) -> AMDLoss | None:
    """Returns the AMD loss on a map of the student, or None."""
    for name, loss in distiller.distill_losses.items():
        source = distiller.loss_forward_mappings.get(name, {}).get('s_feature', {})
        if isinstance(loss, AMDLoss) and (source.get('recorder'), source.get('data_idx', 0)) == (layer, level):
            return loss
    return None


def _view(name: str, s_map: Tensor, t_map: Tensor, areas: dict[str, Tensor] | None, amd: AMDLoss | None,
          padded: tuple[int, int], image_shape: tuple[int, int]) -> MapView:
    strides = [level_stride(*lengths) for lengths in zip(padded, t_map.shape[2:])]
    rows, columns = (int(-(-length // stride)) for length, stride in zip(image_shape, strides))

    def cut(x: Tensor) -> np.ndarray:
        return x[0, :rows, :columns].float().cpu().numpy()

    attention = [x.float().square().mean(1) for x in (t_map, s_map)]
    view = MapView(name, tuple(strides[::-1]), *map(cut, attention))
    if amd is not None and s_map.shape[2:] == t_map.shape[2:]:
        (t_positive, t_negative), (s_positive, s_negative) = (
            map(cut, amd_logits(x, amd.margin, 1., amd.scale_free)) for x in attention)
        view = view._replace(t_positive=t_positive, t_negative=t_negative, s_positive=s_positive,
                             s_negative=s_negative)
    if areas is None:
        return view
    boxes, scores = (areas[key][0][areas['valid'][0]].cpu().numpy() for key in ('boxes', 'scores'))
    return view._replace(t_heatmap=cut(areas['t_heatmap']), s_heatmap=cut(areas['s_heatmap']),
                         boxes=boxes * (view.stride * 2), scores=scores)


def path_of(item: dict) -> str | None:
    """Returns the file that an item of a data set was read from, or None."""
    return getattr(item.get('data_samples'), 'metainfo', {}).get('img_path')


def rgb_image(item: dict, preprocessor: BaseDataPreprocessor) -> np.ndarray:
    """Returns the image of an item of a data set before the preprocessor normalises and pads it.

    MMCV reads files as BGR. Images of a data set in memory, such as CIFAR, have no path. They are RGB unless the
    preprocessor reverses the channels. An image that the pipeline normalised is scaled to the range of black to white.
    """
    image = item['inputs'].cpu()
    if image.dtype != torch.uint8:
        image = image - image.min()
        image = (image / image.max().clamp(min=1e-12) * 255).byte()
    if len(image) != 3:
        image = image[:1].expand(3, -1, -1)
    elif path_of(item) or reverses_channels(preprocessor):
        image = image.flip(0)
    return image.permute(1, 2, 0).numpy()


def draw_views(image: np.ndarray, views: Sequence[MapView], title: str) -> np.ndarray:
    """Draws views of an (H, W, 3) image, one per row."""
    height, width = image.shape[:2]
    grey = image.mean(2)
    names = ['image'] + [f'attention of the {side}\nblue: lowest, red: highest of the map'
                         for side in ('teacher', 'student')]
    if views[0].t_heatmap is not None:
        names[0] = "DAM's areas\nbolder: higher score"
        names += [f"DAM's heatmap of the {side}\nblue: 0, red: 1" for side in ('teacher', 'student')]
    if views[0].t_positive is not None:
        names += [f"AMD's {sign} map of the {side}\nblue: lowest, red: highest of both" for sign in (
            'positive', 'negative') for side in ('teacher', 'student')]
    panel = 2.8, 2.8 * min(max(height / width, 0.15), 2)  # inches
    figure = Figure((panel[0] * len(names) + 1.5, (panel[1] + 0.3) * len(views) + 0.8), dpi=100, layout='compressed')
    figure.suptitle(title, parse_math=False)
    grid = figure.subplots(len(views), len(names), squeeze=False)
    for axes, name in zip(grid[0], names):
        axes.set_title(name, fontsize='small')
    for row, view in zip(grid, views):
        rows, columns = view.t_attention.shape
        row[0].set_ylabel(f'{view.name}\n{columns} x {rows} cells', fontsize='small', rotation='horizontal', ha='right',
                          va='center')
        row[0].imshow(image, extent=(0, width, height, 0))
        for axes, values in zip(row[1:3], (view.t_attention, view.s_attention)):
            _overlay(axes, grey, values, view.stride)
        if view.t_heatmap is not None:
            _draw_boxes(row[0], view)
            for axes, values in zip(row[3:5], (view.t_heatmap, view.s_heatmap)):
                _overlay(axes, grey, values, view.stride, vmin=0, vmax=1)
                axes.set_xlabel(f'highest {values.max():.2f}', fontsize='small')
        if view.t_positive is not None:
            for both, pair in ((row[-4:-2], (view.t_positive, view.s_positive)),
                               (row[-2:], (view.t_negative, view.s_negative))):
                low, high = min(map(np.min, pair)), max(map(np.max, pair))
                for axes, values in zip(both, pair):
                    _overlay(axes, grey, values, view.stride, vmin=low, vmax=high)
                    axes.set_xlabel(f'{values.min():.2f} to {values.max():.2f}', fontsize='small')
        for axes in row:
            axes.set(xlim=(0, width), ylim=(height, 0), xticks=(), yticks=())
    return _pixels(figure)


def _overlay(axes: Axes, grey: np.ndarray, values: np.ndarray, stride: tuple[float, float], **limits: float) -> None:
    (height, width), (rows, columns) = grey.shape, values.shape
    axes.imshow(grey, cmap='gray', vmin=0, vmax=255, extent=(0, width, height, 0))
    axes.imshow(values, cmap='turbo', alpha=0.6, interpolation='bilinear',
                extent=(0, columns * stride[0], rows * stride[1], 0), **limits)


def _draw_boxes(axes: Axes, view: MapView) -> None:
    best = view.scores.max(initial=0)  # a diverged network has no areas
    for (x1, y1, x2, y2), score in zip(view.boxes, view.scores):
        share = score / best if best > 0 else 1
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor='lime', alpha=0.4 + 0.6 * share,
                                 linewidth=0.8 + 2 * share))
    axes.set_xlabel(f'highest score {best:.2f}', fontsize='small')


def draw_predictions(image: np.ndarray, predictions: dict[str, BaseDataElement],
                     classes: dict[str, Sequence[str] | None], score: float = 0.3) -> np.ndarray:
    """Draws the predictions of each model for an (H, W, 3) image: boxes, or the five highest class scores.

    Args:
        image: the image before padding and normalisation.
        predictions: one prediction per model, by the name of the model.
        classes: class names by the name of the model; with None, labels are numbers.
        score: boxes with a lower score are left out.
    """
    height, width = image.shape[:2]
    panel = 3.6, 3.6 * min(max(height / width, 0.4), 2)
    figure = Figure((panel[0] * len(predictions), panel[1] + 0.5), dpi=100, layout='constrained')
    for axes, (name, sample) in zip(figure.subplots(1, len(predictions), squeeze=False)[0], predictions.items()):
        names = classes.get(name)
        if 'pred_score' in sample:
            _draw_scores(axes, sample.pred_score, names)
            axes.set_title(name, fontsize='small')
            continue
        if 'pred_instances' not in sample:  # several tasks, panoptic segmentation, or no head
            axes.set_title(f'{name}: no boxes and no class scores', fontsize='small')
            axes.set_axis_off()
            continue
        axes.imshow(image)
        found = sample.pred_instances[sample.pred_instances.scores > score].cpu()
        scale = np.tile(sample.metainfo.get('scale_factor', (1, 1)), 2)[:4]  # boxes are in pixels of the file
        for (x1, y1, x2, y2), label, value in zip(found.bboxes.numpy() * scale, found.labels.tolist(),
                                                  found.scores.tolist()):
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor='lime'))
            axes.text(x1, y1, f'{names[label] if names else label} {value:.2f}', fontsize='x-small', va='bottom',
                      bbox=dict(facecolor='lime', pad=0.5, linewidth=0))
        axes.set(xlim=(0, width), ylim=(height, 0), xticks=(), yticks=())
        axes.set_title(f'{name}: {len(found)} above {score}', fontsize='small')
    return _pixels(figure)


def _draw_scores(axes: Axes, scores: Tensor, classes: Sequence[str] | None) -> None:
    values, labels = scores.cpu().topk(min(5, len(scores)))
    names = [str(classes[label] if classes else label) for label in labels.tolist()]
    axes.barh(range(len(names)), values.tolist(), tick_label=names)
    axes.set(xlim=(0, 1), xlabel='score')
    axes.invert_yaxis()


def stack(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Returns pictures stacked vertically on white."""
    width = max(picture.shape[1] for picture in pictures)
    return np.concatenate([np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255)
                           for picture in pictures])


def draw_policy(states: dict[int, dict[str, float]], frozen: int | None = None) -> np.ndarray:
    """Draws the course of a policy search.

    Args:
        states: the results of :meth:`DAFA.state` by iteration.
        frozen: the iteration at which the search ended, if it ended.
    """
    iterations = sorted(states)
    curves = {key: [states[i][key] for i in iterations] for key in states[iterations[0]]}
    chances = {key[2:]: curve for key, curve in curves.items() if key.startswith('p/')}
    figure = Figure((10, 6.5), dpi=100, layout='constrained')
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    colours = {name: f'C{i}' for i, name in enumerate(chances)}  # the same in every picture
    for name, curve in sorted(chances.items(), key=lambda item: -item[1][-1]):
        upper.plot(iterations, curve, color=colours[name], marker='.', label=f'{name} {curve[-1]:.1%}')
    lower.plot(iterations, curves['entropy'], marker='.', color='black')
    if frozen is not None:
        for axes in (upper, lower):
            axes.axvline(frozen, color='black', linestyle='--', label=f'end of search: {frozen}')
    upper.set(title='DAFA: operations on the batches', ylabel='probability of the operation',
              ylim=(0, 1.1 * max(map(max, chances.values()))))
    upper.yaxis.set_major_formatter(PercentFormatter(1))
    upper.legend(loc='center left', bbox_to_anchor=(1, 0.5))
    lower.set(ylabel='entropy of\nselection\n(1: uniform)', xlabel='iterations', ylim=(0, 1.1))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _pixels(figure)


def _pixels(figure: Figure) -> np.ndarray:
    return img_from_canvas(FigureCanvasAgg(figure))
