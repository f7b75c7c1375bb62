"""Labels of unlabelled images by their likeness to labelled ones, and the losses that train on them.

Paper: Fu et al., One Shot Domain Adaptation for Person Re-Identification, https://arxiv.org/abs/1811.10144v1. Pure
functions on tensors; formulas are those of the authors' later code where nothing else is said. Clusters are in
`mining.py`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gingham.methods.oneshot_reid.network import EmbeddingOutput
from gingham.nn.segmentation_loss import widened
from gingham.nn.triplet_loss import Mining, triplet_loss, weighted_cross_entropy
from gingham.ops import k_reciprocal_rerank

Likeness = Literal["rerank", "euclidean"]
Selection = Literal["all", "progressive"]
Weighting = Literal["sample", "batch", "none"]


class PseudoLabels(NamedTuple):
    """What is guessed about unlabelled images."""

    persons: Tensor  # [N] int64
    weights: Tensor  # [N], 0 to 1: confidence
    scores: Tensor  # [N], higher is more alike
    exemplars: Tensor  # [N] int64, which labelled image is the most alike


def pseudo_labels(
    unlabelled: Tensor,
    labelled: Tensor,
    persons: Tensor,
    *,
    metric: Likeness = "rerank",
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> PseudoLabels:
    """Give each unlabelled image the person of the labelled image that it is most like, with a confidence.

    With distances R, the confidence of image u at its nearest exemplar j is 1 - R[u, j] / max R[:, j]: the unlabelled
    image that is furthest from an exemplar sets the exemplar's scale.

    Args:
        unlabelled: [N, D], normalised features, finite; those of 16 bits are compared in float32.
        labelled: [M, D], normalised features of the same dtype.
        persons: [M] int64, of the labelled images; several images may be of one person.
        metric: "rerank", the re-ranked distance among all N + M images; or "euclidean".
        k1: of re-ranking, see `gingham.ops.k_reciprocal_rerank`; as many as there are where that is less.
        k2: of re-ranking.
        lambda_value: of re-ranking.

    Returns:
        `PseudoLabels`; of labelled images at the same distance, the first.

    Raises:
        ValueError: no labelled image, an unknown metric, features that are NaN or infinite, or shapes or dtypes that do
            not fit.

    Source: the authors' later code; that the paper's confidence is this one is not confirmed.

    Example:
        >>> found = pseudo_labels(
        ...     torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1]]),
        ...     torch.tensor([[1.0, 0], [0, 1]]),
        ...     torch.tensor([7, 3]),
        ...     metric="euclidean",
        ... )
        >>> found.persons.tolist(), found.weights
        ([7, 3, 3], tensor([1.0000, 0.5528, 1.0000]))
    """
    if len(labelled) == 0 or persons.shape != labelled.shape[:1]:
        raise ValueError(
            f"persons must be [M] for labelled [M, D] with M of at least 1, got {list(persons.shape)} and "
            f"{list(labelled.shape)}"
        )
    check_features(unlabelled=unlabelled, labelled=labelled)
    unlabelled, labelled = widened(unlabelled), widened(labelled)
    if metric == "rerank":
        distances = k_reciprocal_rerank(unlabelled, labelled, k1=k1, k2=k2, lambda_value=lambda_value)
    elif metric == "euclidean":
        distances = torch.cdist(unlabelled, labelled)
    else:
        raise ValueError(f"metric must be 'rerank' or 'euclidean', got {metric!r}")
    distances = distances.clamp_(min=0)  # those of copies may be rounded to less
    if len(unlabelled) == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=persons.device)
        return PseudoLabels(persons[nothing], distances.new_zeros(0), distances.new_zeros(0), nothing)
    exemplars = distances.argmin(dim=1)
    nearest = distances.gather(1, exemplars[:, None])[:, 0]
    scale = distances.amax(dim=0)[exemplars]
    weights = torch.where(scale > 0, 1 - nearest / scale.where(scale > 0, 1), 1)
    return PseudoLabels(persons[exemplars], weights, -nearest, exemplars)


def check_features(**features: Tensor) -> None:
    """Raise a ValueError that names the first of two groups of features that are not to be compared.

    Args:
        features: two by their names, each [n, D] and finite, of one D and one floating dtype.

    Raises:
        ValueError: they are not.

    Example:
        >>> check_features(one=torch.zeros(2, 3), other=torch.zeros(0, 3))
    """
    (_, first), _ = features.items()
    for name, x in features.items():
        if x.dim() != 2 or not x.is_floating_point() or x.shape[1:] != first.shape[1:] or x.dtype != first.dtype:
            given = " and ".join(f"{other} {list(y.shape)} {y.dtype}" for other, y in features.items())
            raise ValueError(f"{name} must be [n, D] with D and a floating dtype in common, got {given}")
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")


def select(scores: Tensor, iteration: int, iterations: int, selection: Selection = "all") -> Tensor:
    """Which unlabelled images take part in an iteration.

    Args:
        scores: [N], of `PseudoLabels`.
        iteration: 0 for the first.
        iterations: how many there are.
        selection: "all"; or "progressive": (iteration + 1) floor(N / iterations) images, those with the highest scores
            (of equal ones the first), and all in the last iteration.

    Returns:
        [N] bool.

    Raises:
        ValueError: an iteration that does not exist, or an unknown selection.

    Source: the authors' later code has both; in its last iteration up to `iterations` - 1 images are left out. Which of
    the two the paper has is not confirmed.

    Example:
        >>> scores = torch.tensor([0.1, 0.5, 0.4, 0.2, 0.3])
        >>> [select(scores, iteration, 2, "progressive").long().tolist() for iteration in (0, 1)]
        [[0, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    """
    if not 0 <= iteration < iterations:
        raise ValueError(f"iteration must be 0 to iterations - 1, got {iteration} of {iterations}")
    if selection not in ("all", "progressive"):
        raise ValueError(f"selection must be 'all' or 'progressive', got {selection!r}")
    count = len(scores)
    if selection == "progressive" and iteration < iterations - 1:
        count = (iteration + 1) * (count // iterations)
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    chosen[scores.argsort(descending=True, stable=True)[:count]] = True
    return chosen


def embedding_loss(
    output: EmbeddingOutput,
    persons: Tensor,
    weights: Tensor | None = None,
    *,
    part_persons: Tensor | None = None,
    margin: float | Literal["soft"] = 0.5,
    mining: Mining = "semi",
    weighting: Weighting = "sample",
) -> Tensor:
    """The triplet losses of both outputs of the network and of its parts, their sum.

    Args:
        output: of B images.
        persons: [B] int64; for mining "semi" in runs of as many images each.
        weights: [B], 0 to 1, confidences of the persons; None for 1. They get no gradient.
        part_persons: [B, P] int64, whom each part shows, where that is known of parts alone; a part whose persons make
            no triplet in this batch adds nothing. None for `persons`.
        margin: see `gingham.nn.triplet_loss.triplet_loss`.
        mining: "hard" or "semi", see there.
        weighting: "sample", each triplet counts as its anchor's weight; "batch", all as the batch's mean weight;
            "none", the weights are not used.

    Returns:
        Scalar.

    Raises:
        ValueError: an unknown weighting, `part_persons` that do not fit, or what `triplet_loss` refuses.

    Source: the authors' later code, whose weights act on whole batches only ("batch"); "sample" is what the paper's
    abstract says, its formula is not confirmed.

    Example:
        >>> places = torch.tensor([[0.0, 0], [1, 0], [0, 2], [3, 0], [3, 1], [4, 0]])
        >>> embedding_loss(EmbeddingOutput(places, places), torch.tensor([0, 0, 0, 1, 1, 1]))
        tensor(0.2454)
    """
    if weighting not in ("sample", "batch", "none"):
        raise ValueError(f"weighting must be 'sample', 'batch' or 'none', got {weighting!r}")
    options: dict[str, Any] = {"margin": margin, "mining": mining}
    if weights is not None and weighting != "none":
        options |= {"weights": weights, "weighting": weighting}
    loss = triplet_loss(output.pooled, persons, **options) + triplet_loss(output.embedding, persons, **options)
    if output.parts is None:
        return loss
    if part_persons is None:
        part_persons = persons[:, None].expand(output.parts.shape[:2])
    elif part_persons.shape != output.parts.shape[:2]:
        raise ValueError(
            f"part_persons must be [B, P] for parts {list(output.parts.shape)}, got {list(part_persons.shape)}"
        )
    for features, shown in zip(output.parts.unbind(1), part_persons.unbind(1), strict=True):
        if _makes_triplets(shown, mining):
            loss = loss + triplet_loss(features, shown, **options)
    return loss


def _makes_triplets(persons: Tensor, mining: Mining) -> bool:
    same = persons[:, None] == persons
    return not bool(same.all()) and (mining == "hard" or bool(same.triu(diagonal=1).any()))


def classification_loss(
    logits: Tensor, persons: Tensor, weights: Tensor | None = None, *, weighting: Weighting = "sample"
) -> Tensor:
    """Cross-entropy of the known persons, weighted as `embedding_loss` is.

    Args:
        logits: [B, K].
        persons: [B] int64, 0 to K - 1.
        weights: [B], 0 to 1; None for 1.
        weighting: see `embedding_loss`.

    Returns:
        Scalar.

    Raises:
        ValueError: an unknown weighting, or shapes that do not fit.

    Source: the authors' later code, where no weights reach it.

    Example:
        >>> logits = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 3]])
        >>> classification_loss(logits, torch.tensor([0, 1, 1]), torch.tensor([1, 0.5, 0.25]))
        tensor(0.4297)
    """
    if weighting not in ("sample", "batch", "none"):
        raise ValueError(f"weighting must be 'sample', 'batch' or 'none', got {weighting!r}")
    if weighting == "none":
        weights = None
    elif weighting == "batch" and weights is not None:
        weights = weights.mean().expand(len(weights))
    return weighted_cross_entropy(logits, persons, weights)
