"""Counts per image over a sweep of thresholds, and the scores made of them.

Takes mask logits and masks at the mask's own size; gives whole numbers (tp, fp, fn), then Dice, IoU, recall and
precision in fp64. Images may be counted on any rank: integers are summed, so the scores do not depend on who counted.
Knows nothing of ranks, files or the model.

Shapes: T thresholds, N images, 3 = (tp, fp, fn). A pixel is predicted where probability > threshold, taken as
logit > fp32(log(t / (1 - t))), which needs no sigmoid and is exactly logit > 0 at 0.5.
"""

import math

import torch
from torch import Tensor

THRESHOLDS = tuple(percent / 100 for percent in range(2, 99))  # 50 / 100 is exactly 0.5
"""The probabilities swept for dice_best: every 0.01, as the best one for thin vessels often lies far from 0.5."""


def thresholds(threshold: float = 0.5) -> tuple[float, ...]:
    """The sweep with one more threshold in it, ascending: T entries, T = 97 or 98.

    Args:
        threshold: probability, above 0 and below 1.

    Raises:
        ValueError: threshold is outside that range.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold {threshold} must be above 0 and below 1")
    return tuple(sorted({*THRESHOLDS, threshold}))


def counts(logits_HW: Tensor, masks_HW: Tensor, threshold: float = 0.5) -> Tensor:
    """Count true positives, false positives and false negatives at every threshold of the sweep.

    Args:
        logits_HW: mask logits, (H, W), or any dimensions before them: (B, H, W).
        masks_HW: 0/1 or bool, the same shape.
        threshold: one that the sweep must hold.

    Returns:
        int64 (T, 3), or (B, T, 3), on the device of the logits.

    Raises:
        ValueError: the shapes differ, or a logit is NaN (which would count as a vessel).
    """
    if logits_HW.shape != masks_HW.shape:
        raise ValueError(f"logits {tuple(logits_HW.shape)} and masks {tuple(masks_HW.shape)} must have one shape")
    if logits_HW.isnan().any():
        raise ValueError("NaN among the mask logits: the model has diverged")
    edges_T = torch.tensor([math.log(t / (1 - t)) for t in thresholds(threshold)], device=logits_HW.device)
    passed_HW = torch.bucketize(logits_HW.float(), edges_T, out_int32=True)  # thresholds the pixel exceeds, 0 to T
    batch, bins = logits_HW.shape[:-2], len(edges_T) + 1
    image_B11 = torch.arange(batch.numel(), dtype=torch.int32, device=logits_HW.device).view(*batch, 1, 1)
    cell_HW = (2 * image_B11 + masks_HW.int()) * bins + passed_HW  # one cell per image, class and number of thresholds
    histogram = torch.bincount(cell_HW.flatten(), minlength=2 * batch.numel() * bins).view(*batch, 2, bins)
    predicted = histogram.flip(-1).cumsum(-1).flip(-1)[..., 1:]  # background and vessel pixels above each threshold
    false_positives, true_positives = predicted.unbind(-2)
    false_negatives = histogram[..., 1, :].sum(-1, keepdim=True) - true_positives
    return torch.stack((true_positives, false_positives, false_negatives), -1)


def dice(counts_3: Tensor) -> Tensor:
    """Dice, 2 tp / (2 tp + fp + fn); 1 where mask and prediction are both empty.

    Args:
        counts_3: (..., 3) whole numbers tp, fp, fn.

    Returns:
        fp64 (...), in [0, 1].
    """
    tp, fp, fn = counts_3.double().unbind(-1)
    return _ratio(2 * tp, 2 * tp + fp + fn, fp + fn)


def iou(counts_3: Tensor) -> Tensor:
    """Intersection over union, tp / (tp + fp + fn); 1 where mask and prediction are both empty."""
    tp, fp, fn = counts_3.double().unbind(-1)
    return _ratio(tp, tp + fp + fn, fp + fn)


def recall(counts_3: Tensor) -> Tensor:
    """The share of the mask that is found, tp / (tp + fn). An empty mask: 1 if nothing is predicted, else 0."""
    tp, fp, fn = counts_3.double().unbind(-1)
    return _ratio(tp, tp + fn, fp + fn)


def precision(counts_3: Tensor) -> Tensor:
    """The share of the prediction that is true, tp / (tp + fp). An empty prediction: 1 if the mask is empty, else 0."""
    tp, fp, fn = counts_3.double().unbind(-1)
    return _ratio(tp, tp + fp, fp + fn)


def summarize(counts_NT3: Tensor, threshold: float = 0.5) -> dict:
    """Scores of a validation set: means over images, every image with the same weight.

    Equal to the last bit for the same counts, in whatever order the images stand and on any machine. A row of zeros
    reads as an image with an empty mask and an empty prediction: the caller makes sure that every row was filled.

    Args:
        counts_NT3: what `counts` gave for N images, with the same threshold.
        threshold: the one that dice, iou, recall, precision and dice_per_image are taken at.

    Returns:
        "dice", "iou", "recall", "precision" at the threshold; "dice_best" and "threshold_best", the largest mean Dice
        over the sweep and where it stands (of equal ones the nearest to 0.5); "dice_per_image", N numbers.

    Raises:
        ValueError: no image, or T is not the length of the sweep.
    """
    sweep = thresholds(threshold)
    if counts_NT3.ndim != 3 or len(counts_NT3) == 0 or counts_NT3.shape[1:] != (len(sweep), 3):
        raise ValueError(f"counts {tuple(counts_NT3.shape)} must be (images, {len(sweep)}, 3) with at least one image")
    at_threshold_N3 = counts_NT3[:, sweep.index(threshold)]
    dice_T = [_mean(column) for column in dice(counts_NT3).T]
    best = max(range(len(sweep)), key=lambda index: (dice_T[index], -abs(sweep[index] - 0.5)))
    return {
        "dice": _mean(dice(at_threshold_N3)),
        "iou": _mean(iou(at_threshold_N3)),
        "recall": _mean(recall(at_threshold_N3)),
        "precision": _mean(precision(at_threshold_N3)),
        "dice_best": dice_T[best],
        "threshold_best": sweep[best],
        "dice_per_image": dice(at_threshold_N3).tolist(),
    }


def _ratio(numerator: Tensor, denominator: Tensor, errors: Tensor) -> Tensor:
    """numerator / denominator; where that is 0/0, 1 if there is no error and 0 otherwise."""
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1), (errors == 0).double())


def _mean(values_N: Tensor) -> float:
    # fsum rounds once, so the order of the images and the number of threads cannot show; Tensor.mean promises neither.
    return math.fsum(values_N.tolist()) / len(values_N)
