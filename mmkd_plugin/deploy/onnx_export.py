"""Export of a student to ONNX, from pixels to detections or scores, with a check against PyTorch on real images."""
import copy
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmengine.model import BaseModel
from mmpretrain.models import ImageClassifier
from mmpretrain.models.heads import ClsHead, MultiLabelClsHead
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..compat import StackError
from ..utils import in_words
from .agreement import compare_detections, compare_tensors
from .detector_graph import DetectorGraph, why_not
from .evaluation import headline
from .files import finished, refuse_existing
from .onnx_model import OnnxModel, read_from_files
from .pixels import Pixels
from .two_stage_graph import TwoStageGraph, why_not_two_stages

OPSET = 17
POINTS = 0.1  # of 100, largest difference between the accuracies of ONNX Runtime and PyTorch
_STRIDE = 32  # stride of the last stage of backbones


def check_onnx(out: str, overwrite: bool) -> None:
    """Checks early for errors that would stop :func:`export_onnx`.

    Raises:
        ValueError: ``out`` exists, and ``overwrite`` is False.
        StackError: onnx or onnxruntime is missing.
    """
    refuse_existing('--onnx', out, overwrite)
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise StackError(f'--onnx: {error.name} is not installed. Run `pip install onnx onnxruntime`') from error


def export_onnx(model: BaseModel, batch: dict, out: str, overwrite: bool = False, raw: bool = False,
                about: dict | None = None, evaluate: Callable[[OnnxModel], dict[str, float]] | None = None,
                accuracy: dict[str, float] | None = None) -> dict:
    """Writes ``model`` to ``out`` if the results of ONNX Runtime agree with those of PyTorch.

    The input of all graphs is pixels, ``images`` (N, C, H, W), 0 to 255, RGB or grey, of the dtype of the model's
    pipeline (uint8 if the pipeline does not compute with them). Normalisation is in the graph. The number of images is
    free.

    =========================  ================================================  =================================
    model                      inputs                                            outputs
    =========================  ================================================  =================================
    classifier                 ``images``                                        ``scores`` (N, classes)
    detector                   ``images``, ``image_sizes`` (N, 2); H, W free     see :class:`DetectorGraph`
    one-stage, ``raw``         ``images``, ``image_sizes`` (N, 2); H, W free     outputs of its head, per level,
                                                                                 such as ``cls_scores_0``
    =========================  ================================================  =================================

    Args:
        model: the model, in eval mode.
        batch: a batch of a data loader with at least one real image.
        out: the file to write.
        overwrite: whether ``out`` may exist.
        raw: whether a detector's graph ends before decoding and NMS.
        about: additional metadata of the file, such as the class names.
        evaluate: evaluates a graph on the test set.
        accuracy: metrics of PyTorch on the test set. The graph may differ from them by :data:`POINTS`.

    Returns:
        ``input``, ``outputs``, ``agreement``, the result of the comparison with PyTorch, and ``accuracy``, the result
        of ``evaluate``.

    Raises:
        ValueError: the model has no such graph, ONNX Runtime has other results, or ``out`` exists or cannot be
            written.
        StackError: onnx or onnxruntime is missing.
    """
    check_onnx(out, overwrite)
    kind = graph_of(model, raw)
    pixels = Pixels(model.data_preprocessor, batch['inputs'][0].shape[0], read_from_files(batch))
    graph, free = kind(model, pixels).eval(), [0] if kind is ClassifierGraph else [0, 2, 3]
    inputs = OnnxModel.inputs_of(batch)
    names = _output_names(graph, inputs)
    with finished('--onnx', out, overwrite) as unfinished:
        _write(graph, inputs, names, free, unfinished)
        given = dict(_describe(model, inputs, free), **(about or {}))
        _add_metadata(unfinished, given)
        runtime = OnnxModel(unfinished)
        agreement = _agreement(model, graph, runtime, batch, names)
        found = evaluate(runtime) if evaluate else None
        if found and abs(headline(found)[1] - headline(accuracy)[1]) > POINTS + 1e-6:
            raise ValueError(f'--onnx: {headline(found)[0]} is {headline(found)[1]:.2f} with ONNX Runtime and '
                             f'{headline(accuracy)[1]:.2f} with PyTorch, expected a difference of at most {POINTS:g} '
                             'points. No file was written')
    return dict(input=given, outputs=names, agreement=agreement, accuracy=found)


