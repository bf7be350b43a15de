"""Non-maximum suppression of a batch with ONNX's operator."""
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F


def keep_best(boxes: Tensor, scores: Tensor, labels: Tensor, nms: dict, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the best ``limit`` detections that do not overlap a better one with the same label.

    As in mmcv's ``batched_nms``, the boxes of each label are shifted away from those of other labels.

    Args:
        boxes: (N, K, 4).
        scores: (N, K). Candidates with scores <= 0 are ignored.
        labels: (N, K).
        nms: ``iou_threshold`` and ``class_agnostic``.
        limit: largest number of detections.

    Returns:
        ``boxes`` (N, limit, 4), ``scores`` (N, limit), ``labels`` (N, limit), by falling score. After the last
        detection, boxes and scores are 0 and labels are -1.
    """
    apart = boxes
    if not nms.get('class_agnostic', False):
        largest = boxes.masked_fill(scores.unsqueeze(2) <= 0, 0).amax((1, 2))  # (N, ), over positive scores
        apart = boxes + (labels.to(boxes) * (largest + 1)[:, None]).unsqueeze(2)
    chosen = _NonMaxSuppression.apply(apart, scores.unsqueeze(1), limit, nms['iou_threshold'])
    flat = chosen[:, 0] * scores.shape[1] + chosen[:, 2]
    kept = torch.zeros_like(scores).flatten().scatter(0, flat, 1.).reshape(scores.shape)
    scores, order = F.pad(scores * kept, (0, limit)).topk(limit)
    boxes = F.pad(boxes, (0, 0, 0, limit)).gather(1, order.unsqueeze(2).expand(-1, -1, 4))
    labels = F.pad(labels, (0, limit), value=-1).gather(1, order)
    none = scores <= 0
    return boxes.masked_fill(none.unsqueeze(2), 0), scores.masked_fill(none, 0), labels.masked_fill(none, -1)


class _NonMaxSuppression(torch.autograd.Function):
    """ONNX's ``NonMaxSuppression``. mmcv's NMS has no symbolic for it, and torchvision's supports a single image.

    Maps boxes (N, K, 4) and scores (N, 1, K) to indices (chosen, 3) of image, class (0) and box.
    """

    @staticmethod
    def forward(ctx, boxes: Tensor, scores: Tensor, limit: int, iou_threshold: float) -> Tensor:
        found = []
        for image, (one, score) in enumerate(zip(boxes, scores.squeeze(1))):
            there, = (score > 0).nonzero(as_tuple=True)
            index = there[torchvision.ops.nms(one[there], score[there], iou_threshold)[:limit]]
            found.append(torch.stack([torch.full_like(index, image), torch.zeros_like(index), index], 1))
        return torch.cat(found)

    @staticmethod
    def symbolic(g, boxes, scores, limit: int, iou_threshold: float):
        values = [torch.tensor([limit]), torch.tensor([iou_threshold]), torch.tensor([0.])]
        return g.op('NonMaxSuppression', boxes, scores, *(g.op('Constant', value_t=value) for value in values))
