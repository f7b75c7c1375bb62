"""STA's losses, and what to watch of its attention. Pure functions on tensors."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.methods.sta.network import STAOutput
from gingham.nn.spatial_temporal_attention import interframe_regularization
from gingham.nn.triplet_loss import triplet_loss


class ClipLosses(NamedTuple):
    """The three terms, scalars."""

    identity: Tensor  # cross-entropy of the training persons
    triplet: Tensor  # batch-hard; 0 without triplets
    regularization: Tensor  # distance between the attention of two frames; 0 without attention


def clip_losses(
    output: STAOutput,
    persons: Tensor,
    *,
    margin: float | Literal["soft"] | None = 0.3,
    label_smoothing: float = 0.0,
    pairs: Literal["one", "all"] = "one",
) -> ClipLosses:
    """The losses of a batch of clips: who it is, who is nearer, and that attention does not jump between frames.

    Args:
        output: of the network.
        persons: [B] int64, for triplets two different ones at least.
        margin: of the triplets, or "soft" for the logistic function in its place, or None for no triplets.
        label_smoothing: share of the identity's target that all persons have equally, from 0 to below 1.
        pairs: whose attention is compared, see `gingham.nn.interframe_regularization`.

    Returns:
        The terms, not weighed.

    Raises:
        ValueError: triplets of one person only, or an option outside its range.

    Source: section 3.4; margin and weights are not confirmed.

    Example:
        >>> features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0], [3.0, 1.0]])
        >>> output = STAOutput(features, torch.zeros(4, 2), torch.ones(4, 1, 1), None)
        >>> [round(term.item(), 4) for term in clip_losses(output, torch.tensor([0, 0, 1, 1]))]
        [0.6931, 0.0, 0.0]
    """
    regularization = output.features.new_zeros(())
    if output.attention is not None:
        regularization = interframe_regularization(output.attention, pairs)
    triplet = output.features.new_zeros(())
    if margin is not None:
        triplet = triplet_loss(output.features, persons, margin=margin)
    identity = F.cross_entropy(output.logits, persons, label_smoothing=label_smoothing)
    return ClipLosses(identity, triplet, regularization)


def score_entropy(scores: Tensor) -> Tensor:
    """How evenly a part's score is spread over the frames: 1 where all have the same, 0 where one has all of it.

    Args:
        scores: [B, T, K], 0 or more; those of a part sum to 1, or are all 0.

    Returns:
        The mean over clips and parts of the entropy, divided by that of T equal scores; 1 for clips of one frame.

    Raises:
        ValueError: scores that have not three axes.

    Example:
        >>> scores = torch.tensor([[[0.5, 1.0], [0.5, 0.0]]])
        >>> score_entropy(scores)
        tensor(0.5000)
    """
    _check_scores(scores)
    length = scores.size(1)
    if length == 1:
        return scores.new_ones(())
    return (torch.special.entr(scores).sum(dim=1) / torch.tensor(length).log()).mean()


def occluded_attention(scores: Tensor, occluded: Tensor) -> Tensor:
    """How much of each clip's attention lies on parts that something hides, by the share of the part that is hidden.

    Args:
        scores: [B, T, K]; those of a part sum to 1.
        occluded: [B, T, H, W] bool, which pixels of the frames something else hides; H is K or more.

    Returns:
        [B]: 0 where nothing is hidden, 1 where everything is. With equal scores, the hidden share of the clip.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> occluded = torch.zeros(1, 2, 8, 4, dtype=torch.bool)
        >>> occluded[0, 1, 4:] = True
        >>> equal = torch.full((1, 2, 4), 0.5)
        >>> occluded_attention(equal, occluded)
        tensor([0.2500])
    """
    _check_scores(scores)
    parts = scores.size(2)
    if occluded.dim() != 4 or occluded.shape[:2] != scores.shape[:2] or occluded.size(2) < parts:
        raise ValueError(
            f"occluded must be [B, T, H, W] for scores {list(scores.shape)}, H {parts} or more, got "
            f"{list(occluded.shape)}"
        )
    height = occluded.size(2)
    rows = [slice(k * height // parts, (k + 1) * height // parts) for k in range(parts)]
    hidden = torch.stack([occluded[:, :, band].to(scores.dtype).mean(dim=(2, 3)) for band in rows], dim=2)
    return (scores * hidden).sum(dim=(1, 2)) / parts


def _check_scores(scores: Tensor) -> None:
    if scores.dim() != 3:
        raise ValueError(f"scores must be [B, T, K], got {list(scores.shape)}")