def graph_of(model: BaseModel, raw: bool = False) -> type[nn.Module]:
    """Returns the class of a model's graph. For ``raw``, see :func:`export_onnx`.

    Raises:
        ValueError: the model has no such graph.
    """
    name = type(model).__name__
    if isinstance(model, ImageClassifier):
        if not isinstance(model.head, (ClsHead, MultiLabelClsHead)):
            raise ValueError(f'--onnx: {name} with {type(model.head).__name__} does not have one score per class, '
                             'expected a ClsHead or MultiLabelClsHead. Export the student without --onnx')
        return ClassifierGraph
    has_raw = isinstance(model, SingleStageDetector) and hasattr(model, 'bbox_head')
    if raw and has_raw:
        return RawGraph
    two_stages = isinstance(model, TwoStageDetector)
    if raw and two_stages:
        raise ValueError(f'--onnx-raw: {name} has two stages, expected a one-stage detector. Leave out --onnx-raw')
    reason = why_not_two_stages(model) if two_stages else why_not(model)
    if reason:
        raise ValueError(f'--onnx: {reason}. ' + ('Export its raw outputs with --onnx-raw, or export' if has_raw else
                                                  'Export') + ' the student without --onnx and convert it with '
                         'MMDeploy')
    return TwoStageGraph if two_stages else DetectorGraph


class ClassifierGraph(nn.Module):
    """Maps ``images`` to ``scores`` (N, classes)."""

    outputs = ('scores', )

    def __init__(self, model: ImageClassifier, pixels: Pixels) -> None:
        super().__init__()
        self.network = model
        self.pixels = pixels
        self.one_class = isinstance(model.head, ClsHead)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(self.pixels(images), mode='tensor')
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        return logits.softmax(1) if self.one_class else logits.sigmoid()


class RawGraph(nn.Module):
    """Maps ``images`` and ``image_sizes`` to the outputs of a detector's head."""

    def __init__(self, model: SingleStageDetector, pixels: Pixels) -> None:
        super().__init__()
        self.network = model
        self.pixels = pixels

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        outputs = self.network(self.pixels(images, image_sizes), mode='tensor')
        return tuple(x for x in tree_flatten(outputs)[0] if isinstance(x, Tensor))


def _output_names(graph: nn.Module, inputs: tuple[Tensor, ...]) -> list[str]:
    if not isinstance(graph, RawGraph):
        return list(graph.outputs)
    with torch.no_grad():
        outputs = graph.network(graph.pixels(*inputs), mode='tensor')
    kinds = list(inspect.signature(graph.network.bbox_head.loss_by_feat).parameters)
    return [f'{kind}_{level}' for kind, levels in zip(kinds, outputs) for level in range(len(levels))]


def _write(graph: nn.Module, inputs: tuple[Tensor, ...], names: list[str], free: list[int], path: Path) -> None:
    """Writes the graph with the tracing exporter.

    ``dynamo`` is False if torch has the argument, because all versions from 2.0 on have the tracing exporter, and 2.9
    changed the default.
    """
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    dynamic = {'images': {axis: axes[axis] for axis in free}, 'image_sizes': {0: 'batch'}}
    if isinstance(graph, RawGraph):
        dynamic.update({name: {axis: axes[axis] if axis == 0 else f'{axes[axis]}_of_{name}' for axis in free}
                        for name in names})
    else:
        dynamic.update({name: {0: 'batch'} for name in names})
    if 2 not in free:
        inputs = inputs[:1]
        del dynamic['image_sizes']
    options = dict(dynamo=False) if 'dynamo' in inspect.signature(torch.onnx.export).parameters else {}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')  # the tracer warns about branches on the number of levels
        try:
            torch.onnx.export(graph, inputs, str(path), input_names=['images', 'image_sizes'][:len(inputs)],
                              output_names=names, dynamic_axes=dynamic, opset_version=OPSET, **options)
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise ValueError(f'--onnx: torch {torch.__version__} cannot write {type(graph.network).__name__} as ONNX '
                             f'of opset {OPSET}: {in_words(error)}') from error


