"""CMC and mean average precision of re-identification: how early the person who is asked for comes in a gallery.

For each query the gallery is sorted by distance. Items of the query's person from the query's own camera are taken out,
and so is junk (person -1); distractors (person 0) stay and are always wrong, since no query is of them. A query to
which nothing relevant is left is skipped: it counts in no mean, also where MATLAB's codes would count it as 0.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from gingham.errors import DataError
from gingham.ops import k_reciprocal_rerank
from gingham.reference.k_reciprocal_rerank import rerank_distances

#: How precisions become an average precision, see `rank`.
AveragePrecision = Literal["standard", "oxford"]

#: How many items of a gallery are shown.
SHOWN_ITEMS = 10

_JUNK = -1
_PAIRS_AT_ONCE = 2**22
_ROWS_AT_ONCE = 2**13  # of a gallery, in float64


class RetrievalScores(NamedTuple):
    """Means over the queries that were scored; every tensor but the counts is float64.

    `galleries` holds places among all items that a meter was given: of a query, and of the items of its gallery that
    are kept, the nearest first; -1 where there are no more. Where there is a single rank or a single query,
    torchmetrics makes scalars of `cmc` or `average_precisions`.
    """

    cmc: Tensor  # [R], the share of queries with a match among the first 1, 2, ... R
    mean_ap: Tensor  # scalar
    mean_inp: Tensor  # scalar, of relevant items / rank of the last of them
    scored: Tensor  # scalar, how many queries
    skipped: Tensor  # scalar, how many queries to which nothing is relevant
    average_precisions: Tensor  # [scored], in the order of the queries
    reranked: RetrievalScores | None = None  # the same after re-ranking, where that is asked for
    galleries: Tensor | None = None  # [S, 1 + SHOWN_ITEMS], where asked for: a query and its nearest items, see below

    def at(self, rank: int) -> Tensor:
        """The share of queries with a match among the first `rank`, 1 or more, at most the last rank that there is."""
        if rank < 1:
            raise ValueError(f"rank must be 1 or more, got {rank}")
        cmc = self.cmc.reshape(-1)
        return cmc[min(rank, len(cmc)) - 1]


class _Counts(NamedTuple):
    """Of one chunk of queries."""

    first: Tensor  # [q], rank of the first match, counting from 0
    average_precision: Tensor  # [q]
    inverse_penalty: Tensor  # [q]
    scored: Tensor  # [q] bool


def rank(
    distances: Tensor,
    query_persons: Tensor,
    query_cameras: Tensor,
    gallery_persons: Tensor,
    gallery_cameras: Tensor,
    *,
    max_rank: int = 50,
    ap: AveragePrecision = "standard",
) -> RetrievalScores:
    """Score a matrix of distances. Of equal distances the item that comes first in the gallery counts as the nearer.

    Args:
        distances: [Q, G], floating and not NaN; only their order within a row counts. The scores are on their device.
        query_persons: [Q], integers.
        query_cameras: [Q], integers.
        gallery_persons: [G], integers; 0 are distractors, -1 junk.
        gallery_cameras: [G], integers.
        max_rank: R of the CMC, 1 or more; at most G without junk.
        ap: "standard": mean precision at the ranks of the relevant items. "oxford": precision is averaged with that
            just before each of them, as the MATLAB codes of Market-1501 and MARS do. It is never larger.

    Returns:
        The scores.

    Raises:
        ValueError: shapes that do not fit, a distance that is NaN, or an argument outside its range.
        DataError: no query can be scored, or the gallery holds nothing but junk.

    Source: Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015; INP from Ye et al., Deep Learning
        for Person Re-identification, https://arxiv.org/abs/2001.04193.

    Example:
        >>> one, other = torch.tensor([1]), torch.tensor([2, 1, 1])
        >>> scores = rank(torch.tensor([[0.1, 0.2, 0.3]]), one, torch.tensor([0]), other, torch.tensor([1, 1, 2]))
        >>> scores.cmc, scores.mean_ap
        (tensor([0., 1., 1.], dtype=torch.float64), tensor(0.5833, dtype=torch.float64))
    """
    _check_options(max_rank, ap)
    queries, gallery = query_persons.shape, gallery_persons.shape
    if (
        not len(queries) == len(gallery) == 1
        or query_cameras.shape != queries
        or gallery_cameras.shape != gallery
        or distances.shape != (*queries, *gallery)
    ):
        raise ValueError(
            "distances must be [Q, G], persons and cameras of queries [Q] and of the gallery [G], got "
            f"{list(distances.shape)}, {list(queries)}, {list(query_cameras.shape)}, {list(gallery)} and "
            f"{list(gallery_cameras.shape)}"
        )
    query_persons, query_cameras, gallery_persons, gallery_cameras = (
        each.to(distances.device) for each in (query_persons, query_cameras, gallery_persons, gallery_cameras)
    )
    kept = gallery_persons != _JUNK
    columns = (gallery_persons[kept], gallery_cameras[kept])
    _check_sizes(len(query_persons), int(kept.sum()))
    parts = []
    for rows in _chunks(len(query_persons), len(gallery_persons), distances.device):
        some = distances[rows][:, kept]
        if bool(some.isnan().any()):
            raise ValueError("distances must not be NaN: they have no order")
        parts.append(_count(some, query_persons[rows], query_cameras[rows], *columns, ap))
    return _scores(parts, int(kept.sum()), max_rank)


def _check_options(max_rank: int, ap: str) -> None:
    if max_rank < 1:
        raise ValueError(f"max_rank must be 1 or more, got {max_rank}")
    if ap not in ("standard", "oxford"):
        raise ValueError(f"ap must be 'standard' or 'oxford', got {ap!r}")


def _check_sizes(queries: int, gallery: int) -> None:
    if not queries:
        raise DataError("there is no query")
    if not gallery:
        raise DataError("the gallery has no item but junk (person -1)")


def _chunks(queries: int, gallery: int, device: torch.device) -> tuple[Tensor, ...]:
    return torch.arange(queries, device=device).split(max(1, _PAIRS_AT_ONCE // max(1, gallery)))


def _count(
    distances: Tensor,
    query_persons: Tensor,
    query_cameras: Tensor,
    gallery_persons: Tensor,
    gallery_cameras: Tensor,
    ap: AveragePrecision,
) -> _Counts:
    """What the scores are made of, for some queries against a gallery without junk."""
    order = distances.argsort(dim=1, stable=True)
    match = gallery_persons[order] == query_persons[:, None]
    kept = ~(match & (gallery_cameras[order] == query_cameras[:, None]))
    match &= kept
    place = kept.cumsum(dim=1)  # from 1, of the items that are kept
    hits = match.cumsum(dim=1)
    relevant = match.sum(dim=1)
    precision = hits.double() / place.clamp(min=1)
    if ap == "oxford":
        before = torch.where(place > 1, (hits - 1).double() / (place - 1).clamp(min=1), 1.0)
        precision = (precision + before) / 2
    last = (place * match).amax(dim=1)
    return _Counts(
        first=place.masked_fill(~match, place.shape[1] + 1).amin(dim=1) - 1,
        average_precision=(precision * match).sum(dim=1) / relevant.clamp(min=1),
        inverse_penalty=relevant.double() / last.clamp(min=1),
        scored=relevant > 0,
    )


def _scores(parts: list[_Counts], gallery: int, max_rank: int) -> RetrievalScores:
    first, average_precision, inverse_penalty, scored = (torch.cat(values) for values in zip(*parts, strict=True))
    number = int(scored.sum())
    if not number:
        raise DataError(
            f"none of the {len(scored)} queries has a match in the gallery that another camera took: nothing to score"
        )
    ranks = torch.arange(min(max_rank, gallery), device=first.device)
    found = torch.bincount(first[scored], minlength=len(ranks) + 1)[: len(ranks)]
    average_precision = average_precision[scored]
    return RetrievalScores(
        cmc=found.cumsum(dim=0).double() / number,
        mean_ap=average_precision.mean(),
        mean_inp=inverse_penalty[scored].mean(),
        scored=scored.sum(),
        skipped=(~scored).sum(),
        average_precisions=average_precision,
    )


class RetrievalMeter(Metric):
    """Collects the features of queries and of a gallery, and scores how they are retrieved, see `rank`.

    The scores do not depend on batches. Where processes take turns at the items, each the next, they do not depend on
    the number of processes either. Features are kept in float32. Distances are computed in float64, for some queries at
    a time and part by part of the gallery, so that nothing but the features is as large as the gallery.

    Args:
        metric: "euclidean", or "cosine": features are scaled to length 1.
        max_rank: R of the CMC, 1 or more.
        ap: how precisions become an average precision, see `rank`.
        rerank: options of `gingham.ops.k_reciprocal_rerank`, ``k1``, ``k2`` and ``lambda_value``, the rest of which are
            its defaults: the scores then have those after re-ranking in their entry ``reranked``. None: they have not.
            With ``compat: torchreid`` distances are squared twice, as that toolbox does by mistake, and a matrix of all
            distances is in memory.
        shown: for how many queries, evenly taken from all that can be scored, the scores have the `SHOWN_ITEMS` nearest
            items, for pictures; 0 or more.

    Raises:
        ValueError: an argument outside its range.
        DataError: on `compute`, nothing can be scored.

    Example:
        >>> meter = RetrievalMeter()
        >>> meter.update(torch.eye(3), torch.tensor([1, 2, 3]), torch.tensor([0, 0, 0]), query=True)
        >>> meter.update(torch.eye(3), torch.tensor([1, 2, 7]), torch.tensor([1, 1, 1]), query=False)
        >>> scores = meter.compute()
        >>> scores.at(1), scores.scored, scores.skipped
        (tensor(1., dtype=torch.float64), tensor(2), tensor(1))
    """

    full_state_update = False
    features: list[Tensor]  # [n, D] each
    sightings: list[Tensor]  # [n, 4] each: person, camera, 1 for a query, and a number that orders all items

    def __init__(
        self,
        *,
        metric: Literal["euclidean", "cosine"] = "euclidean",
        max_rank: int = 50,
        ap: AveragePrecision = "standard",
        rerank: dict[str, Any] | None = None,
        shown: int = 0,
    ) -> None:
        super().__init__()
        if metric not in ("euclidean", "cosine"):
            raise ValueError(f"metric must be 'euclidean' or 'cosine', got {metric!r}")
        _check_options(max_rank, ap)
        if rerank is not None:
            if unknown := sorted(rerank.keys() - {"k1", "k2", "lambda_value", "compat"}):
                raise ValueError(f"rerank has no option {unknown[0]!r}: there are k1, k2, lambda_value, compat")
            if (compat := rerank.get("compat")) not in (None, "torchreid"):
                raise ValueError(f"rerank must have compat 'torchreid' or none, got {compat!r}")
            _rerank(torch.zeros(1, 1), torch.zeros(1, 1), **rerank)
        if shown < 0:
            raise ValueError(f"shown must be 0 or more, got {shown}")
        self.metric, self.max_rank, self.ap = metric, max_rank, ap
        self.rerank, self.shown = rerank, shown
        self._counted = 0
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("sightings", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, persons: Tensor, cameras: Tensor, query: bool | Tensor) -> None:
        """Collect a batch.

        Args:
            features: [n, D], floating, finite, D being that of all batches. Gradients do not pass.
            persons: [n], integers.
            cameras: [n], integers.
            query: whether the items are queries, bool [n] or one for all.

        Raises:
            ValueError: shapes that do not fit each other, or features of another D.
            DataError: a feature that is NaN or infinite.
        """
        if features.dim() != 2 or not persons.shape == cameras.shape == features.shape[:1]:
            raise ValueError(
                f"features must be [n, D], persons and cameras [n], got {list(features.shape)}, {list(persons.shape)} "
                f"and {list(cameras.shape)}"
            )
        if self.features and features.shape[1] != self.features[0].shape[1]:
            raise ValueError(f"features must be [n, {self.features[0].shape[1]}] as before, got {list(features.shape)}")
        persons, cameras = persons.to(features.device), cameras.to(features.device)
        is_query = torch.as_tensor(query, device=features.device)
        if is_query.shape not in ((), persons.shape):
            raise ValueError(f"query must be one bool or {list(persons.shape)}, got {list(is_query.shape)}")
        if not bool(features.isfinite().all()):
            raise DataError("features must be finite, got NaN or infinity: the network has diverged")
        several = dist.is_available() and dist.is_initialized()
        me, processes = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        numbers = (torch.arange(len(persons), device=persons.device) + self._counted) * processes + me
        columns = [persons.long(), cameras.long(), is_query.expand(persons.shape).long(), numbers]
        self._counted += len(persons)
        self.features.append(features.detach().to(torch.float32, copy=True))  # whose memory may be used again
        self.sightings.append(torch.stack(columns, dim=1))

    def reset(self) -> None:
        super().reset()
        self._counted = 0

    def compute(self) -> RetrievalScores:
        """The scores of everything collected so far."""
        features, sightings = (_joined(state) for state in (self.features, self.sightings))
        order = sightings[:, 3].argsort()
        order = order[sightings[order, 0] != _JUNK]
        persons, cameras, query, places = sightings.unbind(dim=1)
        asked, gallery = order[query[order] == 1], order[query[order] == 0]
        _check_sizes(len(asked), len(gallery))
        columns = (persons[gallery], cameras[gallery])
        parts = []
        for rows in _chunks(len(asked), len(gallery), features.device):
            some = asked[rows]
            distances = self._distances(features, some, gallery)
            parts.append(_count(distances, persons[some], cameras[some], *columns, self.ap))
        scores = _scores(parts, len(gallery), self.max_rank)
        if self.shown:
            scored = asked[torch.cat([part.scored for part in parts])]
            some = scored[torch.linspace(0, len(scored) - 1, min(self.shown, len(scored))).long()]
            distances = self._distances(features, some, gallery)
            nearest = _nearest(distances, persons[some], cameras[some], *columns)
            shown = torch.where(nearest < 0, -1, places[gallery][nearest])
            scores = scores._replace(galleries=torch.cat([places[some][:, None], shown], dim=1))
        if self.rerank is not None:
            distances = _rerank(self._scaled(features[asked]), self._scaled(features[gallery]), **self.rerank)
            options: dict[str, Any] = {"max_rank": self.max_rank, "ap": self.ap}
            again = rank(distances, persons[asked], cameras[asked], *columns, **options)
            scores = scores._replace(reranked=again)
        return scores

    def _scaled(self, features: Tensor) -> Tensor:
        return F.normalize(features) if self.metric == "cosine" else features

    def _distances(self, features: Tensor, queries: Tensor, gallery: Tensor) -> Tensor:
        """Squared distances, float64 [q, G], of the features at some places to those at others."""
        asked = self._scaled(features[queries])
        parts = gallery.split(_ROWS_AT_ONCE)
        return torch.cat([_squared_distances(asked, self._scaled(features[part])) for part in parts], dim=1)


def _nearest(
    distances: Tensor, query_persons: Tensor, query_cameras: Tensor, gallery_persons: Tensor, gallery_cameras: Tensor
) -> Tensor:
    """Places in the gallery of the nearest items that are kept, [Q, SHOWN_ITEMS], -1 where there are no more."""
    own = (gallery_persons == query_persons[:, None]) & (gallery_cameras == query_cameras[:, None])
    order = distances.masked_fill(own, torch.inf).argsort(dim=1, stable=True)[:, :SHOWN_ITEMS]
    return F.pad(order.masked_fill(own.gather(1, order), -1), (0, SHOWN_ITEMS - order.shape[1]), value=-1)


def _rerank(queries: Tensor, gallery: Tensor, *, compat: str | None = None, **options: Any) -> Tensor:
    if compat is None:
        return k_reciprocal_rerank(queries, gallery, **options)
    k_reciprocal_rerank(queries[:1], gallery[:1], **options)  # raises what is wrong with the options
    features = torch.cat([queries, gallery])
    squared = _squared_distances(features, features).clamp(min=0).fill_diagonal_(0)
    return rerank_distances(squared.square(), len(queries), **options)


def _squared_distances(queries: Tensor, gallery: Tensor) -> Tensor:
    one, other = queries.double(), gallery.double()
    return one.square().sum(dim=1)[:, None] + other.square().sum(dim=1) - 2 * one @ other.T


def _joined(state: Any) -> Tensor:
    # A list before torchmetrics has brought the processes' states together, a tensor after.
    if isinstance(state, Tensor):
        return state
    if not state:
        raise DataError("there is no query")
    return torch.cat(state)
