"""What re-identification learns from: triplets of one batch, and cross-entropy with a weight for each sample.

Pure functions on tensors; B features of dimension D with the number of the person that each is of.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.nn.segmentation_loss import widened

Mining = Literal["hard", "semi"]
Weighting = Literal["sample", "batch"]

_LEAST_DISTANCE = 1e-6  # no gradient below it, where that of a square root is too large


def triplet_loss(
    features: Tensor,
    persons: Tensor,
    *,
    margin: float | Literal["soft"] = 0.3,
    mining: Mining = "hard",
    weights: Tensor | None = None,
    weighting: Weighting = "sample",
) -> Tensor:
    """How far each person's features are from being nearer to each other, by a margin, than to another person's.

    The distance is Euclidean. With "hard" mining each feature is an anchor, compared with the furthest of its person
    (itself included) and the nearest of another; the loss is the mean over anchors. With "semi" each pair of features
    of a person counts, the first of the two in the batch being the anchor; the loss is the mean over pairs.

    Args:
        features: [B, D], floating; those of 16 bits are computed in float32.
        persons: [B], integers.
        margin: m of max(0, m + positive - negative), 0 or more; "soft" for log(1 + exp(positive - negative)).
        mining: "hard" or "semi".
        weights: [B], 0 or more, constants: how much each anchor counts. All 1 is the same as none.
        weighting: "sample": each term is multiplied by its anchor's weight, and the number that the sum is divided by
            stays. "batch": the loss without weights is multiplied by their mean.

    Returns:
        Scalar, float64 for float64 features and else float32.

    Raises:
        ValueError: a batch with one person, with "semi" mining one in which no person comes twice, or an argument
            outside its range.

    Source: Hermans et al., In Defense of the Triplet Loss, https://arxiv.org/abs/1703.07737, for "hard". "semi" and
        "batch" after the code of Self-similarity Grouping, https://github.com/OasisYang/SSG, with each negative paired
        with its own anchor.

    Example:
        >>> features = torch.tensor([[0.0], [1.0], [3.0], [4.0]])
        >>> triplet_loss(features, torch.tensor([0, 0, 1, 1]), margin=1.5)
        tensor(0.2500)
    """
    _check_options(margin, mining, weighting)
    if features.dim() != 2 or persons.shape != features.shape[:1]:
        raise ValueError(
            f"features must be [B, D] and persons [B], got {list(features.shape)} and {list(persons.shape)}"
        )
    _check_weights(weights, len(persons))
    same = persons[:, None] == persons
    if bool(same.all()):
        raise ValueError(f"persons must be of two or more in a batch, got {len(persons)} features of one")
    features = widened(features)
    # Not by way of a matrix product, which loses the digits of small distances.
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=_LEAST_DISTANCE)
    negatives = distances.masked_fill(same, torch.inf).amin(dim=1)
    if mining == "hard":
        anchors = torch.arange(len(persons), device=persons.device)
        positives = distances.masked_fill(~same, -torch.inf).amax(dim=1)
    else:
        anchors, others = same.triu(diagonal=1).nonzero(as_tuple=True)
        if not len(anchors):
            raise ValueError("persons must come twice in a batch for mining 'semi', got each of them once")
        positives = distances[anchors, others]
    violation = positives - negatives[anchors]
    terms = F.softplus(violation) if margin == "soft" else (violation + margin).clamp(min=0)
    if weights is None:
        return terms.sum() / len(terms)
    constants = weights.detach().to(terms.dtype)
    if weighting == "batch":
        return constants.sum() / len(constants) * (terms.sum() / len(terms))
    return (constants[anchors] * terms).sum() / len(terms)


def weighted_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Mean over the batch of each sample's cross-entropy times its weight; it is not divided by the sum of weights.

    Args:
        logits: [B, C], floating; those of 16 bits are computed in float32.
        labels: [B], 0 to C - 1.
        weights: [B], 0 or more, constants. All 1 is the same as none.
        label_smoothing: share of the target that is spread over all classes, 0 to 1.

    Returns:
        Scalar, float64 for float64 logits and else float32.

    Raises:
        ValueError: shapes that do not fit, an empty batch, or an argument outside its range.

    Example:
        >>> logits = torch.zeros(2, 4)
        >>> weighted_cross_entropy(logits, torch.tensor([0, 3]), torch.tensor([1.0, 0.5]))
        tensor(1.0397)
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"logits must be [B, C] and labels [B] with B >= 1, got {list(logits.shape)} and {list(labels.shape)}"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be 0 to 1, got {label_smoothing}")
    _check_weights(weights, len(labels))
    log_probabilities = widened(logits).log_softmax(dim=1)
    if weights is not None:
        log_probabilities = log_probabilities * weights.detach().to(log_probabilities.dtype)[:, None]
    # The sums of torch's cross-entropy in its order, so that weights of 1 change no bit.
    loss = F.nll_loss(log_probabilities, labels)
    if not label_smoothing:
        return loss
    smooth = -log_probabilities.sum(dim=1).mean()
    return (1 - label_smoothing) * loss + label_smoothing / logits.shape[1] * smooth


def _check_options(margin: float | str, mining: str, weighting: str) -> None:
    if margin != "soft" and (isinstance(margin, str) or not margin >= 0):
        raise ValueError(f"margin must be 0 or more, or 'soft', got {margin!r}")
    if mining not in ("hard", "semi"):
        raise ValueError(f"mining must be 'hard' or 'semi', got {mining!r}")
    if weighting not in ("sample", "batch"):
        raise ValueError(f"weighting must be 'sample' or 'batch', got {weighting!r}")


def _check_weights(weights: Tensor | None, length: int) -> None:
    if weights is not None and weights.shape != (length,):
        raise ValueError(f"weights must be [{length}], got {list(weights.shape)}")
