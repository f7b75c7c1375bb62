"""CMC, mean average precision and INP against lists that can be followed by hand, and re-ranking in evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gingham.errors import DataError
from gingham.metrics.retrieval import RetrievalMeter, RetrievalScores, _rerank, _squared_distances, rank
from gingham.ops import k_reciprocal_rerank

QUERIES = (torch.tensor([1, 1, 2, 3]), torch.tensor([0, 1, 0, 0]))  # persons, cameras
GALLERY = (torch.tensor([1, 1, 1, 2, 2, 0, 3]), torch.tensor([0, 1, 2, 0, 1, 3, 0]))
DISTANCES = torch.tensor(
    [
        [0.05, 0.30, 0.60, 0.40, 0.20, 0.10, 0.70],
        [0.20, 0.05, 0.50, 0.30, 0.40, 0.10, 0.60],
        [0.90, 0.80, 0.20, 0.05, 0.30, 0.25, 0.70],
        [0.50, 0.40, 0.30, 0.20, 0.10, 0.60, 0.05],
    ]
)


def close(found: Tensor, expected: Any, atol: float = 1e-8) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


def toy() -> tuple[Tensor, Tensor]:
    """Features of 8 persons, 6 each, and which of them are queries."""
    random = np.random.RandomState(0)
    drawn = random.randn(8, 16)[np.repeat(np.arange(8), 6)] + 0.8 * random.randn(48, 16)
    return torch.from_numpy(drawn / np.linalg.norm(drawn, axis=1, keepdims=True)), torch.arange(48) % 6 == 0


def listed(relevant: list[int], ap: Any = "standard") -> RetrievalScores:
    """Scores of one query whose gallery, in the order of the distances, is relevant or not."""
    persons = torch.tensor([1 if x else 2 for x in relevant])
    distances = torch.arange(len(relevant)).float()[None]
    return rank(distances, torch.tensor([1]), torch.tensor([0]), persons, torch.ones_like(persons), ap=ap)


@pytest.mark.parametrize(
    ("relevant", "standard", "oxford"),
    [
        ([1, 1, 0, 1, 0, 0, 1], 0.830357143, 0.811011905),
        ([0, 1], 0.5, 0.25),
        ([0, 0, 0, 1], 0.25, 0.125),
        ([1, 0], 1.0, 1.0),
    ],
)
def test_average_precision_of_a_list(relevant: list[int], standard: float, oxford: float) -> None:
    assert listed(relevant).mean_ap.item() == pytest.approx(standard, abs=1e-9)
    assert listed(relevant, "oxford").mean_ap.item() == pytest.approx(oxford, abs=1e-9)


def test_the_toy_by_hand() -> None:
    scores = rank(DISTANCES, *QUERIES, *GALLERY, max_rank=5)
    close(scores.cmc, [0, 1 / 3, 1, 1, 1])
    close(scores.average_precisions, [0.366666667, 0.45, 0.333333333])
    assert scores.mean_ap.item() == pytest.approx(0.383333333, abs=1e-9)
    assert scores.mean_inp.item() == pytest.approx((0.4 + 0.4 + 1 / 3) / 3, abs=1e-9)
    assert (scores.scored, scores.skipped) == (3, 1)  # the only match of the fourth is of its own camera
    oxford = rank(DISTANCES, *QUERIES, *GALLERY, ap="oxford")
    close(oxford.average_precisions, [0.245833333, 0.2875, 0.166666667])


def test_distractors_stay_and_items_of_the_own_camera_go() -> None:
    """What the scores of the toy would be with the two common mistakes."""
    persons, cameras = GALLERY
    without = persons != 0
    mistaken = rank(DISTANCES[:, without], *QUERIES, persons[without], cameras[without], max_rank=3)
    close(mistaken.cmc, [1 / 3, 1, 1])
    kept = rank(DISTANCES, *QUERIES, persons, torch.full_like(cameras, 9))
    assert kept.cmc[0] == 1 and kept.scored == 4


def test_junk_counts_for_nothing_and_another_person_of_the_own_camera_counts() -> None:
    persons, cameras = torch.cat([GALLERY[0], torch.tensor([-1, -1])]), torch.cat([GALLERY[1], torch.tensor([0, 4])])
    nearest = torch.cat([DISTANCES, torch.zeros(4, 2)], dim=1)
    for one, other in zip(rank(nearest, *QUERIES, persons, cameras), rank(DISTANCES, *QUERIES, *GALLERY), strict=True):
        assert one is other is None or torch.equal(one, other)
    same_camera = rank(
        torch.tensor([[0.1, 0.2]]), torch.tensor([1]), torch.tensor([0]), torch.tensor([2, 1]), torch.tensor([0, 1])
    )
    close(same_camera.cmc, [0, 1])


def by_the_definition(query: tuple[int, int], row: list[float], gallery: list[tuple[int, int]]) -> list[int]:
    """Which items of a query's list, the nearest first, are relevant."""
    order = sorted(range(len(row)), key=lambda i: (row[i], i))
    return [int(gallery[i][0] == query[0]) for i in order if gallery[i] != query and gallery[i][0] != -1]


