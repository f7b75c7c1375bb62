"""The losses of PDML: cross-entropy at labelled points, and the distance metric between their features across images.

Paper: Qian et al., Weakly Supervised Scene Parsing with Point-Based Distance Metric Learning,
https://arxiv.org/abs/1811.02233. Confirmed are the point-wise cross-entropy and that features of one class shall be
closer than features of different classes, across images; formulas, margins and weights are not.

Pure functions on tensors; K classes. Points come as a batch [B, N, 3] of class, y, x in pixels of the image, filled up
with class 255, and leave as one pool of M. Every mean is over the points of all processes: its value and, under
DistributedDataParallel, its gradient are those of one process with the whole batch.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gingham.errors import DataError

_SMALLEST_NORM = 1e-12


class PointPool(NamedTuple):
    """The points of a batch as one list."""

    image: Tensor  # [M] int64, the image of the batch that a point is in
    y: Tensor  # [M], rows of the image
    x: Tensor  # [M], columns
    label: Tensor  # [M] int64
    agreed: Tensor  # [M] bool, False where points of different classes share the pixel


class MetricTerms(NamedTuple):
    """A distance metric loss and what to watch beside it, scalars."""

    loss: Tensor
    mean_over_all: Tensor  # the same sum over all triplets or pairs, those that cost nothing included
    active: Tensor  # share of triplets or pairs that cost something; 0 where there are none


# ------------------------------------------------------------------------------------------------------ points


def pool_points(points: Tensor, *, ignore_index: int = 255) -> PointPool:
    """The points of all images as one list, without padding and without repetitions.

    Of points on one pixel that have one class, the first stays. Points on one pixel that differ in class all stay, for
    the metric, and are marked: the cross-entropy leaves them out.

    Args:
        points: [B, N, 3], class, y, x.
        ignore_index: class of the padding.

    Returns:
        The list, image by image.

    Raises:
        DataError: points that are not [B, N, 3].

    Example:
        >>> points = torch.tensor([[[1.0, 5.0, 9.0], [1.0, 5.2, 9.0], [255.0, 0.0, 0.0]], [[1.0, 5.0, 9.0]] * 3])
        >>> pool = pool_points(points)
        >>> pool.image.tolist(), pool.label.tolist()
        ([0, 1], [1, 1])
    """
    if points.dim() != 3 or points.shape[-1] != 3:
        raise DataError(f"points must be [B, N, 3], got {list(points.shape)}")
    valid = points[..., 0] != ignore_index
    image = torch.arange(len(points), device=points.device)[:, None].expand(valid.shape)[valid]
    kept = points[valid]
    label = kept[:, 0].long()
    pixel = torch.stack([image, kept[:, 1].round().long(), kept[:, 2].round().long()], dim=1)
    _, at_pixel = pixel.unique(dim=0, return_inverse=True)
    kinds, kind = torch.stack([at_pixel, label], dim=1).unique(dim=0, return_inverse=True)
    position = torch.arange(len(kept), device=points.device)
    first = position.new_full((len(kinds),), len(kept)).scatter_reduce(0, kind, position, "amin")
    classes_at_pixel = torch.bincount(kinds[:, 0], minlength=1)
    chosen = first.sort().values
    return PointPool(
        image[chosen], kept[chosen, 1], kept[chosen, 2], label[chosen], classes_at_pixel[at_pixel[chosen]] == 1
    )


def point_cross_entropy(logits: Tensor, pool: PointPool, *, average: Literal["points", "images"] = "points") -> Tensor:
    """Cross-entropy at the points, without those on pixels that points of other classes share.

    Args:
        logits: [M, K], read at the points.
        pool: the points.
        average: over all "points", or over each image's points and then over the "images" that have any.

    Returns:
        Scalar, 0 (with a gradient of 0) where there are no points.

    Raises:
        ValueError: an unknown average.
        DataError: a class outside 0 to K - 1.

    Source: that the paper has a point-wise cross-entropy is confirmed, its normalisation is not.

    Example:
        >>> pool = pool_points(torch.tensor([[[0.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 2.0]]]))
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
        >>> round(point_cross_entropy(logits, pool).item(), 6)
        1.295304
    """
    _check_name("average", average, ("points", "images"))
    classes = logits.shape[1]
    if len(wrong := pool.label[(pool.label < 0) | (pool.label >= classes)]):
        raise DataError(f"points contain the class {int(wrong[0])}, which is none of 0 to {classes - 1}")
    each = F.cross_entropy(logits, pool.label, reduction="none") * pool.agreed
    if average == "points":
        return global_mean(each.sum(), pool.agreed.sum())
    images = int(pool.image.max()) + 1 if len(pool.image) else 0
    sums = each.new_zeros(images).index_add(0, pool.image, each)
    counts = each.new_zeros(images).index_add(0, pool.image, pool.agreed.to(each.dtype))
    return global_mean((sums / counts.clamp(min=1)).sum() + each.sum() * 0, (counts > 0).sum())


# ------------------------------------------------------------------------------------------------------ the metric


def triplet_metric(
    features: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.3,
    images: Tensor | None = None,
    memory: tuple[Tensor, Tensor] | None = None,
    normalise: bool = True,
    squared: bool = False,
    mining: Literal["all", "hardest"] = "all",
    average: Literal["active", "all"] = "active",
) -> MetricTerms:
    """Triplets (anchor, positive, negative) cost ``max(0, margin + d(a, p) - d(a, n))``.

    Args:
        features: [M, D], the anchors; all of one process or, see `gather_rows`, of all.
        labels: [M].
        margin: above 0.
        images: None, or the image [M] of each feature: only triplets within one image count, and no memory.
        memory: None, or further features [Q, D] and labels [Q] that are positives and negatives but no anchors.
        normalise: scale the features to length 1, which bounds the distance by 2; else the loss can be lowered by
            shrinking them.
        squared: take the square of the distance.
        mining: "all" triplets, or for each anchor the one of its "hardest", farthest positive and nearest negative.
        average: over the triplets that cost something, or over "all".

    Returns:
        The loss, 0 (with a gradient of 0) where there is no triplet, and what to watch.

    Raises:
        ValueError: margin not above 0, an unknown mining or average, or shapes that do not fit.

    Source: that the paper's condition is relative, and across images, is confirmed; triplets, distance, margin,
        normalisation and averaging are not.

    Example:
        >>> features = torch.tensor([[3.0, 4.0], [6.0, 8.0], [4.0, 3.0], [-3.0, 4.0], [0.0, 2.0]])
        >>> terms = triplet_metric(features, torch.tensor([0, 0, 0, 1, 1]))
        >>> round(terms.loss.item(), 6), round(terms.mean_over_all.item(), 6)
        (0.212676, 0.035446)
    """
    _check_name("mining", mining, ("all", "hardest"))
    _check_name("average", average, ("active", "all"))
    distance, same, different = _pairs(features, labels, margin, images, memory, normalise)
    if squared:
        distance = distance.square()
    if mining == "hardest" and distance.numel():  # no anchor has no farthest positive
        farthest = distance.masked_fill(~same, -torch.inf).amax(dim=1)
        nearest = distance.masked_fill(~different, torch.inf).amin(dim=1)
        complete = same.any(dim=1) & different.any(dim=1)
        cost = (margin + farthest - nearest)[complete].clamp(min=0)
        total, active, number = cost.sum(), (cost > 0).sum(), complete.sum()
    else:
        total, active = _sum_of_hinges(margin + distance, same, distance, different)
        number = (same.sum(dim=1) * different.sum(dim=1)).sum()
    return _terms(total + features.sum() * 0, active, number, average)


def contrastive_metric(
    features: Tensor,
    labels: Tensor,
    *,
    margin: float = 1.0,
    images: Tensor | None = None,
    memory: tuple[Tensor, Tensor] | None = None,
    normalise: bool = True,
) -> MetricTerms:
    """Pairs of one class cost d², pairs of two classes ``max(0, margin - d)²``; the means of the two kinds are added.

    Args:
        features: [M, D].
        labels: [M].
        margin: above 0.
        images: None, or the image [M] of each feature: only pairs within one image count, and no memory.
        memory: None, or further features [Q, D] and labels [Q], paired with those of the batch.
        normalise: scale the features to length 1.

    Returns:
        The loss over unordered pairs, 0 where there are none. ``mean_over_all`` is the loss itself; ``active`` is the
        share of pairs of two classes that cost something.

    Raises:
        ValueError: margin not above 0, or shapes that do not fit.

    Source: an alternative to `triplet_metric`, not confirmed for the paper.

    Example:
        >>> features = torch.tensor([[3.0, 4.0], [6.0, 8.0], [4.0, 3.0], [-3.0, 4.0], [0.0, 2.0]])
        >>> round(contrastive_metric(features, torch.tensor([0, 0, 0, 1, 1])).loss.item(), 6)
        0.186887
    """
    distance, same, different = _pairs(features, labels, margin, images, memory, normalise)
    once = torch.ones_like(same).triu(diagonal=1)  # the square of the batch; the memory beyond it is above the diagonal
    same, different = same & once, different & once
    apart = (margin - distance).clamp(min=0).square()
    attraction = (distance.square() * same).sum() / same.sum().clamp(min=1)
    repulsion = (apart * different).sum() / different.sum().clamp(min=1)
    loss = attraction + repulsion
    share = ((apart > 0) & different).sum() / different.sum().clamp(min=1)
    return MetricTerms(loss, loss.detach(), share)


def prototype_metric(
    features: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.3,
    images: Tensor | None = None,
    memory: tuple[Tensor, Tensor] | None = None,
    normalise: bool = True,
    squared: bool = False,
    average: Literal["active", "all"] = "active",
) -> MetricTerms:
    """Triplets of an anchor, the mean of its class and the mean of another class.

    Means are over the batch and the memory, with gradient through the batch. An anchor that is the only one of its
    class has no positive: its class's mean would be itself.

    Args:
        features: [M, D], the anchors.
        labels: [M].
        margin: above 0.
        images: None, or the image [M] of each feature: means are then over one class in one image, and no memory.
        memory: None, or further features [Q, D] and labels [Q] that count in the means.
        normalise: scale the features, and then the means, to length 1.
        squared: take the square of the distance.
        average: over the triplets that cost something, or over "all".

    Returns:
        The loss, 0 (with a gradient of 0) where there is no triplet, and what to watch.

    Raises:
        ValueError: margin not above 0, an unknown average, or shapes that do not fit.

    Source: an alternative to `triplet_metric`, not confirmed for the paper.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        >>> prototype_metric(features, torch.tensor([0, 0, 1, 1]), margin=0.3).loss
        tensor(0.)
    """
    _check_name("average", average, ("active", "all"))
    _check(features, labels, margin, images, memory)
    others, other_labels = memory if memory is not None and images is None else (features[:0], labels[:0])
    anchors, others = _scaled(features, normalise), _scaled(others, normalise)
    members, member_labels = torch.cat([anchors, others.detach()]), torch.cat([labels, other_labels])
    place = torch.zeros_like(member_labels) if images is None else images
    groups, group = torch.stack([place, member_labels], dim=1).unique(dim=0, return_inverse=True)
    sizes = torch.bincount(group, minlength=len(groups))
    sums = members.new_zeros(len(groups), members.shape[1]).index_add(0, group, members)
    prototypes = _scaled(sums / sizes.clamp(min=1)[:, None].to(sums.dtype), normalise)
    own = group[: len(labels), None] == torch.arange(len(groups), device=labels.device)
    together = place[: len(labels), None] == groups[:, 0]
    same = own & (sizes > 1)
    different = together & ~own & same.any(dim=1, keepdim=True)
    distance = _distance(anchors, prototypes)
    if squared:
        distance = distance.square()
    total, active = _sum_of_hinges(margin + distance, same, distance, different)
    number = (same.sum(dim=1) * different.sum(dim=1)).sum()
    return _terms(total + features.sum() * 0, active, number, average)


def _pairs(
    features: Tensor,
    labels: Tensor,
    margin: float,
    images: Tensor | None,
    memory: tuple[Tensor, Tensor] | None,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Distances [M, M + Q] of anchors to all features, and which of them are of one class and of two."""
    _check(features, labels, margin, images, memory)
    anchors, others, other_labels = _scaled(features, normalise), features[:0], labels[:0]
    if memory is not None and images is None:
        others, other_labels = _scaled(memory[0].to(anchors), normalise).detach(), memory[1]
    distance = _distance(anchors, torch.cat([anchors, others.to(anchors)]))
    same = labels[:, None] == torch.cat([labels, other_labels])
    different = ~same
    if images is not None:
        together = images[:, None] == images
        same, different = same & together, different & together
    return distance, same.fill_diagonal_(False) if len(labels) else same, different


