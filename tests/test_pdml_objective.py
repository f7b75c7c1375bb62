"""PDML's losses: golden values, the invariances of the metric, the memory, the extension, and two processes."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.errors import DataError
from gingham.methods.pdml.extension import extend_labels, nearest_cells, surest_pixels
from gingham.methods.pdml.memory import FeatureMemory
from gingham.methods.pdml.objective import (
    MetricTerms,
    PointPool,
    _GatheredRows,
    contrastive_metric,
    gather_rows,
    global_mean,
    point_cross_entropy,
    pool_points,
    prototype_metric,
    triplet_metric,
)
from gingham.nn.point_sampling import sample_at_points

FEATURES = torch.tensor([[3, 4], [6, 8], [4, 3], [-3, 4], [0, 2]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 0, 1, 1])
Metric = Callable[..., MetricTerms]
every_metric = pytest.mark.parametrize(
    "metric", [triplet_metric, contrastive_metric, prototype_metric], ids=["triplet", "contrastive", "prototype"]
)


def some(points: int = 23, channels: int = 6, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(points, channels, generator=generator, dtype=torch.float64)
    return features.requires_grad_(), torch.randint(classes, (points,), generator=generator)


def pool(*points: tuple[float, float, float, float]) -> PointPool:
    """Of points (image, class, y, x)."""
    images = int(max((point[0] for point in points), default=0)) + 1
    batch = torch.full((images, max(len(points), 1), 3), 255.0)
    for index, (image, *point) in enumerate(points):
        batch[int(image), index] = torch.tensor(point)
    return pool_points(batch)


# --- reading points --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("align_corners", "values"), [(True, [3.0, 5.0]), (False, [2.8, 5.2])])
def test_reading_goldens(align_corners: bool, values: list[float]) -> None:
    maps = torch.arange(9, dtype=torch.float64).reshape(1, 1, 3, 3)
    y, x = torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0])
    read = sample_at_points(maps, torch.tensor([0, 0]), y, x, (5, 5), align_corners=align_corners)
    assert read.flatten().tolist() == pytest.approx(values, abs=1e-6)
    corners = torch.tensor([[0.0, 0.0], [0.0, 4.0], [4.0, 0.0], [4.0, 4.0]])
    read = sample_at_points(maps, torch.zeros(4, dtype=torch.int64), *corners.T, (5, 5), align_corners=align_corners)
    assert read.flatten().tolist() == pytest.approx([0, 2, 6, 8])


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("small", "size"), [((5, 7), (33, 50)), ((1, 4), (6, 4)), ((9, 3), (9, 3)), ((8, 8), (3, 5))])
def test_reading_equals_upsampling_at_every_pixel(
    align_corners: bool, small: tuple[int, int], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 3, *small, dtype=torch.float64)
    full = F.interpolate(maps, size=size, mode="bilinear", align_corners=align_corners)
    image, y, x = (index.flatten() for index in torch.meshgrid(*map(torch.arange, (2, *size)), indexing="ij"))
    read = sample_at_points(maps, image, y.double(), x.double(), size, align_corners=align_corners)
    torch.testing.assert_close(read, full[image, :, y, x], rtol=1e-5, atol=1e-6)


def test_reading_between_pixels_is_bilinear_and_differentiable() -> None:
    torch.manual_seed(0)
    maps = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    y, x, zero = torch.tensor([2.5, 0.0]), torch.tensor([7.25, 99.0]), torch.zeros(2, dtype=torch.int64)
    whole = [[torch.tensor([float(math.floor(v) + k)]) for k in (0, 1)] for v in (2.5, 7.25)]
    four = [sample_at_points(maps, zero[:1], a, b, (7, 9))[0] for a in whole[0] for b in whole[1]]
    expected = sum(w * v for w, v in zip((0.375, 0.125, 0.375, 0.125), four, strict=True))
    torch.testing.assert_close(sample_at_points(maps, zero, y, x, (7, 9))[0], expected)
    torch.testing.assert_close(sample_at_points(maps, zero, y, x, (7, 9))[1], maps[0, :, 0, -1])  # beyond: the edge
    assert torch.autograd.gradcheck(lambda m: sample_at_points(m, zero, y, x, (7, 9)), maps)


def test_half_precision_maps_are_read_in_float32() -> None:
    maps = torch.rand(1, 2, 4, 5)
    y, x, zero = torch.tensor([2.5]), torch.tensor([1.0]), torch.tensor([0])
    read = sample_at_points(maps.bfloat16(), zero, y, x, (8, 10))
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, sample_at_points(maps.bfloat16().float(), zero, y, x, (8, 10)))


def test_reading_refuses_what_does_not_fit() -> None:
    point = torch.zeros(1)
    with pytest.raises(ValueError, match=r"maps must be \[B, C, h, w\], got \[2, 3\]"):
        sample_at_points(torch.zeros(2, 3), point.long(), point, point, (4, 4))
    with pytest.raises(ValueError, match=r"must be \[M\] alike, got \[1\], \[1\] and \[2\]"):
        sample_at_points(torch.zeros(1, 1, 2, 2), point.long(), point, torch.zeros(2), (4, 4))


# --- the pool --------------------------------------------------------------------------------------------------------


def test_pool_leaves_out_padding_and_repetitions() -> None:
    found = pool((0, 2, 5, 6), (0, 2, 5, 6), (0, 2, 5, 7), (1, 2, 5, 6), (1, 3, 0, 0), (0, 1, 9, 9))
    assert found.image.tolist() == [0, 0, 0, 1, 1]
    assert found.label.tolist() == [2, 2, 1, 2, 3]
    assert found.x.tolist() == [6, 7, 9, 6, 0]
    assert found.agreed.all()
    assert len(pool().label) == 0


def test_points_that_differ_on_a_pixel_stay_for_the_metric_only() -> None:
    found = pool((0, 2, 5, 6), (0, 1, 5, 6), (0, 1, 5, 6), (0, 1, 5, 9))
    assert found.label.tolist() == [2, 1, 1]
    assert found.agreed.tolist() == [False, False, True]


def test_pool_refuses_other_shapes() -> None:
    with pytest.raises(DataError, match=r"points must be \[B, N, 3\], got \[2, 3\]"):
        pool_points(torch.zeros(2, 3))


# --- cross-entropy ---------------------------------------------------------------------------------------------------


def test_cross_entropy_golden() -> None:
    logits = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 3]], dtype=torch.float64)
    points = pool((0, 0, 0, 0), (0, 1, 1, 0), (1, 0, 2, 0))
    assert point_cross_entropy(logits, points).item() == pytest.approx(1.295304, abs=1e-6)
    each = F.cross_entropy(logits, torch.tensor([0, 1, 0]), reduction="none")
    by_image = point_cross_entropy(logits, points, average="images")
    assert by_image.item() == pytest.approx(((each[0] + each[1]) / 2 + each[2]).item() / 2)


@pytest.mark.parametrize("average", ["points", "images"])
def test_images_and_pixels_without_points_do_not_count(average: Any) -> None:
    torch.manual_seed(0)
    maps = torch.randn(3, 4, 5, 6, requires_grad=True)
    points = pool((0, 1, 3, 3), (2, 0, 9, 11))

    def loss(at: PointPool) -> Tensor:
        logits = sample_at_points(maps, at.image, at.y, at.x, (17, 21))
        return point_cross_entropy(logits, at, average=average)

    (gradient,) = torch.autograd.grad(loss(points), maps)
    touched = gradient.abs().sum(dim=1) > 0
    assert touched.sum() == 8 and not touched[1].any()  # two points with four neighbours each
    moved = points._replace(image=torch.tensor([0, 1]))
    maps.data[1] = maps.data[2]
    torch.testing.assert_close(loss(moved), loss(points))


@pytest.mark.parametrize("average", ["points", "images"])
def test_no_points_cost_nothing(average: Any) -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    loss = point_cross_entropy(logits, pool(), average=average)
    loss.backward()
    assert loss == 0 and logits.grad is not None


def test_points_that_differ_on_a_pixel_are_left_out() -> None:
    logits = torch.randn(3, 4)
    points = pool((0, 2, 5, 6), (0, 1, 5, 6), (0, 1, 5, 9))
    torch.testing.assert_close(point_cross_entropy(logits, points), F.cross_entropy(logits[2:], torch.tensor([1])))


def test_classes_beyond_the_logits_are_named() -> None:
    with pytest.raises(DataError, match="points contain the class 7, which is none of 0 to 3"):
        point_cross_entropy(torch.zeros(1, 4), pool((0, 7, 0, 0)))


# --- the metric: values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "squared", "over_all", "over_active", "count"),
    [
        (0.2, False, 0.022222, 0.200000, 2),
        (0.3, False, 0.035446, 0.212676, 3),
        (0.5, False, 0.085489, 0.307761, 5),
        (1.0, False, 0.377753, 0.485683, 14),
        (0.2, True, 0.022222, 0.200000, 2),
        (0.3, True, 0.033333, 0.300000, 2),
        (0.5, True, 0.092222, 0.237143, 7),
        (1.0, True, 0.317778, 0.635556, 9),
    ],
)
def test_triplet_goldens(margin: float, squared: bool, over_all: float, over_active: float, count: int) -> None:
    active = triplet_metric(FEATURES, LABELS, margin=margin, squared=squared)
    assert active.loss.item() == pytest.approx(over_active, abs=1e-6)
    assert active.mean_over_all.item() == pytest.approx(over_all, abs=1e-6)
    assert active.active.item() == pytest.approx(count / 18)
    every = triplet_metric(FEATURES, LABELS, margin=margin, squared=squared, average="all")
    assert every.loss.item() == pytest.approx(over_all, abs=1e-6)


@pytest.mark.parametrize(("margin", "value"), [(0.5, 0.14), (1.0, 0.14 + 0.046887)])
def test_contrastive_goldens(margin: float, value: float) -> None:
    assert contrastive_metric(FEATURES, LABELS, margin=margin).loss.item() == pytest.approx(value, abs=1e-6)


def test_collapsed_features_cost_the_margin() -> None:
    features = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    terms = triplet_metric(features, torch.tensor([0, 0, 1, 1]), margin=0.3)
    assert terms.loss.item() == pytest.approx(0.3) and terms.active == 1
    (gradient,) = torch.autograd.grad(terms.loss, features)
    assert gradient.isfinite().all()  # a root of a sum of squares has no finite gradient here


def by_the_formula(
    features: Tensor,
    labels: Tensor,
    margin: float,
    *,
    images: list[int] | None = None,
    squared: bool = False,
    hardest: bool = False,
    memory: tuple[Tensor, Tensor] | None = None,
) -> list[float]:
    """Costs of all triplets, with loops."""
    rows = list(F.normalize(features.detach()).unbind())
    kinds = labels.tolist()
    anchors = len(rows)
    if memory is not None:
        rows += list(F.normalize(memory[0]).unbind())
        kinds += memory[1].tolist()

    def distance(i: int, j: int) -> float:
        return float((rows[i] - rows[j]).norm()) ** (2 if squared else 1)

    def near(i: int, j: int) -> bool:
        return images is None or images[i] == images[j]

    costs = []
    for a in range(anchors):
        positives = [distance(a, p) for p in range(len(rows)) if p != a and kinds[p] == kinds[a] and near(a, p)]
        negatives = [distance(a, n) for n in range(len(rows)) if kinds[n] != kinds[a] and near(a, n)]
        if hardest and positives and negatives:
            positives, negatives = [max(positives)], [min(negatives)]
        costs += [max(0.0, margin + p - n) for p, n in itertools.product(positives, negatives)]
    return costs


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("hardest", [False, True])
@pytest.mark.parametrize("extra", ["nothing", "images", "memory"])
def test_triplets_follow_the_formula(squared: bool, hardest: bool, extra: str) -> None:
    features, labels = some()
    others: dict[str, Any] = {}
    if extra == "images":
        others["images"] = torch.arange(23) % 3
    if extra == "memory":
        remembered, remembered_labels = some(11, seed=1)
        others["memory"] = remembered.detach(), remembered_labels
    expected = by_the_formula(
        features,
        labels,
        0.3,
        images=(torch.arange(23) % 3).tolist() if extra == "images" else None,
        squared=squared,
        hardest=hardest,
        memory=others.get("memory"),
    )
    positive = [cost for cost in expected if cost > 0]
    terms = triplet_metric(
        features, labels, margin=0.3, squared=squared, mining="hardest" if hardest else "all", **others
    )
    assert terms.loss.item() == pytest.approx(sum(positive) / len(positive), rel=1e-9)
    assert terms.mean_over_all.item() == pytest.approx(sum(expected) / len(expected), rel=1e-9)
    assert terms.active.item() == pytest.approx(len(positive) / len(expected))


def test_contrastive_pairs_follow_the_formula() -> None:
    features, labels = some()
    remembered, remembered_labels = some(5, seed=1)
    rows = F.normalize(torch.cat([features, remembered])).detach()
    kinds = torch.cat([labels, remembered_labels])
    pairs = [(i, j) for i, j in itertools.combinations(range(28), 2) if i < 23]  # the memory is not paired with itself
    same = [float((rows[i] - rows[j]).norm()) ** 2 for i, j in pairs if kinds[i] == kinds[j]]
    different = [max(0.0, 1.1 - float((rows[i] - rows[j]).norm())) ** 2 for i, j in pairs if kinds[i] != kinds[j]]
    terms = contrastive_metric(features, labels, margin=1.1, memory=(remembered, remembered_labels))
    assert terms.loss.item() == pytest.approx(sum(same) / len(same) + sum(different) / len(different))
    assert terms.active.item() == pytest.approx(sum(cost > 0 for cost in different) / len(different))


def test_prototypes_follow_the_formula() -> None:
    features, labels = some()
    labels[0] = 9  # alone in its class: no anchor, but a negative for the others
    rows = F.normalize(features).detach()
    means = {int(c): F.normalize(rows[labels == c].mean(0), dim=0) for c in labels.unique()}
    costs = [
        max(0.0, 0.3 + float((row - means[kind]).norm()) - float((row - means[other]).norm()))
        for row, kind in zip(rows, labels.tolist(), strict=True)
        for other in means
        if kind not in (9, other)
    ]
    terms = prototype_metric(features, labels, margin=0.3)
    assert terms.mean_over_all.item() == pytest.approx(sum(costs) / len(costs))
    assert terms.loss.item() == pytest.approx(sum(costs) / sum(cost > 0 for cost in costs))


@every_metric
def test_gradients_are_those_of_the_value(metric: Metric) -> None:
    features, labels = some(9, 3, 3)
    others = some(4, 3, 3, seed=2)
    memory = others[0].detach(), others[1]
    assert torch.autograd.gradcheck(lambda f: metric(f, labels, margin=0.7, memory=memory).loss, features)


# --- the metric: behaviour -------------------------------------------------------------------------------------------


@every_metric
def test_order_scale_and_rotation_change_nothing(metric: Metric) -> None:
    features, labels = some()
    expected = metric(features, labels).loss
    assert expected > 0
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(metric(features[order], labels[order]).loss, expected)
    factor = torch.rand(23, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    torch.testing.assert_close(metric(features * factor, labels).loss, expected)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    torch.testing.assert_close(metric(features @ rotation, labels).loss, expected)
    assert not torch.isclose(metric(features * factor, labels, normalise=False).loss, expected)


@every_metric
def test_gradient_is_orthogonal_to_the_feature(metric: Metric) -> None:
    features, labels = some()
    (gradient,) = torch.autograd.grad(metric(features, labels).loss, features)
    assert gradient.any()
    assert (features * gradient).sum(dim=1).abs().max() < 1e-15


@pytest.mark.parametrize(
    "metric",
    [triplet_metric, partial(triplet_metric, mining="hardest"), contrastive_metric, prototype_metric],
    ids=["triplet", "hardest", "contrastive", "prototype"],
)
@pytest.mark.parametrize(
    "labels", [[2, 2, 2, 2], [0, 1, 2, 3], [1], []], ids=["one class", "all classes", "one", "none"]
)
def test_without_triplets_there_is_no_cost(metric: Metric, labels: list[int]) -> None:
    features = torch.randn(len(labels), 5, requires_grad=True)
    margin = 1e-6 if metric is contrastive_metric else 0.3
    if metric is contrastive_metric and labels == [2, 2, 2, 2]:
        features = torch.ones(4, 5, requires_grad=True)  # pairs of one class cost their distance
    loss = metric(features, torch.tensor(labels, dtype=torch.int64), margin=margin).loss
    loss.backward()
    assert loss == 0
    assert features.grad is not None and not features.grad.any()


@every_metric
def test_one_point_a_class_in_each_image_needs_other_images(metric: Metric) -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(12, 5), torch.arange(4).repeat(3)
    images = torch.arange(3).repeat_interleave(4)
    margin = 1e-6 if metric is contrastive_metric else 0.3
    assert metric(features, labels, margin=margin, images=images).loss == 0
    assert metric(features, labels, margin=margin).loss > 0


def test_gradient_reaches_both_images_of_a_pair() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 24, requires_grad=True)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=4, padding=1), torch.nn.Tanh())
    points = pool((0, 1, 2, 3), (1, 1, 13, 20), (1, 0, 2, 2))
    features = sample_at_points(network(images), points.image, points.y, points.x, (16, 24))
    triplet_metric(features, points.label, margin=2.0).loss.backward()
    assert images.grad is not None and images.grad[0].any() and images.grad[1].any()


def test_separated_classes_cost_nothing_and_the_bounds_hold() -> None:
    apart = torch.tensor([[1.0, 0.0], [1.0, 0.01], [-1.0, 0.0], [-1.0, 0.01]])
    assert triplet_metric(apart, torch.tensor([0, 0, 1, 1])).loss == 0
    worst = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert triplet_metric(worst, torch.tensor([0, 0, 1, 1]), mining="hardest").loss.item() == pytest.approx(2.3)
    for seed in range(20):
        features, labels = some(seed=seed)
        assert 0 <= triplet_metric(features, labels).loss <= 2.3


def test_many_points_need_no_triplet_tensor() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(1500, 8, requires_grad=True), torch.randint(20, (1500,))
    terms = triplet_metric(features, labels)
    terms.loss.backward()
    assert features.grad is not None and features.grad.isfinite().all()
    part = triplet_metric(features[:80].double(), labels[:80])
    single = triplet_metric(features[:80], labels[:80])
    torch.testing.assert_close(single.loss.double(), part.loss, rtol=1e-5, atol=1e-6)


def test_low_precision_features_are_compared_in_float32() -> None:
    features, labels = some()
    low = features.detach().bfloat16()
    torch.testing.assert_close(triplet_metric(low, labels).loss, triplet_metric(low.float(), labels).loss)


@every_metric
def test_metrics_refuse_what_does_not_fit(metric: Metric) -> None:
    features, labels = some()
    for margin in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="margin must be above 0"):
            metric(features, labels, margin=margin)
    with pytest.raises(ValueError, match=r"features must be \[M, D\] and labels \[M\], got \[23, 6\] and \[22\]"):
        metric(features, labels[1:])
    with pytest.raises(ValueError, match=r"images must be \[M\] like labels"):
        metric(features, labels, images=labels[1:])
    with pytest.raises(ValueError, match=r"memory must be \[Q, 6\], got \[4, 5\]"):
        metric(features, labels, memory=(torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda f, k: triplet_metric(f, k, mining="hard"), "mining must be one of all, hardest, got 'hard'"),
        (lambda f, k: triplet_metric(f, k, average="actve"), "average must be one of active, all, got 'actve'"),
        (lambda f, k: prototype_metric(f, k, average="some"), "average must be one of active, all, got 'some'"),
        (
            lambda f, _: point_cross_entropy(f, pool(), average="point"),  # type: ignore[arg-type]
            "average must be one of points, images, got 'point'",
        ),
    ],
)
def test_misspelt_options_are_named(call: Callable[[Tensor, Tensor], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(*some())


# --- the memory ------------------------------------------------------------------------------------------------------


def test_memory_is_a_queue_for_each_class() -> None:
    memory = FeatureMemory(3, 1, size=3)
    values = lambda: {c: memory.contents()[0][memory.contents()[1] == c].flatten().tolist() for c in range(3)}  # noqa: E731
    memory.push(torch.tensor([[1.0], [10.0], [2.0]]), torch.tensor([0, 2, 0]))
    assert values() == {0: [1, 2], 1: [], 2: [10]}
    memory.push(torch.tensor([[3.0], [4.0], [5.0]]), torch.tensor([0, 0, 1]))
    assert values() == {0: [2, 3, 4], 1: [5], 2: [10]}
    memory.push(torch.arange(6.0, 11.0)[:, None], torch.zeros(5, dtype=torch.int64))
    assert values() == {0: [8, 9, 10], 1: [5], 2: [10]}
    memory.push(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))
    assert values() == {0: [8, 9, 10], 1: [5], 2: [10]}


@every_metric
def test_an_empty_memory_changes_nothing(metric: Metric) -> None:
    features, labels = some()
    memory = FeatureMemory(4, 6)
    assert torch.equal(metric(features, labels, memory=memory.contents()).loss, metric(features, labels).loss)


@every_metric
def test_memory_gives_a_lone_point_its_class_but_gets_no_gradient(metric: Metric) -> None:
    features, labels = torch.randn(3, 6, requires_grad=True), torch.tensor([0, 1, 2])
    remembered = torch.randn(9, 6, requires_grad=True)
    memory = FeatureMemory(3, 6, size=2)
    memory.push(remembered, torch.arange(3).repeat(3))
    assert not any(value.requires_grad for value in memory.contents())
    loss = metric(features, labels, margin=2.0, memory=memory.contents()).loss
    loss.backward()
    assert loss > 0 and features.grad is not None and features.grad.any(dim=1).all()
    assert remembered.grad is None
    direct = remembered.detach().requires_grad_()
    metric(features, labels, margin=2.0, memory=(direct, torch.arange(3).repeat(3))).loss.backward()
    assert direct.grad is None or not direct.grad.any()


def test_memory_is_saved() -> None:
    memory = FeatureMemory(3, 2, size=4)
    memory.push(torch.randn(7, 2), torch.tensor([0, 1, 0, 0, 0, 0, 2]))
    restored = FeatureMemory(3, 2, size=4)
    restored.load_state_dict(memory.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(restored.contents(), memory.contents(), strict=True))
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        FeatureMemory(3, 2, size=0)


# --- the extension ---------------------------------------------------------------------------------------------------


def extension_case(seed: int = 0) -> tuple[Tensor, PointPool]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 5, 6, 8, generator=generator)
    return logits, pool((0, 1, 0, 0), (0, 4, 20, 30), (1, 0, 5, 5), (1, 2, 23, 31), (1, 3, 12, 0))


def test_extended_labels_are_sure_and_of_the_images_classes() -> None:
    logits, points = extension_case()
    found = extend_labels(logits, points, (24, 32), threshold=0.6, largest_share=1.0)
    probability, best = logits.softmax(1).max(1)
    at = nearest_cells(points, (24, 32), (6, 8))
    others = torch.ones_like(best, dtype=torch.bool)
    others[points.image, at[0], at[1]] = False
    named = [{1, 4}, {0, 2, 3}]
    for image, row, column in others.nonzero().tolist():
        sure = probability[image, row, column] >= 0.6 and int(best[image, row, column]) in named[image]
        assert found.labels[image, row, column] == (best[image, row, column] if sure else 255)
    assert 0 < (found.labels != 255).sum() < others.sum()
    assert torch.equal(found.confidence > 0, found.labels != 255)


def test_thresholds_of_all_and_of_none() -> None:
    logits, points = extension_case()
    best = logits.argmax(1)
    named = torch.zeros_like(best, dtype=torch.bool)
    for image, classes in enumerate(([1, 4], [0, 2, 3])):
        named[image] = torch.isin(best[image], torch.tensor(classes))
    every = extend_labels(logits, points, (24, 32), threshold=0.0, largest_share=1.0)
    assert torch.equal(every.labels != 255, named)
    assert (extend_labels(logits, points, (24, 32), threshold=1.01).labels == 255).all()
    nothing = extend_labels(logits, pool(), (24, 32), threshold=0.0)
    assert (nothing.labels == 255).all()


def test_annotated_points_keep_their_class() -> None:
    logits, points = extension_case()
    logits[:, 4] += 20  # the network is sure of class 4 everywhere, which image 0 has
    found = extend_labels(logits, points, (24, 32), threshold=0.5, largest_share=1.0)
    assert found.labels[0, 0, 0] == 1 and (found.labels[0].flatten()[1:] == 4).all()
    assert (found.labels[1] == 255).all()
    shared = pool((0, 1, 0, 0), (0, 4, 1, 1))  # both in the first cell
    assert extend_labels(logits[:1], shared, (24, 32), threshold=0.5, largest_share=1.0).labels[0, 0, 0] == 255


def test_confidence_is_that_of_the_label_also_where_a_point_overrules_the_network() -> None:
    logits, points = extension_case()
    logits[:, 4] += 20
    found = extend_labels(logits, points, (24, 32), threshold=0.5, largest_share=1.0)
    labelled = found.labels != 255
    probabilities = logits.softmax(1).gather(1, found.labels.masked_fill(~labelled, 0)[:, None])[:, 0]
    torch.testing.assert_close(found.confidence[labelled], probabilities[labelled])
    assert found.confidence[0, 0, 0] < 0.01 and not found.confidence[~labelled].any()


def test_a_point_where_the_network_is_unsure_has_no_extended_label() -> None:
    logits, points = extension_case()
    unsure = extend_labels(0 * logits, points, (24, 32), threshold=0.5, largest_share=1.0)
    assert (unsure.labels == 255).all() and not unsure.confidence.any()


@pytest.mark.parametrize("largest_share", [1.0, 0.2])
def test_a_lower_threshold_never_covers_less(largest_share: float) -> None:
    logits, points = extension_case()
    covered = [
        int((extend_labels(logits, points, (24, 32), threshold=t, largest_share=largest_share).labels != 255).sum())
        for t in (1.01, 0.95, 0.9, 0.7, 0.5, 0.0)
    ]
    assert covered == sorted(covered) and covered[0] == 0 < covered[-1]


def test_a_class_gets_its_surest_pixels_up_to_its_share() -> None:
    logits, points = extension_case()
    logits[:, 4] += 3
    free = extend_labels(logits, points, (24, 32), threshold=0.3, largest_share=1.0)
    capped = extend_labels(logits, points, (24, 32), threshold=0.3, largest_share=0.25)
    assert (free.labels[0] == 4).sum() > 12 == (capped.labels[0] == 4).sum()
    kept, dropped = capped.labels[0] == 4, (free.labels[0] == 4) & (capped.labels[0] == 255)
    assert free.confidence[0][kept].min() >= free.confidence[0][dropped].max()
    valid = torch.zeros(2, 6, 8, dtype=torch.bool)
    valid[:, :4, :5] = True  # 20 pixels, a quarter of which is 5
    padded = extend_labels(logits, points, (24, 32), threshold=0.3, largest_share=0.25, valid=valid)
    assert (padded.labels[0] == 4).sum() == 5 and (padded.labels[~valid] == 255).all()
    with pytest.raises(ValueError, match="largest_share must be above 0, got 0"):
        extend_labels(logits, points, (24, 32), largest_share=0)


def test_no_gradient_flows_through_the_extension() -> None:
    logits, points = extension_case()
    found = extend_labels(logits.requires_grad_(), points, (24, 32), threshold=0.3)
    assert not found.labels.requires_grad and not found.confidence.requires_grad


def test_the_surest_pixels_of_each_class_and_image() -> None:
    logits, points = extension_case()
    found = extend_labels(logits, points, (24, 32), threshold=0.0, largest_share=1.0)
    image, row, column = surest_pixels(found, 2)
    groups: dict[tuple[int, int], list[float]] = {}
    for i, y, x in zip(image.tolist(), row.tolist(), column.tolist(), strict=True):
        groups.setdefault((i, int(found.labels[i, y, x])), []).append(float(found.confidence[i, y, x]))
    assert set(groups) == {(i, int(c)) for i in (0, 1) for c in found.labels[i].unique() if c != 255}
    for (i, c), kept in groups.items():
        every = found.confidence[i][found.labels[i] == c].sort(descending=True).values
        assert sorted(kept, reverse=True) == every[:2].tolist()


@pytest.mark.parametrize("align_corners", [True, False])
def test_cells_are_those_nearest_to_the_points(align_corners: bool) -> None:
    points = pool(*((0, 0, y, x) for y in range(24) for x in range(32)))
    row, column = nearest_cells(points, (24, 32), (6, 8), align_corners=align_corners)
    centres = torch.arange(6) * 23 / 5 if align_corners else torch.arange(6) * 4 + 1.5
    distance = (points.y[:, None] - centres).abs()
    torch.testing.assert_close(distance.gather(1, row[:, None])[:, 0], distance.amin(1))
    assert row.max() == 5 and column.max() == 7 and row.min() == column.min() == 0


# --- processes -------------------------------------------------------------------------------------------------------


class Scene(torch.nn.Module):
    """A network, and the two losses of a batch of points as the recipe has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = torch.nn.Conv2d(3, 6, 3, stride=2, padding=1).double()
        self.classify = torch.nn.Conv2d(6, 4, 1).double()

    def forward(self, images: Tensor, points: Tensor) -> Tensor:
        maps = self.features(images)
        found = pool_points(points)
        at = (found.image, found.y, found.x, images.shape[-2:])
        losses = [
            point_cross_entropy(sample_at_points(self.classify(maps), *at), found, average=average)
            for average in ("points", "images")
        ]
        pooled, labels = gather_rows(sample_at_points(maps, *at)), gather_rows(found.label)
        return torch.stack([*losses, triplet_metric(pooled, labels, margin=1.0).loss])