@pytest.mark.parametrize("seed", range(4))
def test_scores_follow_the_definition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    distances = draw(0, 12, 20, 25).float()  # with ties
    queries, gallery = (draw(1, 6, 20), draw(0, 3, 20)), (draw(-1, 6, 25), draw(0, 3, 25))
    lists = [
        by_the_definition(query, row, list(zip(*(x.tolist() for x in gallery), strict=True)))
        for query, row in zip(zip(*(x.tolist() for x in queries), strict=True), distances.tolist(), strict=True)
    ]
    scored = [relevant for relevant in lists if any(relevant)]
    scores = rank(distances, *queries, *gallery, max_rank=7)
    assert (scores.scored, scores.skipped) == (len(scored), 20 - len(scored))
    close(scores.cmc, [sum(any(x[: r + 1]) for x in scored) / len(scored) for r in range(7)])
    precisions = [[sum(x[: i + 1]) / (i + 1) for i in range(len(x)) if x[i]] for x in scored]
    close(scores.average_precisions, [sum(x) / len(x) for x in precisions])
    penalties = [sum(x) / (max(i for i in range(len(x)) if x[i]) + 1) for x in scored]
    assert scores.mean_inp.item() == pytest.approx(sum(penalties) / len(penalties))


def test_only_the_order_of_distances_counts() -> None:
    whole = rank(DISTANCES, *QUERIES, *GALLERY)
    for other in (DISTANCES.square(), 3 * DISTANCES - 7, DISTANCES.double().exp(), DISTANCES.half()):
        again = rank(other, *QUERIES, *GALLERY)
        assert torch.equal(again.cmc, whole.cmc) and torch.equal(again.mean_ap, whole.mean_ap)


def test_ties_go_to_the_item_that_comes_first() -> None:
    persons, cameras = torch.tensor([2, 1, 1, 2]), torch.tensor([1, 1, 1, 1])
    scores = rank(torch.zeros(1, 4), torch.tensor([1]), torch.tensor([0]), persons, cameras)
    close(scores.cmc, [0, 1, 1, 1])
    assert scores.mean_ap.item() == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_a_small_gallery_has_few_ranks() -> None:
    assert rank(DISTANCES[:1, :3], QUERIES[0][:1], QUERIES[1][:1], GALLERY[0][:3], GALLERY[1][:3]).cmc.shape == (3,)
    assert rank(DISTANCES, *QUERIES, *GALLERY, max_rank=2).cmc.shape == (2,)
    assert rank(DISTANCES, *QUERIES, *GALLERY).at(20) == 1 and rank(DISTANCES, *QUERIES, *GALLERY).at(2) == 1 / 3


@pytest.mark.filterwarnings("ignore")
def test_nothing_to_score_is_an_error() -> None:
    junk = torch.full_like(GALLERY[0], -1)
    with pytest.raises(DataError, match="the gallery has no item but junk"):
        rank(DISTANCES, *QUERIES, junk, GALLERY[1])
    with pytest.raises(DataError, match="none of the 1 queries has a match"):
        rank(DISTANCES[3:], QUERIES[0][3:], QUERIES[1][3:], *GALLERY)
    with pytest.raises(DataError, match="there is no query"):
        rank(DISTANCES[:0], QUERIES[0][:0], QUERIES[1][:0], *GALLERY)
    with pytest.raises(DataError, match="there is no query"):
        RetrievalMeter().compute()


def test_arguments_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match=r"distances must be \[Q, G\]"):
        rank(DISTANCES.T, *QUERIES, *GALLERY)
    with pytest.raises(ValueError, match="max_rank must be 1 or more, got 0"):
        rank(DISTANCES, *QUERIES, *GALLERY, max_rank=0)
    with pytest.raises(ValueError, match="ap must be 'standard' or 'oxford'"):
        rank(DISTANCES, *QUERIES, *GALLERY, ap="matlab")  # type: ignore[arg-type]
    for options, reason in (
        ({"metric": "dot"}, "metric must be"),
        ({"max_rank": 0}, "max_rank must be"),
        ({"rerank": {"k": 3}}, "rerank has no option 'k'"),
        ({"rerank": {"k1": 0}}, "k1"),
        ({"rerank": {"compat": "fast-reid"}}, "rerank must have compat 'torchreid' or none"),
        ({"shown": -1}, "shown must be"),
    ):
        with pytest.raises(ValueError, match=reason):
            RetrievalMeter(**options)
    with pytest.raises(ValueError, match=r"features must be \[n, D\]"):
        RetrievalMeter().update(torch.zeros(2, 3), torch.zeros(1), torch.zeros(2), True)
    with pytest.raises(DataError, match="features must be finite"):
        RetrievalMeter().update(torch.full((1, 3), torch.nan), torch.zeros(1), torch.zeros(1), True)
    meter, persons = RetrievalMeter(), torch.tensor([1, 2])
    meter.update(torch.zeros(2, 3), persons, persons, True)
    with pytest.raises(ValueError, match=r"features must be \[n, 3\] as before, got \[2, 4\]"):
        meter.update(torch.zeros(2, 4), persons, persons, False)
    with pytest.raises(ValueError, match=r"query must be one bool or \[2\], got \[3\]"):
        meter.update(torch.zeros(2, 3), persons, persons, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="rank must be 1 or more, got 0"):
        rank(DISTANCES, *QUERIES, *GALLERY).at(0)