def _scaled(features: Tensor, normalise: bool) -> Tensor:
    features = features if features.dtype == torch.float64 else features.float()
    return F.normalize(features, eps=_SMALLEST_NORM) if normalise else features


def _distance(rows: Tensor, columns: Tensor) -> Tensor:
    # Not by a matrix product, whose rounding gives equal features a distance; cdist has gradient 0 there, not NaN.
    return torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist")


def _sum_of_hinges(
    thresholds: Tensor, has_threshold: Tensor, values: Tensor, has_value: Tensor
) -> tuple[Tensor, Tensor]:
    """Row by row, the sum of max(0, threshold - value) over all pairs of the two, and how many are above 0.

    With the values of a row sorted, those below a threshold are its beginning, and their sum is a prefix sum: no
    triplet is ever formed.
    """
    ordered = values.masked_fill(~has_value, torch.inf).sort(dim=1).values
    below = torch.searchsorted(ordered.detach().contiguous(), thresholds.detach().contiguous()) * has_threshold
    prefix = F.pad(ordered.masked_fill(ordered.isinf(), 0).cumsum(dim=1), (1, 0))
    cost = (below * thresholds - prefix.gather(1, below)) * has_threshold
    return cost.sum(), below.sum()


def _terms(total: Tensor, active: Tensor, number: Tensor, average: str) -> MetricTerms:
    over_all = total / number.clamp(min=1)
    loss = total / active.clamp(min=1) if average == "active" else over_all
    return MetricTerms(loss, over_all.detach(), active / number.clamp(min=1))


