"""Self-mining: clusters of target images, labels ignored, as pseudo identities.

Paper: Fu et al., One Shot Domain Adaptation for Person Re-Identification, https://arxiv.org/abs/1811.10144v1. The
numbers are those of the authors' later code; that the paper's self-mining is this clustering is inferred.

    D[i, j] = (1 - mu) Jaccard[i, j] + mu (delta[i] + delta[j])     delta: how far an image is from the source
    eps     = mean of the smallest share rho of the distances that are not zero
    DBSCAN on D: each cluster is an identity, noise is left out
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gingham.methods.oneshot_reid.objective import check_features
from gingham.nn.segmentation_loss import widened
from gingham.ops import k_reciprocal_rerank

Diagonal = Literal["zero", "keep"]

_ROWS = 1024  # of distances to the source that are kept at a time


def jaccard_distances(features: Tensor, k1: int = 20, k2: int = 6) -> Tensor:
    """The Jaccard distance of k-reciprocal neighbourhoods between all pairs of items.

    It comes from `gingham.ops.k_reciprocal_rerank`, which compares two groups of the items that it describes: the
    groups are the items with a 0 and with a 1 at a place of their binary index, for each place in turn, so that every
    pair is in different groups once at least.

    Args:
        features: [N, D], floating point.
        k1: neighbours in the reciprocal neighbourhood, at least 1.
        k2: items whose descriptions are averaged, at least 1.

    Returns:
        [N, N] in [0, 1], symmetric with a diagonal of 0; float32, or float64 for float64 features.

    Raises:
        ValueError: features that are not [N, D] or not finite, or a number out of its range.

    Source: section 7.4 of our specification; Zhong et al., https://arxiv.org/abs/1701.08398.

    Example:
        >>> near = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
        >>> jaccard_distances(near, k1=1, k2=1).round()
        tensor([[0., 0., 1., 1.],
                [0., 0., 1., 1.],
                [1., 1., 0., 0.],
                [1., 1., 0., 0.]])
    """
    count = len(features)
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    distances = torch.zeros(count, count, dtype=dtype, device=features.device)
    index = torch.arange(count, device=features.device)
    for place in range((count - 1).bit_length() if count else 0):
        with_one = (index >> place & 1).bool()
        zeros, ones = index[~with_one], index[with_one]
        block = k_reciprocal_rerank(features[zeros], features[ones], k1=k1, k2=k2, lambda_value=0.0).clamp_(min=0)
        distances[zeros[:, None], ones] = block
        distances[ones[:, None], zeros] = block.T
    return distances


def source_distance(distances: Tensor) -> Tensor:
    """How far each target image is from the source, 0 to 1: an image near some source image is trusted more.

    Args:
        distances: [N, M], Euclidean, from target to source images.

    Returns:
        [N]: 1 - exp(-d^2) of the nearest source image, in units of the largest; 0 where all are 0.

    Raises:
        ValueError: distances that are not [N, M], or no source image.

    Source: the authors' later code.

    Example:
        >>> source_distance(torch.tensor([[0.0, 1.0], [0.5, 0.5], [2.0, 3.0]]))
        tensor([0.0000, 0.2253, 1.0000])
    """
    if distances.dim() != 2 or distances.size(1) == 0:
        raise ValueError(f"distances must be [N, M] with M of at least 1, got {list(distances.shape)}")
    delta = -torch.expm1(-distances.amin(dim=1).square())
    largest = delta.amax() if len(delta) else delta.new_ones(())
    return delta / largest.where(largest > 0, 1)


def mining_distances(
    target: Tensor,
    source: Tensor,
    *,
    k1: int = 20,
    k2: int = 6,
    source_share: float = 0.1,
    diagonal: Diagonal = "zero",
) -> Tensor:
    """Distances between all target images for clustering: Jaccard, and how far both images are from the source.

    Args:
        target: [N, D], normalised features, finite; those of 16 bits are compared in float32.
        source: [M, D], normalised features of the same dtype.
        k1: see `jaccard_distances`.
        k2: see `jaccard_distances`.
        source_share: mu, 0 to 1.
        diagonal: "zero"; or "keep", which leaves 2 mu delta there, so that an image far from the source need not count
            as its own neighbour.

    Returns:
        [N, N], symmetric.

    Raises:
        ValueError: a number or an option outside its range, or features that are not finite or do not fit.

    Source: the authors' later code, which keeps the diagonal.

    Example:
        >>> target = torch.nn.functional.normalize(torch.randn(9, 4), dim=1)
        >>> mining_distances(target, target[:3]).diagonal()
        tensor([0., 0., 0., 0., 0., 0., 0., 0., 0.])
    """
    if not 0 <= source_share <= 1:
        raise ValueError(f"source_share must be 0 to 1, got {source_share}")
    if diagonal not in ("zero", "keep"):
        raise ValueError(f"diagonal must be 'zero' or 'keep', got {diagonal!r}")
    if not len(source):
        raise ValueError(f"source must be [M, D] with M of at least 1, got {list(source.shape)}")
    check_features(target=target, source=source)
    target, source = widened(target), widened(source)
    distances = jaccard_distances(target, k1, k2).mul_(1 - source_share)
    nearest = [torch.cdist(rows, source).amin(dim=1) for rows in target.split(_ROWS)]
    delta = source_distance(torch.cat(nearest)[:, None]).to(distances.dtype)
    distances += source_share * delta
    distances += source_share * delta[:, None]
    if diagonal == "zero":
        distances.fill_diagonal_(0)
    return distances


def mining_radius(distances: Tensor, share: float = 1.6e-3) -> float:
    """The radius of clusters: the mean of the smallest distances between different images.

    Args:
        distances: [N, N], symmetric.
        share: rho, of the distances above the diagonal that are not zero, above 0 and at most 1.

    Returns:
        eps.

    Raises:
        ValueError: a share that selects no pair, or is out of its range.

    Source: the authors' later code.

    Example:
        >>> near = torch.tensor([[0, 0.1, 0.2, 0.9], [0.1, 0, 0.3, 0.8], [0.2, 0.3, 0, 0.7], [0.9, 0.8, 0.7, 0]])
        >>> round(mining_radius(near, share=0.5), 6)
        0.2
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    # Row by row and sorted in place: there are as many pairs as fill the memory a few times over.
    rows = (row[index + 1 :] for index, row in enumerate(distances))
    above = torch.cat([distances.new_empty(0), *(row[row > 0] for row in rows)])
    selected = round(share * len(above))
    if selected == 0:
        raise ValueError(
            f"share must select a pair at least, got {share} of {len(above)} distances that are not zero; with so few "
            "images it must be larger"
        )
    values = above.cpu().numpy()
    values.partition(selected - 1)
    return float(torch.from_numpy(np.sort(values[:selected])).double().mean())


