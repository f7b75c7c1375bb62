"""The losses of SCHP: cross-entropy or divergence, Lovász-softmax, edges, their consistency; and refined labels.

Paper: Li et al., Self-Correction for Human Parsing, https://arxiv.org/abs/1910.09777, as the official code has it;
where that code does not do what it means to, the corrected form is the default and the official one an option. Pure
functions on tensors; K classes, labels int64, ignored pixels carry `ignore_index`.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.methods.schp.network import ParsingOutput
from gingham.nn.segmentation_loss import check_labels, cross_entropy, upsample_logits, widened

Blend = Literal["probabilities", "logits"]
Reduction = Literal["element", "pixel"]
Semantics = Literal["corrected", "official"]


class SoftLabels(NamedTuple):
    """Probabilities to learn in place of labels, at their size."""

    parsing: Tensor  # [B, K, H, W]
    edge: Tensor | None  # [B, 2, H, W], or None to learn the edges of the given labels


def edge_map(labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Where classes meet: a band of two pixels on each side of a straight boundary.

    A pixel is marked when it differs from the one above, on the right, below on the right or below on the left and
    neither is ignored; what is marked grows by one pixel. The border to ignored pixels is no edge.

    Args:
        labels: [B, H, W].
        ignore_index: label of ignored pixels.

    Returns:
        [B, H, W], 1 on edges and 0 elsewhere.

    Raises:
        ValueError: labels of another shape.

    Source: the official code, after CE2P's.

    Example:
        >>> edge_map(torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]).expand(1, 8, 8))[0, 3]
        tensor([0, 0, 1, 1, 1, 1, 0, 0])
    """
    if labels.dim() != 3:
        raise ValueError(f"labels must be [B, H, W], got {list(labels.shape)}")
    differs = torch.zeros_like(labels, dtype=torch.bool)
    every, first, second = slice(None), slice(None, -1), slice(1, None)
    neighbours = (
        ((second, every), (first, every)),  # above
        ((every, first), (every, second)),  # right
        ((first, first), (second, second)),  # below on the right
        ((first, second), (second, first)),  # below on the left
    )
    for (rows, columns), (other_rows, other_columns) in neighbours:
        here, there = labels[:, rows, columns], labels[:, other_rows, other_columns]
        differs[:, rows, columns] |= (here != there) & (here != ignore_index) & (there != ignore_index)
    if differs.numel() == 0:
        return differs.long()
    return F.max_pool2d(differs[:, None].float(), 3, stride=1, padding=1)[:, 0].long()