def _check_name(option: str, name: str, valid: tuple[str, ...]) -> None:
    if name not in valid:
        raise ValueError(f"{option} must be one of {', '.join(valid)}, got {name!r}")


def _check(
    features: Tensor,
    labels: Tensor,
    margin: float,
    images: Tensor | None,
    memory: tuple[Tensor, Tensor] | None,
) -> None:
    if not margin > 0:
        raise ValueError(f"margin must be above 0, got {margin}")
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"features must be [M, D] and labels [M], got {list(features.shape)} and {list(labels.shape)}")
    if images is not None and images.shape != labels.shape:
        raise ValueError(f"images must be [M] like labels, got {list(images.shape)} and {list(labels.shape)}")
    if memory is not None and (memory[0].dim() != 2 or memory[0].shape[1] != features.shape[1]):
        raise ValueError(f"memory must be [Q, {features.shape[1]}], got {list(memory[0].shape)}")


# ------------------------------------------------------------------------------------------------------ processes


class _GatheredRows(torch.autograd.Function):
    """All processes' rows, padded to one length; the gradient of a row is the sum of what all processes want of it."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.stack(gathered)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        # A copy: the one that comes in is autograd's, and may be wanted elsewhere.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of the processes, with gradient; the rows themselves with one process.

    Each process may have another number of them. When every process computes one loss of all rows and
    DistributedDataParallel takes the mean of the gradients, that mean is the gradient in a single process.

    Args:
        rows: [M, ...].

    Returns:
        [sum of M, ...].

    Source: ours, so that the metric is across all images of a step; the paper is silent on several processes.

    Example:
        >>> gather_rows(torch.tensor([[1.0, 2.0]]))  # a single process
        tensor([[1., 2.]])
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    own = torch.tensor(len(rows), device=rows.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    numbers = [int(count) for count in counts]
    padded = torch.cat([rows, rows.new_zeros(max(numbers) - len(rows), *rows.shape[1:])])
    gathered = _GatheredRows.apply(padded) if rows.is_floating_point() else _gathered(padded)
    return torch.cat([part[:number] for part, number in zip(gathered, numbers, strict=True)])


def _gathered(rows: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return parts


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """A sum over a count, 0 where the count is 0, so that the mean over processes is the quotient of both's totals.

    Args:
        total: scalar, of this process.
        count: scalar, of this process.

    Returns:
        Scalar, with the gradient of `total`.

    Source: ours; DistributedDataParallel takes the mean of the gradients of all processes.

    Example:
        >>> global_mean(torch.tensor(6.0), torch.tensor(4)), global_mean(torch.tensor(0.0), torch.tensor(0))
        (tensor(1.5000), tensor(0.))
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return total / count.clamp(min=1)
    count = count.detach().clone()
    dist.all_reduce(count)
    return total * dist.get_world_size() / count.clamp(min=1)
