"""Cost of models: parameters, FLOPs and latency of one image."""
import statistics
import time
from collections.abc import Callable

import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

ROUNDS, SECONDS = 40, 10  # most rounds of timing; no new round starts after so many seconds


class RawOutputs(nn.Module):
    """A model's forward pass without loss and post-processing, from images (N, C, H, W) to a tuple of tensors.

    Args:
        model: a model of MMDetection or MMPretrain.
        data_samples: those of the images; two-stage detectors need them.
    """

    def __init__(self, model: BaseModel, data_samples: list | None = None) -> None:
        super().__init__()
        self.model = model
        self.data_samples = data_samples

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images, self.data_samples, mode='tensor')
        return tuple(x for x in tree_flatten(outputs)[0] if isinstance(x, Tensor))


def measure(models: dict[str, tuple[BaseModel, dict]]) -> dict[str, dict[str, float]]:
    """Returns ``params``, ``flops``, ``latency_ms`` and ``latency_p95_ms`` of each model, without post-processing.

    Args:
        models: by name, a model in eval mode and one preprocessed image: ``inputs`` (1, C, H, W) and, if the model
            needs them, ``data_samples``.
    """
    networks = {name: (RawOutputs(model, data.get('data_samples')).eval(), data['inputs'])
                for name, (model, data) in models.items()}
    times = latency({name: lambda network=network, images=images: network(images)
                     for name, (network, images) in networks.items()})
    return {name: dict(size(model, data), **times[name]) for name, (model, data) in models.items()}


@torch.no_grad()
def size(model: BaseModel, data: dict) -> dict[str, int]:
    """Returns ``params`` and ``flops`` as MMEngine counts them: a multiply-add is one FLOP."""
    network = RawOutputs(model, data.get('data_samples')).eval()
    analyzer = FlopAnalyzer(network, (data['inputs'], ))
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings('none')
    return dict(params=sum(parameter.numel() for parameter in network.parameters()), flops=int(analyzer.total()))


@torch.no_grad()
def latency(calls: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Returns ``latency_ms``, the median, and ``latency_p95_ms``, the 95th percentile, of each call.

    The calls take turns, so that other load on the machine affects all alike. The first call of each does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    began = time.perf_counter()
    for index in range(ROUNDS):
        if index >= 3 and time.perf_counter() - began > SECONDS:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: dict(latency_ms=round(statistics.median(found), 2),
                       latency_p95_ms=round(statistics.quantiles(found, n=20, method='inclusive')[-1], 2))
            for name, found in times.items()}
