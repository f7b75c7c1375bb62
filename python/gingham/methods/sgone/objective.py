"""SG-One's loss, and the ways in which several shots make one mask. Pure functions on tensors."""

from typing import Literal

from torch import Tensor

from gingham.nn.segmentation_loss import check_labels, cross_entropy, upsample_logits


def episode_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of background and object at the size of the labels, the mean over pixels that are not ignored.

    Args:
        logits: [B, 2, h, w], upsampled bilinearly without aligned corners.
        labels: [B, H, W] int64, 0 background, 1 object, 255 ignored.

    Returns:
        Scalar, 0 (with a gradient of 0) where every pixel is ignored.

    Raises:
        DataError: another label, or shapes that do not fit.

    Source: SG-One's official code. It ignores no pixel; with labels that have no 255 this is the same.

    Example:
        >>> import torch
        >>> episode_loss(torch.zeros(1, 2, 4, 5), torch.ones(1, 32, 40, dtype=torch.int64))  # ln 2
        tensor(0.6931)
    """
    check_labels(logits, labels)
    return cross_entropy(upsample_logits(logits, labels.shape[-2:], align_corners=False), labels)


def combine_masks(masks: Tensor, rule: Literal["union", "vote"]) -> Tensor:
    """One mask out of those that single shots gave.

    Args:
        masks: [K, B, H, W], bool.
        rule: "union": where any shot sees the object. "vote": where at least half as many shots see it as where most
            do, in that image.

    Returns:
        [B, H, W], bool.

    Raises:
        ValueError: an unknown rule, or masks that are not four-dimensional.

    Source: "union" SG-One's official code, "vote" HSNet's, https://github.com/juhongm999/hsnet.

    Example:
        >>> import torch
        >>> masks = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.bool).view(3, 1, 1, 3)
        >>> combine_masks(masks, "union").tolist(), combine_masks(masks, "vote").tolist()
        ([[[True, True, False]]], [[[True, False, False]]])
    """
    if masks.dim() != 4:
        raise ValueError(f"masks must be [K, B, H, W], got {list(masks.shape)}")
    if rule == "union":
        return masks.any(dim=0)
    if rule != "vote":
        raise ValueError(f"rule must be 'union' or 'vote', got {rule!r}")
    votes = masks.long().sum(dim=0)
    most = votes.flatten(1).amax(dim=1).clamp(min=1)
    return 2 * votes >= most[:, None, None]
