"""Comparison of the outputs of ONNX Runtime and PyTorch."""
import numpy as np
from mmengine.structures import InstanceData

TENSOR = 1e-3  # allowed difference of raw outputs, as a share of the largest value of each tensor
SCORE = 1e-3  # allowed difference of two scores
PIXELS = 0.1  # allowed difference of two coordinates
UNMATCHED = 0.01  # allowed share of unmatched detections; rounding changes a few with an overlap at NMS's threshold


def compare_tensors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns ``largest_difference``, as a share of the largest value.

    Raises:
        ValueError: the difference is larger than :data:`TENSOR`, or shapes differ.
    """
    worst = 0.
    for name, other in expected.items():
        one = found[name]
        difference = float(np.abs(one - other).max() / max(np.abs(other).max(), 1e-6)) if (
            one.shape == other.shape) else float('inf')
        if not difference <= TENSOR:
            raise ValueError(f'--onnx: {name} {one.shape} of ONNX Runtime differs from PyTorch\'s by {difference:.1e} '
                             f'of the largest value. {TENSOR:g} is allowed. No file was written')
        worst = max(worst, difference)
    return dict(largest_difference=worst)


def compare_detections(found: dict[str, np.ndarray], expected: list[InstanceData]) -> dict[str, float]:
    """Matches the detections of each image that have equal labels and scores and coordinates within the allowed range.

    A detection with a score within :data:`SCORE` of the lowest may be missing, because another one can take its place.

    Args:
        found: ``boxes`` (N, M, 4), ``scores`` and ``labels`` (N, M).
        expected: ``bboxes``, ``scores`` and ``labels`` of each image.

    Returns:
        ``detections``, the number of detections compared; ``unmatched``, the share of those without a match; and
        ``largest_score_difference`` and ``largest_pixel_difference`` of the matches.

    Raises:
        ValueError: more than :data:`UNMATCHED` of the detections have no match.
    """
    total = unmatched = 0
    score = pixels = 0.
    for boxes, scores, labels, other in zip(found['boxes'], found['scores'], found['labels'], expected, strict=True):
        other = other[:len(scores)]  # the graph's limit, if the head has none
        there = labels >= 0
        boxes, scores, labels = boxes[there], scores[there], labels[there]
        by_score = np.abs(scores - other.scores.numpy()[:, None])  # (expected, found)
        by_pixel = np.abs(boxes - other.bboxes.numpy()[:, None]).max(2, initial=0)
        allowed = (labels == other.labels.numpy()[:, None]) & (by_score <= SCORE) & (by_pixel <= PIXELS)
        free = np.ones(len(scores), bool)
        lowest = min([*scores, *other.scores.numpy()], default=0) + SCORE
        missing = 0
        for row in range(len(allowed)):
            partners = np.flatnonzero(allowed[row] & free)
            if not len(partners):
                missing += other.scores[row] > lowest
                continue
            partner = partners[by_pixel[row, partners].argmin()]
            free[partner] = False
            score, pixels = max(score, by_score[row, partner]), max(pixels, by_pixel[row, partner])
        unmatched += int(missing) + int((free & (scores > lowest)).sum())
        total += len(allowed)
    if unmatched > UNMATCHED * max(total, 1):
        raise ValueError(f'--onnx: of {total} detections of PyTorch and those of ONNX Runtime, {unmatched} have no '
                         f'match within {PIXELS:g} pixels and {SCORE:g} in score. 1 in {1 / UNMATCHED:.0f} is allowed. '
                         'No file was written')
    return dict(detections=total, unmatched=unmatched / max(total, 1), largest_score_difference=float(score),
                largest_pixel_difference=float(pixels))