def scene_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, 3, 12, 16, generator=generator, dtype=torch.float64)
    points = torch.full((4, 5, 3), 255.0)
    for image, count in enumerate((5, 2, 0, 1)):  # unequal, also between the processes
        points[image, :count, 0] = torch.randint(4, (count,), generator=generator).float()
        points[image, :count, 1:] = torch.rand(count, 2, generator=generator) * torch.tensor([11.0, 15.0])
    return images, points


def _train_share(rank: int, address: str, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    images, points = scene_batch()
    model = torch.nn.parallel.DistributedDataParallel(Scene())
    losses = model(images[2 * rank : 2 * rank + 2], points[2 * rank : 2 * rank + 2])
    losses.sum().backward()
    results.put((losses.tolist(), [parameter.grad.tolist() for parameter in model.parameters()]))
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_loss_and_the_gradient_of_one(tmp_path: Path) -> None:
    model = Scene()
    expected = model(*scene_batch())
    expected.sum().backward()
    assert expected.min() > 0
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_train_share, args=(r, f"file://{tmp_path}/meet", queue)) for r in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=30)
    for _, gradients in results:
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(
                torch.tensor(gradient, dtype=torch.float64), parameter.grad, rtol=1e-9, atol=1e-9
            )
    mean = torch.tensor([losses for losses, _ in results], dtype=torch.float64).mean(0)
    torch.testing.assert_close(mean, expected.detach())
    assert results[0][0][2] == pytest.approx(expected[2].item())  # the metric is the same in every process


def test_gathering_leaves_the_gradient_of_its_result_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda rows: rows.mul_(2))  # a second process alike
        rows = torch.ones(3, 2, requires_grad=True)
        gathered = _GatheredRows.apply(rows)
        wanted = torch.ones_like(gathered)
        (gradient,) = torch.autograd.grad(gathered, rows, wanted)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(gradient, torch.full((3, 2), 2.0))
    assert torch.equal(wanted, torch.ones(1, 3, 2))


def test_one_process_gathers_nothing() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows) is rows
    assert global_mean(torch.tensor(3.0), torch.tensor(2)) == 1.5
