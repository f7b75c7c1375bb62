"""k-reciprocal re-ranking with sets, one item after the other, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def rerank(query: Array, gallery: Array, k1: int, k2: int, lambda_value: float) -> Array:
    """[Nq, Ng], from the definition in the paper's terms; equal distances are ordered by index."""
    features = np.concatenate([query, gallery]).astype(np.float64)
    count, queries = len(features), len(query)
    distances = np.stack([((features - row) ** 2).sum(axis=1) for row in features])
    furthest = distances.max(axis=1, keepdims=True)
    distances = np.divide(distances, furthest, out=np.zeros_like(distances), where=furthest > 0)
    order = [sorted(range(count), key=lambda j, i=i: (j != i, distances[i, j], j)) for i in range(count)]

    def nearest(i: int, k: int) -> set[int]:
        return set(order[i][: k + 1])

    def reciprocal(i: int, k: int) -> set[int]:
        return {j for j in nearest(i, k) if i in nearest(j, k)}

    half = k1 // 2 + (k1 % 4 == 3)  # halves to even: 1, 3, 5, 7 give 0, 2, 2, 4
    weights = np.zeros((count, count))
    for i in range(count):
        members = set(reciprocal(i, k1))
        for j in reciprocal(i, k1):
            candidates = reciprocal(j, half)
            if 3 * len(candidates & reciprocal(i, k1)) > 2 * len(candidates):
                members |= candidates
        for j in members:
            weights[i, j] = np.exp(-distances[i, j])
        weights[i] /= weights[i].sum()
    weights = np.stack([weights[order[i][:k2]].mean(axis=0) for i in range(count)])
    result = np.zeros((queries, count - queries))
    for i in range(queries):
        for j in range(queries, count):
            # With both summing to 1 this is 1 - m / (2 - m).
            least, most = np.minimum(weights[i], weights[j]).sum(), np.maximum(weights[i], weights[j]).sum()
            result[i, j - queries] = (1 - lambda_value) * (1 - least / most) + lambda_value * distances[i, j]
    return result
