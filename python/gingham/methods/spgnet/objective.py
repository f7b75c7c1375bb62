"""The loss of SPGNet: cross-entropy on the prediction of every stage.

Paper: Cheng et al., SPGNet: Semantic Prediction Guidance for Scene Parsing, https://arxiv.org/abs/1908.09798.
Pure functions on tensors; K classes, labels int64, ignored pixels carry `ignore_index`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gingham.nn.segmentation_loss import HardPixels, check_labels, cross_entropy, hard_pixel_labels, upsample_logits


def stage_supervision(
    stages: Sequence[Tensor],
    labels: Tensor,
    *,
    weights: Sequence[float] | None = None,
    soft: Tensor | None = None,
    hard_pixels: HardPixels | None = None,
    ignore_index: int = 255,
    align_corners: bool = True,
) -> Tensor:
    """Weighted sum of the cross-entropies of every stage's upsampled logits.

    The classifier of a stage of weight 0 learns only what a gate passes back to it.

    Args:
        stages: logits [B, K, h, w] of each stage, the last one last.
        labels: [B, H, W].
        weights: one for each stage, 0 or more; 1 for each by default.
        soft: [B, K, H, W], probabilities to learn in place of `labels`, see `cross_entropy`.
        hard_pixels: None, or the selection of pixels that count in the last stage (the others count all).
        ignore_index: label of ignored pixels.
        align_corners: of the upsampling.

    Returns:
        Scalar, 0 with a gradient of 0 where all pixels are ignored.

    Raises:
        ValueError: not one weight for each stage, or none above 0.
        DataError: a label is neither a class nor `ignore_index`, or the shapes do not fit.

    Source: SPGNet, "supervise-and-excite". That every stage's prediction has a loss is inferred from it; the weights
    are not confirmed.

    Example:
        >>> stages = [torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 3, 3)]
        >>> stage_supervision(stages, torch.zeros(1, 9, 9, dtype=torch.int64), weights=(0.5, 1.0))
        tensor(2.0794)
    """
    weights = [1.0] * len(stages) if weights is None else weights
    check_stage_weights(weights, len(stages))
    size = labels.shape[-2:]
    losses = []
    for number, (logits, weight) in enumerate(zip(stages, weights, strict=True), start=1):
        check_labels(logits, labels, ignore_index)
        if weight == 0:
            losses.append(logits[:0].sum())  # 0 whatever the logits are, with a gradient of 0 to them
            continue
        upsampled = upsample_logits(logits, size, align_corners=align_corners)
        counted = labels
        if hard_pixels is not None and number == len(stages):
            counted = hard_pixel_labels(upsampled, labels, hard_pixels, ignore_index=ignore_index)
        losses.append(weight * cross_entropy(upsampled, counted, soft=soft, ignore_index=ignore_index))
    return torch.stack(losses).sum()


def check_stage_weights(weights: Sequence[float], stages: int) -> None:
    """Raise where weights of losses do not fit a number of stages.

    Args:
        weights: one for each stage, 0 or more.
        stages: S.

    Raises:
        ValueError: not one weight for each stage, one that is negative or not finite, or none above 0.

    Example:
        >>> check_stage_weights((0.4, 1.0), stages=2)
    """
    if len(weights) != stages:
        raise ValueError(f"weights must be one for each of {stages} stages, got {tuple(weights)}")
    if not torch.tensor(weights).isfinite().all() or min(weights) < 0 or max(weights) == 0:
        raise ValueError(f"weights must be 0 or more and not all 0, got {tuple(weights)}")
