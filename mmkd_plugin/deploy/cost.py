"""What models cost: parameters, FLOPs, and how long one image takes."""
import statistics
import time

import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

ROUNDS, SECONDS = 40, 10  # of the timing: at most so many, no new one after so long


class RawOutputs(nn.Module):
    """A model's forward without loss and post-processing, from images (N, C, H, W) to a tuple of tensors.

    Args:
        model: of MMDetection or MMPretrain.
        data_samples: what a detector of two stages must know of the images.
    """

    def __init__(self, model: BaseModel, data_samples: list | None = None) -> None:
        super().__init__()
        self.model = model
        self.data_samples = data_samples

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images, self.data_samples, mode='tensor')
        return tuple(x for x in tree_flatten(outputs)[0] if isinstance(x, Tensor))


@torch.no_grad()
def measure(models: dict[str, tuple[BaseModel, dict]]) -> dict[str, dict[str, float]]:
    """Returns ``params``, ``flops`` and ``latency_ms`` of each model.

    FLOPs are MMEngine's, a multiplication with its addition for one. Latency is the median over up to 40 rounds of one
    call, without post-processing; the models take turns, so that the machine's moods meet all alike.

    Args:
        models: by name, a model in eval mode and what its preprocessor made of one image, ``inputs`` (1, C, H, W)
            and, where the model wants it, ``data_samples``.
    """
    networks = {name: (RawOutputs(model, data.get('data_samples')).eval(), data['inputs'])
                for name, (model, data) in models.items()}
    found = {name: dict(params=sum(parameter.numel() for parameter in network.parameters()),
                        flops=_flops(network, images))
             for name, (network, images) in networks.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    began = time.perf_counter()
    for index in range(ROUNDS):
        if index >= 3 and time.perf_counter() - began > SECONDS:
            break
        for name, (network, images) in networks.items():
            start = time.perf_counter()
            network(images)
            times[name].append(1e3 * (time.perf_counter() - start))
    for name, result in found.items():
        result['latency_ms'] = round(statistics.median(times[name]), 2)
    return found


def _flops(network: nn.Module, images: Tensor) -> int:
    analyzer = FlopAnalyzer(network, (images, ))
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings('none')
    return int(analyzer.total())
