"""An exported graph with the interface of a model, for evaluation with MMDetection and MMPretrain."""
from pathlib import Path

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn


class OnnxModel(nn.Module):
    """Runs a file of :func:`export_onnx` with ONNX Runtime on the CPU, on batches of a data loader.

    Args:
        path: path of the file.
        threads: number of threads; 0 lets ONNX Runtime choose.
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        super().__init__()
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        self.names = [entry.name for entry in self.session.get_inputs()]

    @staticmethod
    def inputs_of(batch: dict) -> tuple[Tensor, Tensor]:
        """Returns ``images`` (N, C, H, W), RGB or grey and padded to one size, and ``image_sizes`` (N, 2)."""
        sizes = torch.tensor([image.shape[1:] for image in batch['inputs']])
        height, width = sizes.amax(0).tolist()
        images = torch.stack([nn.functional.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))
                              for image in batch['inputs']])
        if images.shape[1] == 3 and read_from_files(batch):
            images = images.flip(1)
        return images, sizes

    def feeds(self, batch: dict) -> dict[str, np.ndarray]:
        """Returns the inputs of the session."""
        return {name: x.numpy() for name, x in zip(self.names, self.inputs_of(batch))}

    def run(self, batch: dict) -> list[np.ndarray]:
        return self.session.run(None, self.feeds(batch))

    def test_step(self, batch: dict) -> list:
        """Returns the data samples with the predictions of the graph; boxes are in pixels of the original images."""
        outputs = [torch.from_numpy(x) for x in self.run(batch)]
        samples = batch['data_samples']
        if not isinstance(samples[0], DetDataSample):
            return [sample.set_pred_score(score).set_pred_label(score.argmax())
                    for sample, score in zip(samples, outputs[0])]
        for sample, boxes, scores, labels in zip(samples, *outputs):
            there = labels >= 0
            factor = boxes.new_tensor(sample.metainfo.get('scale_factor', (1., 1.))).repeat(2)
            sample.pred_instances = InstanceData(bboxes=boxes[there] / factor, scores=scores[there],
                                                 labels=labels[there])
        return samples

    val_step = test_step


def read_from_files(batch: dict) -> bool:
    """Whether the images of a batch come from files. MMCV reads files as BGR; images in memory are RGB."""
    return bool(batch['data_samples'][0].metainfo.get('img_path'))
