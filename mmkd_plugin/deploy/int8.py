"""An exported graph in eight bits, by ONNX Runtime's static quantisation, and what that costs."""
import copy
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from .evaluation import headline
from .files import finished, refuse_existing
from .onnx_model import OnnxModel

LAYERS = ('Conv', 'Gemm', 'MatMul')
# What lies between two layers, so that a chain of them needs no float in between
_BETWEEN = ('Add', 'Clip', 'Concat', 'GlobalAveragePool', 'AveragePool', 'MaxPool', 'Relu', 'Resize')
# How names of its nodes begin; a detector of two stages is traced part by part
_NETWORK = ('/network/', '/backbone/', '/neck/', '/rpn_head/', '/shared_head/', '/bbox_head/')
_WORST = 5  # layers that a refusal names
_TRIED = 2  # batches that the cost of a layer is measured on


def quantize(path: str, out: str, batches: list[dict], evaluate: Callable[[OnnxModel], dict[str, float]],
             accuracy: dict[str, float], max_drop: float = 1.0, overwrite: bool = False) -> dict:
    """Writes the graph of :func:`export_onnx` to ``out`` in eight bits, if its accuracy falls by no more than allowed.

    Convolutions and matrix products of the network get eight bits: weights per channel, signed, of seven bits, because
    processors without VNNI add pairs of products in sixteen bits, which eight would overflow; activations per tensor,
    unsigned, with the smallest and largest value that the batches give. Normalisation, decoding and NMS stay in float.

    Which layers stay in float is measured. The cost of a layer is the change of the network's outputs when it alone is
    in eight bits, :math:`\\lVert y - y_{float} \\rVert / \\lVert y_{float} \\rVert`, mean over outputs. Outputs of a
    second stage do not count for layers of the first, because other proposals are other regions. If the whole
    network loses more than ``max_drop``, the 1, 2, 4, ... most costly layers, up to half of them, stay in float, until
    it does not.

    Args:
        path: of the graph in float.
        out: the file.
        batches: for calibration, as a data loader collates them.
        evaluate: runs the test on a graph; the metric that :func:`headline` takes decides.
        accuracy: what the graph in float has in that test.
        max_drop: in points of 100.
        overwrite: whether ``out`` may exist.

    Returns:
        ``metric``, ``float`` and ``int8`` (accuracies in points), ``drop``, ``layers`` (how many), ``left_in_float``
        and ``costs`` (of the worst layers), ``calibrated_with`` (how many images), ``accuracy`` (all metrics).

    Raises:
        ValueError: the drop is larger even so, the graph has no layers, or ``out`` exists or cannot be written.
    """
    refuse_existing('--int8', out, overwrite)
    with TemporaryDirectory() as folder:
        network = _Network(Path(path), Path(folder), batches)
        metric, start = headline(accuracy)
        costs = network.costs()
        worst = sorted(costs, key=costs.get, reverse=True)
        named = {layer: round(costs[layer], 4) for layer in worst[:_WORST]}
        trials = []
        for count in _doubling(len(worst) // 2):
            file = network.write(Path(folder) / 'int8.onnx', exclude=worst[:count])
            after = evaluate(OnnxModel(file))
            trials.append((count, headline(after)[1]))
            if start - trials[-1][1] <= max_drop:
                break
        else:
            best = max(accuracy for _, accuracy in trials)
            raise ValueError(
                f'--int8: {metric} falls from {start:.2f} to {best:.2f}, even with {trials[-1][0]} of {len(worst)} '
                f'layers in float, and --max-drop allows {max_drop:g} points; nothing is written. The layers that '
                'cost most: ' + ', '.join(f'{name} ({cost:.1%})' for name, cost in named.items()))
        with finished('--int8', out, overwrite) as unfinished:
            unfinished.write_bytes(file.read_bytes())
    return dict(metric=metric, float=start, int8=trials[-1][1], drop=start - trials[-1][1], layers=len(worst),
                left_in_float=worst[:trials[-1][0]], costs=named, accuracy=after,
                calibrated_with=sum(len(batch['inputs']) for batch in batches))


def _doubling(most: int) -> Iterable[int]:
    count = 0
    while count <= most:
        yield count
        count = max(1, 2 * count)


class _Network:
    """A graph with the ranges of its tensors, which are measured once."""

    def __init__(self, path: Path, folder: Path, batches: list[dict]) -> None:
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, create_calibrator
        from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

        class Reader(CalibrationDataReader):
            def __init__(self, feeds: Iterable[dict]) -> None:
                self.feeds = iter(feeds)

            def get_next(self) -> dict | None:
                return next(self.feeds, None)

        self.folder, self.batches = folder, batches[:_TRIED]
        self.model = load_model_with_shape_infer(path)
        self.nodes = nodes = [node for node in self.model.graph.node if node.name.startswith(_NETWORK)]
        weights = {entry.name for entry in self.model.graph.initializer}
        self.layers = [node.name for node in nodes if node.op_type in LAYERS and node.input[1] in weights]
        if not self.layers:
            raise ValueError(f'--int8: {str(path)!r} has no layer with weights that is named as --onnx names it; '
                             'export it with --onnx of this version')
        self.between = [node.name for node in nodes if node.op_type in _BETWEEN]
        self.outputs = _boundary(self.model)
        # the network's outputs, which the whole graph keeps to itself
        probed = copy.deepcopy(self.model)
        named = {entry.name for entry in probed.graph.output}
        probed.graph.output.extend(entry for entry in self.model.graph.value_info
                                   if entry.name in self.outputs and entry.name not in named)
        self.probed = probed
        onnx.save(self.model, str(folder / 'float.onnx'))
        calibrator = create_calibrator(folder / 'float.onnx', [*LAYERS, *_BETWEEN],
                                       augmented_model_path=str(folder / 'augmented.onnx'))
        model = OnnxModel(path)
        calibrator.collect_data(Reader(model.feeds(batch) for batch in batches))
        self.ranges = calibrator.compute_data()

    def costs(self) -> dict[str, float]:
        """Returns, by layer, the relative change of the network's outputs when it alone is in eight bits."""
        expected = self._outputs(self.probed)
        return {layer: _change(self._outputs(self._quantized(self.probed, [layer])), expected, self._behind(layer))
                for layer in self.layers}

    def _behind(self, layer: str) -> list[bool]:
        """Returns which outputs depend on a layer, by way of the network alone."""
        tensors: set[str] = set()
        for node in self.nodes:  # in the order in which they are computed
            if node.name == layer or tensors.intersection(node.input):
                tensors.update(node.output)
        return [name in tensors for name in self.outputs]

    def write(self, out: Path, exclude: list[str]) -> Path:
        import onnx
        layers = [layer for layer in self.layers if layer not in exclude]
        onnx.save(self._quantized(self.model, [*layers, *self.between]), str(out))
        return out

    def _quantized(self, model, nodes: list[str]):
        from onnxruntime.quantization import QDQQuantizer, QuantType
        level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)  # it warns of every layer whose bias is small
        try:
            quantizer = QDQQuantizer(copy.deepcopy(model), True, True, QuantType.QInt8, QuantType.QUInt8, self.ranges,
                                     nodes, [], [*LAYERS, *_BETWEEN], {})
            quantizer.quantize_model()
        finally:
            logging.getLogger().setLevel(level)
        return quantizer.model.model

    def _outputs(self, model) -> list[list[np.ndarray]]:
        import onnx
        file = self.folder / 'probe.onnx'
        onnx.save(model, str(file))
        runtime = OnnxModel(file)
        return [runtime.session.run(self.outputs, runtime.feeds(batch)) for batch in self.batches]


def _boundary(model) -> list[str]:
    """Returns the tensors that leave the network: outputs of the graph, or read by what is not named after it."""
    inside = {output for node in model.graph.node if node.name.startswith(_NETWORK) for output in node.output}
    read = {name for node in model.graph.node if not node.name.startswith(_NETWORK) for name in node.input}
    read |= {entry.name for entry in model.graph.output}
    floats = {entry.name for entry in [*model.graph.value_info, *model.graph.output]
              if entry.type.tensor_type.elem_type == 1}
    return sorted(inside & read & floats)


def _change(found: list[list[np.ndarray]], expected: list[list[np.ndarray]], counts: list[bool]) -> float:
    return float(np.mean([np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-12) if count else 0
                          for ones, others in zip(found, expected)
                          for one, other, count in zip(ones, others, counts)]))