def dbscan(distances: Tensor, radius: float, min_samples: int = 4) -> Tensor:
    """Clusters of density (DBSCAN) on distances that are known.

    An image with `min_samples` images within the radius, itself included if its own distance is, is a core. Cores
    within the radius of each other are one cluster, and so are the images within the radius of one of its cores; of
    several clusters they get the first. Clusters are numbered in the order of their first core.

    Args:
        distances: [N, N], symmetric.
        radius: eps, 0 or more; an image at that distance is within.
        min_samples: 1 or more.

    Returns:
        [N] int64: the cluster, or -1 for noise.

    Raises:
        ValueError: distances that are not square, or a number outside its range.

    Source: Ester et al., KDD 1996; ties as in scikit-learn.

    Example:
        >>> places = torch.tensor([0.0, 1.0, 2.0, 9.0, 20.0, 21.0])
        >>> dbscan((places - places[:, None]).abs(), radius=1.0, min_samples=2).tolist()
        [0, 0, 0, -1, 1, 1]
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if distances.dim() != 2 or distances.size(0) != distances.size(1):
        raise ValueError(f"distances must be [N, N], got {list(distances.shape)}")
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius must be 0 or more, got {radius}")
    if min_samples < 1:
        raise ValueError(f"min_samples must be 1 or more, got {min_samples}")
    count = len(distances)
    rows, columns = (distances <= radius).nonzero().cpu().numpy().T
    core = np.bincount(rows, minlength=count) >= min_samples
    inside = core[rows] & core[columns]
    graph = coo_array((np.ones(int(inside.sum()), bool), (rows[inside], columns[inside])), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    found, first = np.unique(component[core], return_index=True)
    number = np.full(count + 1, count, np.int64)
    number[found[np.argsort(first)]] = np.arange(len(found))
    clusters = np.where(core, number[component], count)
    at_border = ~core[rows] & core[columns]
    np.minimum.at(clusters, rows[at_border], clusters[columns[at_border]])
    return torch.from_numpy(np.where(clusters == count, -1, clusters)).to(distances.device)
