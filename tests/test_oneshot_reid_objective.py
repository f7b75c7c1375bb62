"""Pseudo labels and their confidence, selection, weighted losses, self-mined clusters, and the split of the target."""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("timm", reason="networks need the extra: pip install gingham[train]")
from gingham.errors import DataError
from gingham.methods.oneshot_reid.mining import (
    dbscan,
    jaccard_distances,
    mining_distances,
    mining_radius,
    source_distance,
)
from gingham.methods.oneshot_reid.network import EmbeddingOutput
from gingham.methods.oneshot_reid.objective import classification_loss, embedding_loss, pseudo_labels, select
from gingham.methods.oneshot_reid.split import one_shot_split, read_split, write_split
from gingham.nn.triplet_loss import triplet_loss
from gingham.ops import k_reciprocal_rerank


def people(count: int = 8, images: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normalised features around one direction a person, and the persons."""
    random = np.random.RandomState(seed)
    persons = np.repeat(np.arange(count), images)
    drawn = random.randn(count, 16)[persons] + 0.8 * random.randn(count * images, 16)
    return F.normalize(torch.from_numpy(drawn), dim=1), torch.from_numpy(persons)


# --- pseudo labels ----------------------------------------------------------------------------------------------------


def test_confidences_are_the_golden_ones() -> None:
    features, persons = people()
    first = torch.arange(48) % 6 == 0
    found = pseudo_labels(features[~first], features[first], persons[first])
    golden = torch.tensor([0.949198, 0.925967, 0.913019, 0.913480, 0.961641], dtype=torch.float64)
    torch.testing.assert_close(found.weights[:5], golden, rtol=0, atol=1e-6)
    figures = [float(x) for x in (found.weights.min(), found.weights.max(), found.weights.mean())]
    assert figures == pytest.approx([0.473511, 0.980611, 0.852078], abs=1e-6)
    right = found.persons == persons[~first]
    assert right.double().mean() == pytest.approx(0.925)
    assert found.weights[right].mean() > found.weights[~right].mean()
    distances = k_reciprocal_rerank(features[~first], features[first])
    row = [0.043708, 0.835146, 0.795446, 0.760281, 0.790590, 0.683511, 0.494308, 0.472850]
    assert distances[0].tolist() == pytest.approx(row, abs=1e-6)
    assert torch.equal(found.scores, -distances.amin(dim=1))


@pytest.mark.parametrize("metric", ["rerank", "euclidean"])
def test_a_copy_of_an_exemplar_gets_its_label_and_full_confidence(metric: Any) -> None:
    features, persons = people()
    first = torch.arange(48) % 6 == 0
    unlabelled = torch.cat([features[~first], features[first][3:4]])
    found = pseudo_labels(unlabelled, features[first], persons[first], metric=metric)
    assert found.persons[-1] == 3 and found.exemplars[-1] == 3
    assert float(found.weights[-1]) > 0.99
    assert bool(((found.weights >= 0) & (found.weights <= 1)).all())


def test_the_image_furthest_from_an_exemplar_sets_its_scale() -> None:
    labelled = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    unlabelled = torch.tensor([[1.0, 0.0], [4.0, 0.0], [12.0, 0.0]])
    found = pseudo_labels(unlabelled, labelled, torch.tensor([5, 6]), metric="euclidean")
    assert found.persons.tolist() == [5, 5, 6]
    assert found.weights.tolist() == pytest.approx([1 - 1 / 12, 1 - 4 / 12, 1 - 2 / 9])  # the furthest is no one's own
    alone = pseudo_labels(unlabelled, labelled[:1], torch.tensor([5]), metric="euclidean")
    assert alone.weights.tolist() == pytest.approx([1 - 1 / 12, 1 - 4 / 12, 0])  # and here it is


def test_the_nearest_single_exemplar_wins() -> None:
    labelled = torch.tensor([[0.0], [9.0], [4.0], [4.2]])
    found = pseudo_labels(torch.tensor([[8.0], [1.0]]), labelled, torch.tensor([1, 1, 2, 2]), metric="euclidean")
    assert found.persons.tolist() == [1, 1] and found.exemplars.tolist() == [1, 0]
    tied = pseudo_labels(torch.tensor([[2.0]]), labelled[[2, 0]], torch.tensor([2, 1]), metric="euclidean")
    assert tied.persons.tolist() == [2]


def test_an_exemplar_that_is_everything_gives_full_confidence() -> None:
    same = torch.ones(3, 2)
    assert pseudo_labels(same, same[:1], torch.tensor([0]), metric="euclidean").weights.tolist() == [1, 1, 1]
    nobody = pseudo_labels(same[:0], same[:1], torch.tensor([0]))
    assert [len(part) for part in nobody] == [0, 0, 0, 0]


def test_there_must_be_exemplars_and_a_known_metric() -> None:
    with pytest.raises(ValueError, match=r"^persons must be \[M\]"):
        pseudo_labels(torch.ones(2, 3), torch.ones(0, 3), torch.ones(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^metric must be"):
        pseudo_labels(torch.ones(2, 3), torch.ones(1, 3), torch.ones(1), metric="cosine")  # type: ignore[arg-type]


ONE_IS_NAN, ONE_IS_INFINITE = torch.tensor([[1.0, torch.nan]]), torch.tensor([[torch.inf, 1.0]])


@pytest.mark.parametrize("metric", ["rerank", "euclidean"])
@pytest.mark.parametrize(
    ("unlabelled", "labelled", "text"),
    [
        (ONE_IS_NAN, torch.ones(1, 2), "^unlabelled must be finite"),
        (torch.ones(1, 2), ONE_IS_INFINITE, "^labelled must be finite"),
        (torch.ones(1, 3), torch.ones(1, 2), r"^labelled must be \[n, D\] .* unlabelled \[1, 3\] .* labelled \[1, 2\]"),
        (torch.ones(1, 2), torch.ones(1, 2).double(), "^labelled must be .* torch.float64"),
        (torch.ones(2), torch.ones(1, 2), "^unlabelled must be"),
        (torch.ones(1, 2).long(), torch.ones(1, 2).long(), "^unlabelled must be"),
    ],
)
def test_features_that_cannot_be_compared_are_named(
    metric: Any, unlabelled: Tensor, labelled: Tensor, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        pseudo_labels(unlabelled, labelled, torch.tensor([0]), metric=metric)


@pytest.mark.parametrize("metric", ["rerank", "euclidean"])
def test_features_of_sixteen_bits_give_the_labels_of_what_they_hold(metric: Any) -> None:
    half = people()[0].half()
    persons = torch.arange(8)
    found = pseudo_labels(half[8:], half[:8], persons, metric=metric)
    expected = pseudo_labels(half[8:].float(), half[:8].float(), persons, metric=metric)
    for part, other in zip(found, expected, strict=True):
        assert torch.equal(part, other)


@pytest.mark.parametrize("metric", ["rerank", "euclidean"])
def test_confidences_of_copies_stay_within_their_range(metric: Any) -> None:
    copies = F.normalize(torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), dim=1).repeat(4, 1)
    for lambda_value in (0.0, 0.3):
        found = pseudo_labels(
            copies[3:], copies[:3], torch.arange(3), metric=metric, k1=3, k2=2, lambda_value=lambda_value
        )
        assert found.persons.tolist() == [0, 1, 2] * 3
        assert (found.weights <= 1).all() and (found.weights > 0.99).all()


@pytest.mark.parametrize("count", [12_185, 15_820, 40, 7])
def test_progressive_selection_grows_to_everything(count: int) -> None:
    scores = torch.rand(count, generator=torch.Generator().manual_seed(0))
    sizes = []
    for iteration in range(30):
        chosen = select(scores, iteration, 30, "progressive")
        sizes.append(int(chosen.sum()))
        if 0 < sizes[-1] < count:
            assert scores[chosen].min() >= scores[~chosen].max()
    assert sizes[0] == count // 30 and sizes[-1] == count
    assert sizes[:29] == [(t + 1) * (count // 30) for t in range(29)]
    assert select(scores, 0, 30).all()


@pytest.mark.parametrize("given", [(2, 2, "all"), (-1, 2, "all"), (0, 2, "some")])
def test_an_iteration_or_a_selection_that_does_not_exist_is_named(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^(iteration|selection) must be"):
        select(torch.ones(3), *given)


# --- losses -----------------------------------------------------------------------------------------------------------

POINTS = torch.tensor([[0.0, 0], [1, 0], [0, 2], [3, 0], [3, 1], [4, 0]])
PERSONS = torch.tensor([0, 0, 0, 1, 1, 1])
WEIGHTS = torch.tensor([1, 0.5, 0.8, 1, 0.25, 0.9])


@pytest.mark.parametrize(
    ("weighting", "mining", "golden"),
    [
        ("none", "hard", 0.12267800),
        ("none", "semi", 0.12267800),
        ("sample", "hard", 0.06133900),
        ("batch", "hard", 0.09098618),
        ("batch", "semi", 0.09098618),
        ("sample", "semi", 0.06133900),
    ],
)
def test_both_outputs_are_weighted(weighting: Any, mining: Any, golden: float) -> None:
    once = EmbeddingOutput(POINTS, torch.zeros(6, 2) + 10 * PERSONS[:, None])  # the other one's triplets are fulfilled
    for output, times in ((once, 1), (EmbeddingOutput(POINTS, POINTS), 2)):
        loss = embedding_loss(output, PERSONS, WEIGHTS, margin=0.5, mining=mining, weighting=weighting)
        assert float(loss) == pytest.approx(times * golden, abs=1e-7)


def test_parts_add_their_triplets() -> None:
    """Two parts at the points of the golden loss; the second has persons of its own."""
    far = torch.zeros(6, 2) + 10 * PERSONS[:, None]
    output = EmbeddingOutput(far, far, parts=torch.stack([POINTS, POINTS], dim=1))
    for weighting, golden in (("none", 0.12267800), ("sample", 0.06133900), ("batch", 0.09098618)):
        loss = embedding_loss(output, PERSONS, WEIGHTS, weighting=weighting)  # type: ignore[arg-type]
        assert float(loss) == pytest.approx(2 * golden, abs=1e-7)
    own = torch.stack([PERSONS, PERSONS[[3, 0, 1, 2, 4, 5]]], dim=1)
    second = triplet_loss(POINTS, own[:, 1], margin=0.5, mining="semi")
    assert float(embedding_loss(output, PERSONS, part_persons=own)) == pytest.approx(0.12267800 + float(second))
    assert abs(float(second) - 0.122678) > 0.1


def test_a_part_without_triplets_adds_nothing() -> None:
    far = torch.zeros(6, 2) + 10 * PERSONS[:, None]
    output = EmbeddingOutput(far, far, parts=POINTS[:, None])
    for persons, mining in (
        (torch.zeros(6, 1), "semi"),
        (torch.zeros(6, 1), "hard"),
        (torch.arange(6)[:, None], "semi"),
    ):
        assert float(embedding_loss(output, PERSONS, part_persons=persons.long(), mining=mining)) == 0  # type: ignore[arg-type]
    assert float(embedding_loss(output, PERSONS, part_persons=torch.arange(6)[:, None], mining="hard", margin=0.5)) == 0
    with pytest.raises(ValueError, match=r"^part_persons must be \[B, P\]"):
        embedding_loss(output, PERSONS, part_persons=torch.zeros(6, 2))


@pytest.mark.parametrize("weighting", ["sample", "batch"])
def test_full_confidence_is_no_weighting(weighting: Any) -> None:
    torch.manual_seed(0)
    output = EmbeddingOutput(torch.randn(6, 4), torch.randn(6, 3))
    for mining in ("hard", "semi"):
        plain = embedding_loss(output, PERSONS, mining=mining)
        assert torch.equal(plain, embedding_loss(output, PERSONS, torch.ones(6), mining=mining, weighting=weighting))
    logits = torch.randn(6, 2)
    plain = classification_loss(logits, PERSONS)
    assert torch.equal(plain, classification_loss(logits, PERSONS, torch.ones(6), weighting=weighting))


def test_confidences_get_no_gradient_and_none_at_all_gives_none() -> None:
    weights = WEIGHTS.clone().requires_grad_()
    points = POINTS.clone().requires_grad_()
    loss = embedding_loss(EmbeddingOutput(points, points), PERSONS, weights)
    loss = loss + classification_loss(points, PERSONS, weights)
    loss.backward()
    assert weights.grad is None and points.grad is not None and points.grad.abs().sum() > 0
    points.grad = None
    nothing = torch.zeros(6)
    loss = embedding_loss(EmbeddingOutput(points, points), PERSONS, nothing)
    (loss + classification_loss(points, PERSONS, nothing)).backward()
    assert points.grad is not None and not points.grad.any()  # type: ignore[attr-defined]


def test_cross_entropy_is_weighted_by_image_or_by_batch() -> None:
    logits = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 3]])
    labels, weights = torch.tensor([0, 1, 1]), torch.tensor([1, 0.5, 0.25])
    parts = F.cross_entropy(logits, labels, reduction="none")
    assert float(classification_loss(logits, labels, weights)) == pytest.approx(0.42966595, abs=1e-7)
    by_batch = classification_loss(logits, labels, weights, weighting="batch")
    assert float(by_batch) == pytest.approx(float(weights.mean() * parts.mean()), abs=1e-6)
    assert float(classification_loss(logits, labels, weights, weighting="none")) == pytest.approx(float(parts.mean()))


def test_an_unknown_weighting_is_named() -> None:
    for call in (embedding_loss, classification_loss):
        with pytest.raises(ValueError, match=r"^weighting must be"):
            call(EmbeddingOutput(POINTS, POINTS), PERSONS, weighting="all")  # type: ignore[operator]


# --- clusters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 17, 48])
def test_jaccard_distances_of_all_pairs_are_those_of_reranking(count: int) -> None:
    features = people()[0][torch.randperm(48, generator=torch.Generator().manual_seed(1))][:count]
    distances = jaccard_distances(features, k1=6, k2=3)
    assert torch.equal(distances, distances.T)
    assert not distances.diagonal().any() and distances.min() >= 0 and distances.max() <= 1
    half = count // 2  # of which re-ranking knows what lies between the halves
    known = k_reciprocal_rerank(features[:half], features[half:], k1=6, k2=3, lambda_value=0.0)
    torch.testing.assert_close(distances[:half, half:], known, rtol=0, atol=1e-12)
    for one in range(count if count < 20 else 0):
        others = [index for index in range(count) if index != one]
        known = k_reciprocal_rerank(features[[one]], features[others], k1=6, k2=3, lambda_value=0.0)
        torch.testing.assert_close(distances[one, others], known[0].clamp(min=0), rtol=0, atol=1e-12)


def test_nothing_and_one_image_have_no_pairs() -> None:
    assert jaccard_distances(torch.ones(0, 3)).shape == (0, 0)
    assert jaccard_distances(torch.ones(1, 3)).tolist() == [[0.0]]


def test_the_distance_from_the_source_is_the_golden_one() -> None:
    delta = source_distance(torch.tensor([[0.0, 1], [0.5, 0.5], [2, 3]]))
    assert delta.tolist() == pytest.approx([0, 0.22532621, 1], abs=1e-7)
    assert source_distance(torch.zeros(2, 1)).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"^distances must be"):
        source_distance(torch.zeros(2, 0))


def test_mining_adds_how_far_both_images_are_from_the_source() -> None:
    target = people(3, 4)[0]
    source = people(2, 3, seed=1)[0]
    delta = source_distance(torch.cdist(target, source))
    for diagonal in ("zero", "keep"):
        distances = mining_distances(target, source, k1=3, k2=1, source_share=0.1, diagonal=diagonal)  # type: ignore[arg-type]
        expected = 0.9 * jaccard_distances(target, k1=3, k2=1) + 0.1 * (delta + delta[:, None])
        if diagonal == "zero":
            expected.fill_diagonal_(0)
        torch.testing.assert_close(distances, expected)
    alone = mining_distances(target, source, k1=3, k2=1, source_share=0)
    assert torch.equal(alone, jaccard_distances(target, k1=3, k2=1))
    for given, text in (
        ((target, source[:0]), "^source must be"),
        ((target, source.index_fill(0, torch.tensor([1]), torch.nan)), "^source must be finite"),
        ((target.index_fill(0, torch.tensor([1]), torch.inf), source), "^target must be finite"),
        ((target, source.float()), "^source must be .* a floating dtype in common"),
        ((target, source[:, 1:]), "^source must be .* D and"),
    ):
        with pytest.raises(ValueError, match=text):
            mining_distances(*given, k1=3, k2=1)
    half = mining_distances(target.half(), source.half(), k1=3, k2=1)
    assert torch.equal(half, mining_distances(target.half().float(), source.half().float(), k1=3, k2=1))


def test_the_part_of_the_source_is_the_golden_one() -> None:
    """Alone, with points whose nearest image of the source is 0, 0.5 and 2 away."""
    target, source = torch.tensor([[0.0, 0.0], [0.0, 0.5], [0.0, -2.0]]), torch.zeros(1, 2)
    kept = mining_distances(target, source, k1=1, k2=1, source_share=1.0, diagonal="keep")
    golden = [[0, 0.22532621, 1], [0.22532621, 0.45065242, 1.22532621], [1, 1.22532621, 2]]
    torch.testing.assert_close(kept, torch.tensor(golden), rtol=0, atol=1e-6)
    zero = mining_distances(target, source, k1=1, k2=1, source_share=1.0)
    assert torch.equal(zero, kept.fill_diagonal_(0))


NEAR = torch.tensor([[0, 0.1, 0.2, 0.9], [0.1, 0, 0.3, 0.8], [0.2, 0.3, 0, 0.7], [0.9, 0.8, 0.7, 0]])


def test_the_radius_is_the_mean_of_the_smallest_distances() -> None:
    assert mining_radius(NEAR, share=0.5) == pytest.approx(0.2)
    assert mining_radius(NEAR, share=1 / 6) == pytest.approx(0.1)
    twins = torch.block_diag(NEAR, torch.zeros(1, 1))
    assert mining_radius(twins, share=0.5) == pytest.approx(0.2)  # distances of zero do not count
    random = torch.rand(60, 60, generator=torch.Generator().manual_seed(0))
    above = random[torch.ones(60, 60).triu(1).bool()].double().sort().values
    before = random.clone()
    assert mining_radius(random, share=0.01) == pytest.approx(float(above[:18].mean()), rel=1e-12)
    assert torch.equal(random, before)
    with pytest.raises(ValueError, match=r"^share must select a pair at least"):
        mining_radius(NEAR, share=0.01)
    with pytest.raises(ValueError, match=r"^share must be above 0"):
        mining_radius(NEAR, share=0)


def plain_dbscan(distances: list[list[float]], radius: float, min_samples: int) -> list[int]:
    """The algorithm of the paper, point by point, each cluster grown to its end before the next one."""
    count = len(distances)
    near = [[j for j in range(count) if distances[i][j] <= radius] for i in range(count)]
    labels, cluster = [-1] * count, 0
    for start in range(count):
        if labels[start] != -1 or len(near[start]) < min_samples:
            continue
        waiting = [start]
        while waiting:
            point = waiting.pop()
            if labels[point] == -1:
                labels[point] = cluster
                if len(near[point]) >= min_samples:
                    waiting += near[point]
        cluster += 1
    return labels


@pytest.mark.parametrize(("seed", "min_samples"), list(itertools.product(range(6), (1, 2, 4))))
def test_clusters_are_those_of_the_algorithm_point_by_point(seed: int, min_samples: int) -> None:
    places = torch.randn(40, 2, generator=torch.Generator().manual_seed(seed)).mul(4).round()
    distances = torch.cdist(places, places)
    found = set()
    for radius in (0.0, 1.0, 1.5, 3.0):
        labels = dbscan(distances, radius, min_samples).tolist()
        assert labels == plain_dbscan(distances.tolist(), radius, min_samples)
        found |= set(labels)
    assert 1 in found and (-1 in found or min_samples == 1)


def test_a_point_counts_itself_only_if_it_is_within_its_own_radius() -> None:
    near = torch.full((3, 3), 0.1).fill_diagonal_(0)
    assert dbscan(near, 0.2, min_samples=3).tolist() == [0, 0, 0]
    assert dbscan(near.fill_diagonal_(0.5), 0.2, min_samples=3).tolist() == [-1, -1, -1]


def test_all_noise_one_cluster_and_nothing() -> None:
    apart = 1 - torch.eye(5)
    assert dbscan(apart, 0.5).tolist() == [-1] * 5
    assert dbscan(apart, 1.0).tolist() == [0] * 5
    assert dbscan(torch.zeros(0, 0), 1.0).tolist() == []
    for given, name in (((apart[:2], 1.0, 4), "distances"), ((apart, -1.0, 4), "radius"), ((apart, 1.0, 0), "min_")):
        with pytest.raises(ValueError, match=f"^{name}"):
            dbscan(*given)


# --- the split --------------------------------------------------------------------------------------------------------

SHOWN = np.array([0, 0, 0, 0, 1, 1, 1, 2])
CAMERAS = np.array([1, 0, 0, 1, 2, 2, 3, 0])
NAMES = ["d", "c", "b", "a", "h", "g", "f", "e"]


@pytest.mark.parametrize(
    ("shots", "chosen"), [(1, "beg"), (2, "abefg"), (3, "abcefgh"), (4, "abcdefgh"), (9, "abcdefgh")]
)
def test_the_first_images_of_each_camera_in_turn(shots: int, chosen: str) -> None:
    split = one_shot_split(SHOWN, CAMERAS, NAMES, shots=shots, rule="first")
    assert "".join(split.labelled) == chosen


def test_random_images_come_from_the_same_cameras() -> None:
    random = np.random.default_rng(0)
    persons, cameras = np.repeat(np.arange(30), 12), random.integers(0, 3, 360) + np.repeat(np.arange(30) % 2, 12)
    names = [f"{index:04d}" for index in random.permutation(360)]
    for shots in (1, 2, 5):
        first = one_shot_split(persons, cameras, names, shots=shots, rule="first")
        splits = [one_shot_split(persons, cameras, names, shots=shots, seed=seed) for seed in (0, 0, 1)]
        assert splits[0] == splits[1] != splits[2]
        camera_of, person_of = (dict(zip(names, column.tolist(), strict=True)) for column in (cameras, persons))
        for split in splits:
            assert len(split.labelled) == 30 * shots
            shown = [sorted((person_of[name], camera_of[name]) for name in x.labelled) for x in (split, first)]
            assert shown[0] == shown[1]


def test_what_a_person_gets_does_not_depend_on_the_order_of_the_images() -> None:
    order = np.random.default_rng(1).permutation(8)
    split = one_shot_split(SHOWN, CAMERAS, NAMES, shots=2)
    assert one_shot_split(SHOWN[order], CAMERAS[order], [NAMES[index] for index in order], shots=2) == split


def test_a_split_of_a_big_data_set_takes_no_time() -> None:
    """As many images as MSMT17 has: one pass over them, not one for each person."""
    persons = np.arange(32_621) % 1_041
    names = [f"{index:05d}" for index in range(len(persons))]
    began = time.process_time()
    split = one_shot_split(persons, persons % 15, names, shots=2)
    assert time.process_time() - began < 0.7
    assert len(split.labelled) == 2 * 1_041


def test_a_split_comes_back_from_its_file_and_a_changed_one_does_not(tmp_path: Path) -> None:
    split = one_shot_split(SHOWN, CAMERAS, NAMES, dataset="toy", shots=2, seed=3)
    file = tmp_path / "split.json"
    write_split(file, split)
    assert read_split(file) == split
    content = json.loads(file.read_text())
    assert content.keys() == {"dataset", "shots", "seed", "rule", "labelled", "sha256"}
    for change, text in (
        ({"labelled": [*content["labelled"], "z"]}, "its names were changed"),
        ({"labelled": [1]}, "its rule or its names"),
        ({"labelled": [*content["labelled"], content["labelled"][1]]}, f"{content['labelled'][1]} is labelled twice"),
        ({"shots": "2"}, "it has no int 'shots'"),
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(DataError, match=f"split.json: .*{text}"):
            read_split(file)
    file.write_text("[")
    with pytest.raises(DataError, match=r"split\.json: is no JSON"):
        read_split(file)
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        read_split(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"shots": 0}, "^shots must be"),
        ({"rule": "last"}, "^rule must be"),
        ({"names": ["a"] * 7}, "^persons, cameras and names must be as many, got 8, 8, 7"),
        ({"names": [*"abcdefga"]}, "^names must be different, there are two images 'a'"),
    ],
)
def test_options_of_a_split_outside_their_range_are_named(options: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"persons": SHOWN, "cameras": CAMERAS, "names": NAMES} | options
    with pytest.raises(ValueError, match=f"^{text}"):
        one_shot_split(**given)