def test_distances_without_an_order_are_refused() -> None:
    unordered = DISTANCES.clone()
    unordered[2, 3] = torch.nan
    with pytest.raises(ValueError, match="distances must not be NaN"):
        rank(unordered, *QUERIES, *GALLERY)
    junk = torch.where(torch.arange(7) == 3, -1, GALLERY[0])  # of what counts for nothing anything will do
    assert rank(unordered, *QUERIES, junk, GALLERY[1]).scored == 3


def test_a_meter_keeps_neither_graph_nor_memory_of_what_it_is_given() -> None:
    meter, features = RetrievalMeter(), 2 * torch.ones(2, 3, requires_grad=True)
    meter.update(features, torch.tensor([1, 2]), torch.tensor([0, 0]), True)
    features.detach().zero_()
    assert not meter.features[0].requires_grad and (meter.features[0] == 2).all()


# ------------------------------------------------------------------------------------------------ the meter


def people(count: int = 12, each: int = 5, noise: float = 0.9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, persons, cameras and which are queries: noisy copies of a vector for each person, in any order."""
    generator = torch.Generator().manual_seed(0)
    persons = torch.arange(1, count + 1).repeat_interleave(each)
    features = torch.randn(count, 8, generator=generator).repeat_interleave(each, 0)
    features = features + noise * torch.randn(features.shape, generator=generator)
    cameras = torch.arange(len(persons)) % each % 3
    order = torch.randperm(len(persons), generator=generator)
    persons[-1], persons[-7] = 0, -1
    return features[order], persons[order], cameras[order], (torch.arange(len(persons)) % each == 0)[order]


def measured(batch: int = 99, items: int = 60, **options: Any) -> RetrievalScores:
    features, persons, cameras, query = (x[:items] for x in people())
    meter = RetrievalMeter(**options)
    for at in range(0, len(persons), batch):
        part = slice(at, at + batch)
        meter.update(features[part], persons[part], cameras[part], query[part])
    return meter.compute()


def same(one: RetrievalScores, other: RetrievalScores) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one[:6], other[:6], strict=True))


def test_the_meter_gives_the_scores_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    features, persons, cameras, query = people()
    distances = torch.cdist(features[query].double(), features[~query].double())
    expected = rank(distances, persons[query], cameras[query], persons[~query], cameras[~query])
    assert 0.2 < expected.cmc[0] < 1 and expected.skipped == 0
    assert same(measured(), expected) and same(measured(batch=7), expected)
    monkeypatch.setattr("gingham.metrics.retrieval._PAIRS_AT_ONCE", 100)  # a few queries at a time
    assert same(measured(), expected)
    sizes: list[int] = []

    def watched(one: Tensor, other: Tensor) -> Tensor:
        sizes.append(len(other))
        return _squared_distances(one, other)

    monkeypatch.setattr("gingham.metrics.retrieval._ROWS_AT_ONCE", 20)  # and a part of the gallery
    monkeypatch.setattr("gingham.metrics.retrieval._squared_distances", watched)
    assert same(measured(), expected) and max(sizes) == 20 and min(sizes) < 20
    unit = torch.nn.functional.normalize(features)
    cosine = rank(-(unit @ unit.T)[query][:, ~query], persons[query], cameras[query], persons[~query], cameras[~query])
    assert same(measured(metric="cosine"), cosine) and not same(cosine, expected)


def test_shown_galleries_are_of_places_and_without_the_own_camera() -> None:
    features, persons, cameras, query = people()
    shown = measured(batch=7, shown=4).galleries
    assert shown is not None and shown.shape == (4, 11) and len(set(shown[:, 0].tolist())) == 4
    for asked, *places in shown.tolist():
        assert query[asked] and len(set(places)) == 10
        away = [(float((features[asked] - features[i]).norm()), i) for i in range(60) if not query[i]]
        kept = [
            i
            for _, i in sorted(away)
            if persons[i] != -1 and (persons[i] != persons[asked] or cameras[i] != cameras[asked])
        ]
        assert places == kept[:10]
    meter = RetrievalMeter(shown=9)
    meter.update(torch.eye(4), torch.tensor([1, 1, 1, 2]), torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 0, 0]))
    few = meter.compute().galleries
    assert few is not None and few.tolist() == [[0, 2, 3] + [-1] * 8]


def test_reranked_scores_come_beside_the_plain_ones() -> None:
    features, persons, cameras, query = people()
    kept = persons != -1  # junk is nobody's neighbour
    features, persons, cameras, query = features[kept], persons[kept], cameras[kept], query[kept]
    options = {"k1": 6, "k2": 3, "lambda_value": 0.2}
    final = k_reciprocal_rerank(features[query], features[~query], **options)  # type: ignore[arg-type]
    expected = rank(final, persons[query], cameras[query], persons[~query], cameras[~query])
    found = measured(rerank=options)
    assert found.reranked is not None and same(found.reranked, expected) and same(found, measured())
    assert not same(found.reranked, found) and measured().reranked is None


def test_reranking_raises_the_scores_of_the_toy() -> None:
    features, query = toy()
    meter = RetrievalMeter(rerank={"k1": 6, "k2": 3, "lambda_value": 0.3})
    meter.update(features, torch.arange(48) // 6 + 1, query.long(), query)
    scores = meter.compute()
    assert scores.reranked is not None and scores.reranked.cmc[0] == 1
    assert scores.mean_ap.item() == pytest.approx(0.954583, abs=1e-6)
    assert scores.reranked.mean_ap.item() == pytest.approx(0.975649, abs=1e-6)
    final = k_reciprocal_rerank(features[query], features[~query], 6, 3, 0.3)
    plain = k_reciprocal_rerank(features[query], features[~query], 6, 3, 1.0)
    assert torch.equal(plain.argsort(dim=1), torch.cdist(features[query], features[~query]).argsort(dim=1))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = k_reciprocal_rerank(features[query], features[~query][order], 6, 3, 0.3)
    torch.testing.assert_close(shuffled, final[:, order])


def test_distances_squared_twice_give_the_numbers_of_torchreid() -> None:
    features, query = toy()
    final = _rerank(features[query], features[~query], k1=6, k2=3, lambda_value=0.3, compat="torchreid")
    close(final[0, :6], [0.014608, 0.077966, 0.033830, 0.028103, 0.064299, 0.877588], atol=1e-6)
    assert final.mean().item() == pytest.approx(0.754072, abs=1e-6)
    options: dict[str, Any] = {"k1": 6, "k2": 3}
    twice = measured(rerank=options | {"compat": "torchreid"})
    assert twice.reranked is not None and not same(twice.reranked, measured(rerank=options).reranked)  # type: ignore[arg-type]


def test_jaccard_distances_are_symmetric_and_scale_free() -> None:
    features = people()[0].double()
    jaccard = k_reciprocal_rerank(features[:30], features[30:], 6, 3, 0.0)
    swapped = k_reciprocal_rerank(features[30:], features[:30], 6, 3, 0.0)
    torch.testing.assert_close(jaccard, swapped.T)
    assert (jaccard > -1e-6).all() and (jaccard < 1 + 1e-6).all() and jaccard.min() < 0.9
    torch.testing.assert_close(k_reciprocal_rerank(7 * features[:30], 7 * features[30:], 6, 3, 0.0), jaccard)
    doubled = torch.cat([features[:20], features[:20]])
    diagonal = k_reciprocal_rerank(doubled[:20], doubled[20:], 5, 2, 0.0).diagonal()  # an item and its copy
    assert diagonal.abs().max() < 1e-6


def test_a_meter_begins_anew() -> None:
    meter = RetrievalMeter()
    features, persons, cameras, query = people()
    meter.update(torch.randn(9, 8), torch.arange(9), torch.arange(9), True)
    meter.reset()
    meter.update(features, persons, cameras, query)
    assert same(meter.compute(), measured())


def _score_share(rank: int, address: str, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    meter = RetrievalMeter(rerank={"k1": 6, "k2": 3})
    for one in zip(*(x[:59][rank::2].split(4) for x in people()), strict=True):
        meter.update(*one)
    scores = meter.compute()
    assert scores.reranked is not None
    results.put([x.tolist() for x in (*scores[:6], *scores.reranked[:6])])
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one_to_the_bit(tmp_path: Path) -> None:
    alone = measured(items=59, rerank={"k1": 6, "k2": 3})  # one process has more than the other
    assert alone.reranked is not None
    expected = [x.tolist() for x in (*alone[:6], *alone.reranked[:6])]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_score_share, args=(r, f"file://{tmp_path}/meet", queue)) for r in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=30)
    assert found[0] == found[1] == expected
