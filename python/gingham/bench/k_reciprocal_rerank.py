"""k-reciprocal re-ranking: its sizes, and the NumPy form that one would use instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gingham.bench.definition import OURS, Case, Function, Level, Operator, Pass, Peer

Array = np.ndarray[Any, Any]

IMAGES_OF_A_PERSON = 26  # on average, as in Market-1501


def numpy_form(query: Array, gallery: Array, k1: int = 20, k2: int = 6, lambda_value: float = 0.3) -> Array:
    """Re-ranking as public NumPy code does it: several N x N matrices, and loops in Python over items and queries.

    Of equal distances any may count as the smaller one. NumPy's products use all cores, whatever torch is told.
    """
    queries, count = len(query), len(query) + len(gallery)
    features = np.concatenate([query, gallery])
    squares = np.square(features).sum(axis=1, keepdims=True)
    distances = squares + squares.T - 2 * features @ features.T
    np.fill_diagonal(distances, 0)
    distances = np.maximum(distances, 0) / distances.max(axis=1, keepdims=True)
    ranks = np.argpartition(distances, range(1, min(k1 + 1, count)), axis=1).astype(np.int32)

    def reciprocal(i: int, k: int) -> Array:
        forward = ranks[i, : k + 1]
        return forward[np.any(ranks[forward, : k + 1] == i, axis=1)]

    weights = np.zeros_like(distances)
    half = round(k1 / 2)
    for i in range(count):
        near = reciprocal(i, k1)
        members = near
        for j in near:
            candidates = reciprocal(j, half)
            if len(np.intersect1d(candidates, near)) > 2 / 3 * len(candidates):
                members = np.append(members, candidates)
        members = np.unique(members)
        row = np.exp(-distances[i, members])
        weights[i, members] = row / row.sum()
    distances = distances[:queries, queries:]
    if k2 > 1:
        averages = np.empty_like(weights)
        for i in range(count):
            averages[i] = weights[ranks[i, :k2]].mean(axis=0)
        weights = averages

    having = [np.flatnonzero(weights[:, i]) for i in range(count)]
    jaccard = np.empty_like(distances)
    for i in range(queries):
        overlap = np.zeros((1, count), dtype=distances.dtype)
        for j in np.flatnonzero(weights[i]):
            overlap[0, having[j]] += np.minimum(weights[i, j], weights[having[j], j])
        jaccard[i] = 1 - overlap[0, queries:] / (2 - overlap[0, queries:])
    return (1 - lambda_value) * jaccard + lambda_value * distances


def _numpy(case: Case, device: torch.device) -> Function:
    def rerank(query_features: Tensor, gallery_features: Tensor) -> Tensor:
        wide = torch.float64 if query_features.dtype == torch.float64 else torch.float32
        query, gallery = (x.to("cpu", wide).numpy() for x in (query_features, gallery_features))
        return torch.from_numpy(numpy_form(query, gallery)).to(query_features.device)

    return rerank


def _ours(case: Case, device: torch.device) -> Function:
    from gingham.ops import k_reciprocal_rerank

    function: Function = k_reciprocal_rerank
    return function


def _reference(case: Case) -> Function:
    if case.options["items"] > 5000:
        # The definition would need tens of gigabytes; tests compare the NumPy form with it at smaller sizes.
        return _numpy(case, torch.device("cpu"))
    from gingham.reference import k_reciprocal_rerank

    function: Function = k_reciprocal_rerank
    return function


def _case(
    queries: int, gallery: int, features: int, *, level: Level, headline: bool = False, longest_call: float = 0.0
) -> Case:
    items = queries + gallery

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        people = torch.randn(max(1, items // IMAGES_OF_A_PERSON), features, generator=generator)
        person = torch.randint(len(people), (items,), generator=generator)
        drawn = people[person] + torch.randn(items, features, generator=generator)
        drawn /= drawn.norm(dim=1, keepdim=True)
        return drawn[:queries].clone(), drawn[queries:].clone()

    return Case(
        label=f"{queries}x{gallery}, {features}",
        inputs=inputs,
        operations={Pass.FORWARD: float(items) ** 2 * features},  # every distance once
        elements={Pass.FORWARD: items * features + queries * gallery},
        options={"items": items},
        level=level,
        headline=headline,
        passes=(Pass.FORWARD,),
        measure_memory=items >= 1000,
        longest_call=longest_call,
    )


OPERATOR = Operator(
    name="k_reciprocal_rerank",
    inputs="queries x gallery, features",
    cases=(
        _case(100, 900, 2048, level=Level.QUICK, longest_call=10.0),
        _case(300, 2000, 2048, level=Level.DEFAULT, headline=True, longest_call=60.0),
        _case(3368, 15913, 2048, level=Level.FULL, headline=True, longest_call=900.0),  # Market-1501
        _case(4, 60, 16, level=Level.QUICK),
    ),
    peers=(Peer(OURS, _ours), Peer("NumPy", _numpy)),
    reference=_reference,
    differentiable=(),
    baseline="NumPy",
    undecided=0.01,
)