def _describe(model: BaseModel, inputs: tuple[Tensor, ...], free: list[int]) -> dict:
    """Returns the description of the graph's inputs."""
    images = inputs[0]
    shape = [letter if axis in free else length for axis, (letter, length) in enumerate(zip('NCHW', images.shape))]
    given = dict(images=shape, dtype=str(images.dtype).removeprefix('torch.'),
                 channels='grey' if images.shape[1] == 1 else 'RGB', normalise='inside, from pixels of 0 to 255')
    if 2 in free:
        divisor = int(getattr(model.data_preprocessor, 'pad_size_divisor', None) or 1)
        given.update(image_sizes='(N, 2) int64, height and width of each image without the padding of the batch; '
                                 'padding by the test pipeline (Pad) counts as image',
                     sides='any; padded inside' if divisor % _STRIDE == 0 else f'multiples of {_STRIDE}')
    return given


def _add_metadata(path: Path, given: dict) -> None:
    import onnx
    model = onnx.load(str(path))
    foreign = sorted({f'{node.domain}::{node.op_type}' for node in model.graph.node if node.domain})
    if foreign:
        raise ValueError(f'--onnx: the model uses {", ".join(foreign)}, which ONNX does not have. Export the student '
                         'without --onnx and convert it with MMDeploy, which has such operators')
    onnx.helper.set_model_props(model, {key: str(value) for key, value in given.items()})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _agreement(model: BaseModel, graph: nn.Module, runtime: OnnxModel, batch: dict, names: list[str]) -> dict:
    """Compares ONNX Runtime with PyTorch on the batch, on one image, and on another size if the size is free."""
    first = {key: values[:1] for key, values in batch.items()}
    trials = [batch, first]
    if not isinstance(graph, ClassifierGraph):
        trials.append(_side_by_side(first))
    worst: dict = {}
    for trial in trials:
        found = dict(zip(names, runtime.run(trial), strict=True))
        if isinstance(graph, DetectorGraph):
            data = model.data_preprocessor(copy.deepcopy(trial), False)
            with torch.no_grad():
                expected = model.predict(data['inputs'], data['data_samples'], rescale=False)
            result = compare_detections(found, [sample.pred_instances for sample in expected])
        elif isinstance(graph, RawGraph):
            with torch.no_grad():
                expected = [x.numpy() for x in graph(*OnnxModel.inputs_of(trial))]
            result = compare_tensors(found, dict(zip(names, expected, strict=True)))
        else:
            data = model.data_preprocessor(copy.deepcopy(trial), False)
            with torch.no_grad():
                expected = model(**data, mode='predict')
            result = compare_tensors(found, dict(scores=np.stack([sample.pred_score.numpy() for sample in expected])))
        worst = {key: max(value, worst.get(key, value)) if key != 'detections' else value + worst.get(key, 0)
                 for key, value in result.items()}
    return worst


def _side_by_side(batch: dict) -> dict:
    """Returns an image twice as wide."""
    sample = copy.deepcopy(batch['data_samples'][0])
    image = torch.cat([batch['inputs'][0]] * 2, 2)
    sample.set_metainfo(dict(img_shape=tuple(image.shape[1:])))
    return dict(inputs=[image], data_samples=[sample])
