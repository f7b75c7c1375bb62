"""SeeNet's losses: each branch's mean logits against the image's tags, or against nothing.

Paper: https://arxiv.org/abs/1810.09821; that the three terms weigh the same is not confirmed.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.methods.seenet.network import SeeNetOutput


class BranchLosses(NamedTuple):
    """One term for each branch; 0 for those that are not there."""

    attended: Tensor
    potential: Tensor
    background: Tensor


def tag_loss(maps: Tensor, tags: Tensor) -> Tensor:
    """Logistic loss of the mean logits of class maps, averaged over all classes and images.

    Args:
        maps: [B, C, h, w], logits.
        tags: [B, C], 0 or 1.

    Returns:
        A scalar. Its gradient at every place of a class's map is (sigmoid(z) - tag) / (B C h w).

    Raises:
        ValueError: shapes that do not fit.

    Source: the multi-label loss; the average over classes follows the authors' next method.

    Example:
        >>> tag_loss(torch.zeros(2, 20, 7, 5), torch.ones(2, 20))
        tensor(0.6931)
    """
    if maps.dim() != 4 or tags.shape != maps.shape[:2]:
        raise ValueError(f"tags must be [B, C] for maps [B, C, h, w], got {list(tags.shape)} and {list(maps.shape)}")
    logits = maps.float().mean(dim=(-2, -1))
    return F.binary_cross_entropy_with_logits(logits, tags.to(logits.dtype))


def branch_losses(output: SeeNetOutput, tags: Tensor) -> BranchLosses:
    """The losses of the branches: the first two shall find the image's classes, the background shall have none.

    Args:
        output: of the network.
        tags: [B, C], 0 or 1.

    Source: section 3.2 of the paper.

    Example:
        >>> maps = torch.zeros(1, 20, 4, 4)
        >>> [round(term.item(), 4) for term in branch_losses(SeeNetOutput(maps, maps, maps, None), torch.ones(1, 20))]
        [0.6931, 0.6931, 0.6931]
    """
    none = output.attended.new_zeros(())
    return BranchLosses(
        tag_loss(output.attended, tags),
        none if output.potential is None else tag_loss(output.potential, tags),
        none if output.background is None else tag_loss(output.background, torch.zeros_like(tags)),
    )
