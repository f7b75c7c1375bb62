"""k-reciprocal re-ranking (Zhong et al., CVPR 2017, https://arxiv.org/abs/1701.08398) in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def k_reciprocal_rerank(
    query_features: Tensor, gallery_features: Tensor, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> Tensor:
    """The definition of `gingham.ops.k_reciprocal_rerank`; it keeps several N x N matrices, N = Nq + Ng.

    Example:
        >>> import torch
        >>> k_reciprocal_rerank(torch.randn(3, 16), torch.randn(40, 16)).shape
        torch.Size([3, 40])
    """
    queries = len(query_features)
    features = torch.cat([query_features, gallery_features])
    if features.dtype != torch.float64:
        features = features.float()
    if 0 in (queries, len(gallery_features)):
        return features.new_empty(queries, len(gallery_features))
    features = features - features.mean(0)  # distances stay, and lose fewer digits
    squares = features.square().sum(1)
    distances = (squares[:, None] + squares - 2 * features @ features.T).clamp(min=0).fill_diagonal_(0)
    return rerank_distances(distances, queries, k1, k2, lambda_value)


def rerank_distances(distances: Tensor, queries: int, k1: int = 20, k2: int = 6, lambda_value: float = 0.3) -> Tensor:
    """The same from distances.

    Args:
        distances: [N, N], of all items to each other, queries first, 0 on the diagonal; squared Euclidean ones make it
            the definition.
        queries: Nq, how many of the items.
        k1: as in `gingham.ops.k_reciprocal_rerank`.
        k2: as there.
        lambda_value: as there.

    Returns:
        [Nq, N - Nq].

    Example:
        >>> import torch
        >>> line = torch.arange(6.0)
        >>> rerank_distances((line[:, None] - line).square(), queries=2, k1=2, k2=1).shape
        torch.Size([2, 4])
    """
    furthest = distances.amax(1, keepdim=True)
    distances = distances / furthest.where(furthest > 0, 1)

    order = distances.clone().fill_diagonal_(-1).argsort(dim=1, stable=True)  # an item itself comes first
    place = order.argsort(dim=1)  # place[i, j]: where j stands in the order of i

    def reciprocal(k: int) -> Tensor:
        within = place <= k
        return within & within.T

    near = reciprocal(k1)
    nearer = reciprocal(round(k1 / 2)).to(distances.dtype)  # Python rounds halves to even
    common = near.to(distances.dtype) @ nearer.T  # common[i, j] = |R(j, k1 / 2) and R(i, k1)|
    joins = near & (3 * common > 2 * nearer.sum(1))
    members = near | (joins.to(distances.dtype) @ nearer > 0)

    weights = torch.exp(-distances) * members
    weights = weights / weights.sum(1, keepdim=True)
    weights = torch.stack([weights[nearest].mean(0) for nearest in order[:, :k2]])
    overlap = torch.stack([torch.minimum(row, weights[queries:]).sum(1) for row in weights[:queries]])
    jaccard = 1 - overlap / (2 - overlap)
    return (1 - lambda_value) * jaccard + lambda_value * distances[:queries, queries:]
