"""Quantisation of an exported graph to eight bits with ONNX Runtime."""
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
# Operations between two layers. In eight bits, a chain of layers needs no conversion to float
_BETWEEN = ('Add', 'Clip', 'Concat', 'GlobalAveragePool', 'AveragePool', 'MaxPool', 'Relu', 'Resize')
# Prefixes of the network's node names. A two-stage detector is traced part by part
_NETWORK = ('/network/', '/backbone/', '/neck/', '/rpn_head/', '/shared_head/', '/bbox_head/')
_WORST = 5  # layers in the error message
_TRIED = 2  # batches to measure the cost of a layer on


def quantize(path: str, out: str, batches: list[dict], evaluate: Callable[[OnnxModel], dict[str, float]],
             accuracy: dict[str, float], max_drop: float = 1.0, overwrite: bool = False) -> dict:
    """Quantises the graph of :func:`export_onnx` to eight bits and writes it if the accuracy drops by at most
    ``max_drop``.

    Convolutions and matrix products of the network are quantised. Weights are signed, per channel, and use seven bits:
    processors without VNNI add pairs of products in sixteen bits, which would overflow with eight. Activations are
    unsigned, per tensor, with the smallest and largest value on the batches. Normalisation, decoding and NMS stay in
    float.

    Convolutions with the same weights, as those of a head on several levels, are one layer, named as the first of them.
    The most costly layers can stay in float. The cost of a layer is the change of the network's outputs when only this
    layer is quantised, :math:`\\lVert y - y_{float} \\rVert / \\lVert y_{float} \\rVert`, averaged over outputs. For a
    layer of the first stage, outputs of the second stage do not count, because other proposals are other regions. If
    the network drops by more than ``max_drop``, its 1, 2, 4, ... most costly layers, up to half of them, stay in float
    until the drop is small enough.

    Args:
        path: file of the graph in float.
        out: the file to write.
        batches: batches of a data loader, for calibration.
        evaluate: evaluates a graph on the test set; :func:`headline` selects the metric that is compared.
        accuracy: metrics of the graph in float.
        max_drop: largest drop, in points of 100.
        overwrite: whether ``out`` may exist.

    Returns:
        ``metric``, ``float`` and ``int8`` (accuracies in points), ``drop``, ``layers`` (their number),
        ``left_in_float`` and ``costs`` (of the most costly layers), ``calibrated_with`` (number of images),
        ``accuracy`` (all metrics).

    Raises:
        ValueError: the drop is still larger, the graph has no layers, or ``out`` exists or cannot be written.
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
                f'layers in float. --max-drop allows {max_drop:g} points. No file was written. The most costly layers: '
                + ', '.join(f'{name} ({cost:.1%})' for name, cost in named.items()))
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
    """A graph and the ranges of its tensors."""

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
        shared: dict[str, list[str]] = {}  # nodes by their weight
        for node in nodes:
            if node.op_type in LAYERS and node.input[1] in weights:
                shared.setdefault(node.input[1], []).append(node.name)
        self.layers = {names[0]: names for names in shared.values()}
        if not self.layers:
            raise ValueError(f'--int8: {str(path)!r} has no layer with weights under the names that --onnx writes. '
                             'Export it with --onnx of this version')
        self.between = [node.name for node in nodes if node.op_type in _BETWEEN]
        self.outputs = _boundary(self.model)
        # the network's outputs, which are not outputs of the whole graph
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
        """Returns, by layer, the relative change of the network's outputs when only this layer is quantised."""
        expected = self._outputs(self.probed)
        return {layer: _change(self._outputs(self._quantized(self.probed, names)), expected, self._behind(names))
                for layer, names in self.layers.items()}

    def _behind(self, layers: list[str]) -> list[bool]:
        """Returns which outputs depend on some layers, through the network alone."""
        tensors: set[str] = set()
        for node in self.nodes:  # in the order of computation
            if node.name in layers or tensors.intersection(node.input):
                tensors.update(node.output)
        return [name in tensors for name in self.outputs]

    def write(self, out: Path, exclude: list[str]) -> Path:
        import onnx
        layers = [name for layer, names in self.layers.items() if layer not in exclude for name in names]
        onnx.save(self._quantized(self.model, [*layers, *self.between]), str(out))
        return out

    def _quantized(self, model, nodes: list[str]):
        from onnxruntime.quantization import QDQQuantizer, QuantType
        level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)  # ONNX Runtime warns of every layer with a small bias
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
    """Returns the outputs of the network: outputs of the graph, or inputs of operations outside the network."""
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
