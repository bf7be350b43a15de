"""A student as ONNX: the network, checked against PyTorch on real images."""
import copy
import inspect
import os
from pathlib import Path

import numpy as np
import torch
from mmdet.models.detectors import SingleStageDetector
from mmengine.model import BaseModel
from mmpretrain.models import ImageClassifier
from mmpretrain.models.heads import ClsHead, MultiLabelClsHead
from torch import Tensor, nn

from ..compat import StackError
from ..models.algorithms.teacher_inputs import pixel_statistics, reverses_channels
from .cost import RawOutputs

OPSET = 17
_STRIDE = 32  # of the last stage of backbones
TOLERANCE = 1e-3  # of the difference, as a share of the largest output of each tensor


def check_onnx(out: str, overwrite: bool) -> None:
    """Finds early what would stop :func:`export_onnx`.

    Raises:
        ValueError: ``out`` exists, and ``overwrite`` is False.
        StackError: onnx or onnxruntime is missing.
    """
    if Path(out).exists() and not overwrite:
        raise ValueError(f'--onnx: {out!r} exists; choose another name, or overwrite it with --overwrite')
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise StackError(f'--onnx cannot do without {error.name}: run `pip install onnx onnxruntime`.') from error


def export_onnx(model: BaseModel, batch: dict, out: str, overwrite: bool = False) -> dict:
    """Writes the network of ``model`` to ``out``, if ONNX Runtime makes the same of it as PyTorch.

    A classifier is whole: ``images`` to ``scores``, (N, classes). Of a detector of one stage it is the network, with
    the raw outputs of its head, named as MMDetection names them with the level, such as ``cls_scores_0``; decoding and
    NMS stay outside. Number and, of a detector, size of the images are free. They must be normalised as
    the returned ``input`` and the file's metadata say.

    Args:
        model: in eval mode.
        batch: at least one real image, as a data loader collates it.
        out: the file.
        overwrite: whether it may exist.

    Returns:
        ``input``, ``outputs`` and ``largest_difference``, the last as a share of the largest output.

    Raises:
        ValueError: the model has no outputs that could be exported, ONNX Runtime makes something else of the images,
            or ``out`` exists.
        StackError: onnx or onnxruntime is missing.
    """
    check_onnx(out, overwrite)
    path = Path(out)
    network, free = _network(model), [0, 2, 3] if isinstance(model, SingleStageDetector) else [0]
    images = model.data_preprocessor(copy.deepcopy(batch), False)['inputs']
    with torch.no_grad():
        names = _output_names(model, model(images, mode='tensor'))
        outputs = network(images)
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    dynamic = {'images': {axis: axes[axis] for axis in free}}
    for name, output in zip(names, outputs, strict=True):
        dynamic[name] = {axis: axes[axis] if axis == 0 else f'{axes[axis]}_of_{name}' for axis in free
                         if axis < output.dim()}
    given = _input(model, batch, images, free)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f'{path.name}.unfinished')
    try:
        torch.onnx.export(network, (images, ), str(unfinished), input_names=['images'], output_names=names,
                          dynamic_axes=dynamic, opset_version=OPSET)
        _add_metadata(unfinished, given)
        trials = [images, images[:1]]
        if 2 in free:  # another size, which the network takes too
            trials.append(torch.cat([images, images], 3))
        worst = max(_difference(unfinished, network, trial, names) for trial in trials)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return dict(input=given, outputs=names, largest_difference=worst)


class _Classifier(nn.Module):
    """From images to scores."""

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        self.network = RawOutputs(model)
        self.one_class = isinstance(model.head, ClsHead)

    def forward(self, images: Tensor) -> Tensor:
        logits, = self.network(images)
        return (logits.softmax(1) if self.one_class else logits.sigmoid(), )


def _network(model: BaseModel) -> nn.Module:
    if isinstance(model, ImageClassifier) and isinstance(model.head, (ClsHead, MultiLabelClsHead)):
        return _Classifier(model).eval()
    if isinstance(model, SingleStageDetector):
        return RawOutputs(model).eval()
    raise ValueError(
        f'--onnx: {type(model).__name__} is neither a classifier nor a detector of one stage. A second stage runs on '
        'what NMS leaves of the first, so there are no raw outputs of the network alone; MMDeploy exports such '
        'detectors whole, from the exported student and its config')


def _output_names(model: BaseModel, outputs: tuple | Tensor) -> list[str]:
    if isinstance(model, ImageClassifier):
        return ['scores']
    kinds = list(inspect.signature(model.bbox_head.loss_by_feat).parameters)
    return [f'{kind}_{level}' for kind, levels in zip(kinds, outputs) for level in range(len(levels))]


def _input(model: BaseModel, batch: dict, images: Tensor, free: list[int]) -> dict:
    preprocessor = model.data_preprocessor
    mean, std = (values.flatten().tolist() for values in pixel_statistics(preprocessor))
    # MMCV reads files as BGR; data sets that hold their images in memory have them in RGB.
    from_file = batch['data_samples'][0].metainfo.get('img_path')
    rgb = reverses_channels(preprocessor) or not from_file
    shape = [letter if axis in free else length for axis, (letter, length) in enumerate(zip('NCHW', images.shape))]
    given = dict(name='images', shape=shape, dtype='float32',
                 channels='grey' if images.shape[1] == 1 else 'RGB' if rgb else 'BGR',
                 normalise='(pixel - mean) / std, pixels from 0 to 255', mean=mean, std=std)
    if 2 in free:
        # RTMDet's pipeline pads to 640 x 640, so that its preprocessor asks for nothing; the network does.
        given['sides_multiple_of'] = max(_STRIDE, int(getattr(preprocessor, 'pad_size_divisor', 1)))
        given['padding'] = ('right and below; with 0 after normalising, or before it with what the pad_val of the test '
                            'pipeline says')
    return given


def _add_metadata(path: Path, given: dict) -> None:
    import onnx
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, {key: str(value) for key, value in given.items()})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _difference(path: Path, network: nn.Module, images: Tensor, names: list[str]) -> float:
    import onnxruntime
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    found = session.run(names, dict(images=images.numpy()))
    with torch.no_grad():
        expected = [output.numpy() for output in network(images)]
    worst = 0.
    for name, one, other in zip(names, found, expected, strict=True):
        difference = float(np.abs(one - other).max() / max(np.abs(other).max(), 1e-6)) if (
            one.shape == other.shape) else float('inf')
        if not difference <= TOLERANCE:
            raise ValueError(f'--onnx: for images of {tuple(images.shape)}, {name} of ONNX Runtime differs from '
                             f'PyTorch\'s by {difference:.1e} of the largest value, {TOLERANCE:g} is allowed; nothing '
                             'is written')
        worst = max(worst, difference)
    return worst