def lovasz_softmax(probabilities: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """A convex surrogate of 1 - IoU, over all pixels of the batch, averaged over the classes that occur in the labels.

    Args:
        probabilities: [B, K, H, W].
        labels: [B, H, W].
        ignore_index: label of ignored pixels.

    Returns:
        Scalar in [0, 1]; 0, with a gradient of 0, where every pixel is ignored.

    Raises:
        DataError: a label is neither a class nor `ignore_index`, or the shapes do not fit.

    Source: Berman et al., The Lovász-Softmax loss, https://arxiv.org/abs/1705.08790.

    Example:
        >>> probabilities = torch.tensor([[[[0.7, 0.4]], [[0.3, 0.6]]]])
        >>> round(float(lovasz_softmax(probabilities, torch.tensor([[[0, 1]]]))), 4)
        0.375
    """
    check_labels(probabilities, labels, ignore_index, same_size=True)
    probabilities = widened(probabilities)
    valid = labels != ignore_index
    by_class = probabilities.movedim(1, 0)[:, valid]  # [K, N]
    valid_labels = labels[valid]
    losses = []
    for index in valid_labels.unique().tolist():
        foreground = valid_labels == index
        errors = (foreground.to(by_class.dtype) - by_class[index]).abs()
        errors, order = errors.sort(descending=True)
        losses.append(errors @ _jaccard_steps(foreground[order], errors.dtype))
    return torch.stack(losses).mean() if losses else probabilities.sum() * 0


def edge_loss(logits: Tensor, edges: Tensor) -> Tensor:
    """Cross-entropy of edges in which edge pixels and others weigh the same in sum.

    A pixel weighs as much as there are pixels of the other kind; the sum is divided by that of the weights.

    Args:
        logits: [B, 2, H, W]: no edge, edge.
        edges: [B, H, W], of `edge_map`.

    Returns:
        Scalar; 0, with a gradient of 0, where only one of the two kinds occurs, for which the official code has NaN.

    Raises:
        DataError: an edge is neither 0 nor 1, or the shapes do not fit.

    Source: the official code.

    Example:
        >>> logits = torch.tensor([[[[0.0, 0.0, 0.0]], [[0.0, 0.0, 9.0]]]])
        >>> round(float(edge_loss(logits, torch.tensor([[[0, 0, 1]]]))), 4)  # (log 2 + 0) / 2
        0.3466
    """
    check_labels(logits, edges, 0, same_size=True)  # nothing is ignored
    logits = widened(logits)
    share = edges.sum().to(logits.dtype) / max(1, edges.numel())
    weights = torch.stack([share, 1 - share])
    total = F.cross_entropy(logits, edges, weight=weights, reduction="sum")
    # The sum of the weights is 0 or, since both kinds occur, 1 or more.
    return total / (2 * share * (1 - share) * edges.numel()).clamp(min=1)


def refined_labels(
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float,
    *,
    blend: Blend = "probabilities",
    ignore_index: int = 255,
    align_corners: bool = True,
) -> Tensor:
    """Mix what a teacher predicts into given labels.

    Args:
        teacher_logits: [B, K, h, w], resized to the labels; they get no gradient.
        labels: [B, H, W]; they are not changed.
        alpha: share of the given labels, 0 to 1.
        blend: "probabilities" for (1 - alpha) softmax(logits) + alpha onehot(labels), or "logits" for the official
            code's softmax((1 - alpha) logits + alpha onehot(labels)), in which a confident teacher outweighs any label.
        ignore_index: label of ignored pixels. They get the teacher's probabilities; with "logits", as in the official
            code, they count as class 0.
        align_corners: of the resizing.

    Returns:
        [B, K, H, W], probabilities.

    Raises:
        ValueError: alpha outside its range, or an unknown blend.
        DataError: a label is neither a class nor `ignore_index`, or the shapes do not fit.

    Source: the official code; that the paper blends probabilities is not confirmed.

    Example:
        >>> logits = torch.tensor([2.0, 0.0, -1.0]).reshape(1, 3, 1, 1)
        >>> refined_labels(logits, torch.tensor([[[1]]]), 0.5).flatten()
        tensor([0.4219, 0.5571, 0.0210])
        >>> refined_labels(logits, torch.tensor([[[1]]]), 0.5, blend="logits").flatten()
        tensor([0.5465, 0.3315, 0.1220])
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    if blend not in ("probabilities", "logits"):
        raise ValueError(f"blend must be 'probabilities' or 'logits', got {blend!r}")
    check_labels(teacher_logits, labels, ignore_index)
    ignored = labels == ignore_index
    classes = torch.arange(teacher_logits.shape[1], device=labels.device).reshape(1, -1, 1, 1)
    onehot = labels.masked_fill(ignored, 0)[:, None] == classes  # [B, K, H, W]
    with torch.no_grad():
        logits = widened(upsample_logits(teacher_logits.detach(), labels.shape[-2:], align_corners=align_corners))
        if blend == "logits":
            return ((1 - alpha) * logits + alpha * onehot).softmax(dim=1)
        share = alpha * (~ignored)[:, None].to(logits.dtype)
        return (1 - share) * logits.softmax(dim=1) + share * onehot


def soft_label_loss(
    logits: Tensor, soft: Tensor, labels: Tensor, *, reduction: Reduction = "element", ignore_index: int = 255
) -> Tensor:
    """Divergence KL(soft || softmax(logits)), averaged.

    Args:
        logits: [B, K, H, W].
        soft: [B, K, H, W], probabilities.
        labels: [B, H, W], which only say what is ignored.
        reduction: "element", the mean over pixels and classes of the official code, to whose scale its weights belong;
            or "pixel", the mean over pixels, K times as large.
        ignore_index: label of ignored pixels.

    Returns:
        Scalar; 0, with a gradient of 0, where every pixel is ignored.

    Raises:
        ValueError: an unknown reduction.
        DataError: the shapes do not fit.

    Source: the official code.

    Example:
        >>> soft = torch.tensor([1.0, 0.0, 0.0, 0.0]).reshape(1, 4, 1, 1)
        >>> soft_label_loss(torch.zeros(1, 4, 1, 1), soft, torch.zeros(1, 1, 1, dtype=torch.int64))  # log(4) / 4
        tensor(0.3466)
    """
    if reduction not in ("element", "pixel"):
        raise ValueError(f"reduction must be 'element' or 'pixel', got {reduction!r}")
    by_pixel = cross_entropy(logits, labels, soft=soft, ignore_index=ignore_index)
    return by_pixel / logits.shape[1] if reduction == "element" else by_pixel


def consistency_loss(parsing_logits: Tensor, edge_logits: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """How unsure the edge branch is where the parsing prediction has its edges; the gradient goes to the edge branch.

    ``mean(1 - softmax(edge_logits)[edge])`` over the edges of the predicted classes, without ignored pixels.

    Args:
        parsing_logits: [B, K, H, W].
        edge_logits: [B, 2, H, W]: no edge, edge.
        labels: [B, H, W], which only say what is ignored.
        ignore_index: label of ignored pixels.

    Returns:
        Scalar; 0, with a gradient of 0, where the prediction has no edge.

    Source: ours, after what the official code means to do; its own term is 0 without gradient, or NaN. Norm and set of
    pixels in the paper are not confirmed.

    Example:
        >>> parsing = torch.tensor([[[[1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]]])
        >>> consistency_loss(parsing, torch.zeros(1, 2, 1, 3), torch.zeros(1, 1, 3, dtype=torch.int64))
        tensor(0.5000)
    """
    predicted = parsing_logits.argmax(dim=1).masked_fill(labels == ignore_index, ignore_index)
    counts = (edge_map(predicted, ignore_index=ignore_index) == 1) & (labels != ignore_index)
    unsure = widened(edge_logits).softmax(dim=1)[:, 0]  # 1 - p(edge), without its rounding
    return unsure.masked_fill(~counts, 0).sum() / counts.sum().clamp(min=1)


def parsing_loss(
    output: ParsingOutput,
    labels: Tensor,
    *,
    soft: SoftLabels | None = None,
    parsing_weight: float = 1.0,
    edge_weight: float = 1.0,
    consistency_weight: float = 0.1,
    lovasz_share: float = 0.5,
    reduction: Reduction = "element",
    semantics: Semantics = "corrected",
    ignore_index: int = 255,
) -> Tensor:
    """The whole loss of a batch, before the first cycle or, with `soft`, in a cycle of self-correction.

    For the parsing and the fusion logits: ``lovasz_share`` times Lovász-softmax of the labels plus ``1 - lovasz_share``
    times the cross-entropy of the labels, or the divergence from the soft labels; plus the class-balanced loss of the
    edges, or the divergence from their soft labels; plus, for both logits, the consistency with the edges.

    Args:
        output: of the network.
        labels: [B, H, W]; they are not changed.
        soft: None, or soft labels, see `refined_labels`.
        parsing_weight: lambda_s, of the two parsing terms.
        edge_weight: lambda_e.
        consistency_weight: lambda_c, for each of the two logits.
        lovasz_share: 0 to 1; 0 leaves Lovász-softmax out.
        reduction: of the divergences, see `soft_label_loss`.
        semantics: "corrected", or "official" for what the official code computes: no consistency term, and in cycles
            ignored pixels that count as class 0 everywhere but in the Lovász-softmax of the parsing logits.
        ignore_index: label of ignored pixels.

    Returns:
        Scalar.

    Raises:
        ValueError: an unknown reduction or semantics, or a share outside its range.
        DataError: a label is neither a class nor `ignore_index`, or the shapes do not fit.

    Source: the official code.

    Example:
        >>> output = ParsingOutput(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 4, 4))
        >>> parsing_loss(output, torch.zeros(1, 8, 8, dtype=torch.int64))  # log(3) + 2/3, and no edge
        tensor(1.7653)
    """
    if semantics not in ("corrected", "official"):
        raise ValueError(f"semantics must be 'corrected' or 'official', got {semantics!r}")
    if not 0 <= lovasz_share <= 1:
        raise ValueError(f"lovasz_share must be between 0 and 1, got {lovasz_share}")
    check_labels(output.logits, labels, ignore_index)
    size = labels.shape[-2:]
    edge_logits = upsample_logits(output.edge, size)
    overwritten = labels
    if semantics == "official" and soft is not None:
        overwritten = labels.masked_fill(labels == ignore_index, 0)  # there, by the first divergence and in place

    if soft is None or soft.edge is None:
        loss = edge_weight * edge_loss(edge_logits, edge_map(labels, ignore_index=ignore_index))
    else:
        loss = edge_weight * soft_label_loss(
            edge_logits, soft.edge, overwritten, reduction=reduction, ignore_index=ignore_index
        )
    for coarse_logits, lovasz_labels in ((output.parsing, labels), (output.logits, overwritten)):
        logits = upsample_logits(coarse_logits, size)
        if soft is None:
            classes = cross_entropy(logits, labels, ignore_index=ignore_index)
        else:
            classes = soft_label_loss(logits, soft.parsing, overwritten, reduction=reduction, ignore_index=ignore_index)
        loss = loss + parsing_weight * (1 - lovasz_share) * classes
        if lovasz_share:
            lovasz = lovasz_softmax(logits.softmax(dim=1), lovasz_labels, ignore_index=ignore_index)
            loss = loss + parsing_weight * lovasz_share * lovasz
        if consistency_weight and semantics == "corrected":
            consistency = consistency_loss(logits, edge_logits, labels, ignore_index=ignore_index)
            loss = loss + consistency_weight * consistency
    return loss


def _jaccard_steps(foreground: Tensor, dtype: torch.dtype) -> Tensor:
    """How much 1 - IoU grows with each pixel that turns wrong, in the order given; at least one is foreground.

    The differences of J_k = 1 - I_k / U_k, each in one fraction so that none is lost to rounding: a foreground pixel
    takes 1 from I, any other adds 1 to U.
    """
    covered, pixels = foreground.cumsum(0), torch.arange(1, len(foreground) + 1, device=foreground.device)
    intersection = (foreground.sum() - covered).to(dtype)
    union = (foreground.sum() + pixels - covered).to(dtype)
    return torch.where(foreground, 1, intersection / (union - 1).clamp(min=1)) / union
