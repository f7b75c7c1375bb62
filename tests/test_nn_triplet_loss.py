"""Triplet losses and weighted cross-entropy against numbers that were worked out elsewhere."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.nn.triplet_loss import triplet_loss, weighted_cross_entropy

POINTS = torch.tensor([[0, 0], [1, 0], [0, 2], [3, 0], [3, 1], [4, 0]], dtype=torch.float64)
PERSONS = torch.tensor([0, 0, 0, 1, 1, 1])
WEIGHTS = torch.tensor([1, 0.5, 0.8, 1, 0.25, 0.9], dtype=torch.float64)


def random_batch(persons: int = 4, each: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(persons * each, 5, dtype=torch.float64, generator=generator)
    return features, torch.arange(persons).repeat_interleave(each)


@pytest.mark.parametrize(("margin", "expected"), [(0.3, 0.08934466), (0.5, 0.12267800), ("soft", 0.38816357)])
def test_the_hardest_of_each_anchor_count(margin: Any, expected: float) -> None:
    assert triplet_loss(POINTS, PERSONS, margin=margin).item() == pytest.approx(expected, abs=1e-8)


def test_pairs_of_a_person_count_with_the_nearest_other_of_the_first() -> None:
    assert triplet_loss(POINTS, PERSONS, margin=0.5, mining="semi").item() == pytest.approx(0.12267800, abs=1e-8)
    features, persons = random_batch()
    total, pairs = 0.0, 0
    for first in range(12):
        nearest = min((features[first] - features[j]).norm().item() for j in range(12) if persons[j] != persons[first])
        for second in range(first + 1, 12):
            if persons[first] == persons[second]:
                total += max(0.0, 0.7 + (features[first] - features[second]).norm().item() - nearest)
                pairs += 1
    assert pairs == 4 * 3
    found = triplet_loss(features, persons, margin=0.7, mining="semi").item()
    assert found == pytest.approx(total / pairs) and found != pytest.approx(triplet_loss(features, persons, margin=0.7))


def test_weights_count_by_anchor_or_as_a_mean() -> None:
    options: dict[str, Any] = {"margin": 0.5, "weights": WEIGHTS}
    assert triplet_loss(POINTS, PERSONS, **options).item() == pytest.approx(0.06133900, abs=1e-8)
    batch = triplet_loss(POINTS, PERSONS, weighting="batch", **options).item()
    assert batch == pytest.approx(0.09098618, abs=1e-8)
    # Only the first of a pair is its anchor: the weight of the second does not matter.
    features, persons = random_batch()
    last_only = torch.zeros(12, dtype=torch.float64).scatter(0, torch.tensor([2, 5, 8, 11]), 1.0)
    assert triplet_loss(features, persons, margin=5.0, mining="semi", weights=last_only).item() == 0


@pytest.mark.parametrize("mining", ["hard", "semi"])
@pytest.mark.parametrize("weighting", ["sample", "batch"])
@pytest.mark.parametrize("margin", [0.3, "soft"])
def test_weights_of_one_are_none_to_the_bit(mining: Any, weighting: Any, margin: Any) -> None:
    features, persons = random_batch(5, 3, seed=1)
    features = features.float()
    plain = triplet_loss(features, persons, margin=margin, mining=mining)
    ones = triplet_loss(features, persons, margin=margin, mining=mining, weights=torch.ones(15), weighting=weighting)
    assert torch.equal(plain, ones) and plain > 0


def test_weights_have_no_gradient_and_features_have_that_of_autograd() -> None:
    features, persons = random_batch()
    weights = torch.rand(12, dtype=torch.float64, requires_grad=True)
    for mining in ("hard", "semi"):
        given = features.clone().requires_grad_()
        triplet_loss(given, persons, mining=mining, weights=weights).backward()  # type: ignore[arg-type]
        assert weights.grad is None and given.grad is not None and given.grad.abs().sum() > 0
        assert torch.autograd.gradcheck(
            lambda x, mining=mining: triplet_loss(x, persons, mining=mining, weights=WEIGHTS.repeat(2)),
            (given,),
        )


def test_equal_features_have_a_finite_gradient() -> None:
    features = torch.zeros(4, 3, requires_grad=True)
    loss = triplet_loss(features, torch.tensor([0, 0, 1, 1]), margin=0.3)
    loss.backward()
    assert loss.item() == pytest.approx(0.3) and features.grad is not None and features.grad.isfinite().all()


def test_halves_are_computed_in_float32() -> None:
    features = 300 * POINTS.half()
    loss = triplet_loss(features, PERSONS, margin=0.3)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(triplet_loss(300 * POINTS, PERSONS, margin=0.3).item(), rel=1e-6)


def test_near_features_are_told_apart_far_from_the_origin() -> None:
    """Distances by way of a product of matrices would be off by more than the margin here."""
    far = (POINTS + 2000).float()
    assert triplet_loss(far, PERSONS, margin=0.3).item() == pytest.approx(0.08934466, abs=1e-6)


@pytest.mark.parametrize(
    ("features", "persons", "options", "reason"),
    [
        (POINTS, torch.zeros(6, dtype=torch.int64), {}, "persons must be of two or more"),
        (POINTS[:0], PERSONS[:0], {}, "persons must be of two or more"),
        (POINTS[:2], torch.tensor([0, 1]), {"mining": "semi"}, "persons must come twice"),
        (POINTS[0], PERSONS, {}, "features must be"),
        (POINTS, PERSONS[:5], {}, "features must be"),
        (POINTS, PERSONS, {"margin": -0.1}, "margin must be"),
        (POINTS, PERSONS, {"margin": math.nan}, "margin must be"),
        (POINTS, PERSONS, {"margin": "hard"}, "margin must be"),
        (POINTS, PERSONS, {"mining": "easy"}, "mining must be"),
        (POINTS, PERSONS, {"weighting": "sum"}, "weighting must be"),
        (POINTS, PERSONS, {"weights": WEIGHTS[:3]}, "weights must be"),
    ],
)
def test_batches_without_triplets_and_wrong_options_are_named(
    features: Tensor, persons: Tensor, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"^{reason}"):
        triplet_loss(features, persons, **options)


LOGITS = torch.tensor([[2, 0, 0], [0, 1, 0], [0, 0, 3]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1])


def test_cross_entropy_is_divided_by_the_number_of_samples() -> None:
    weights = torch.tensor([1, 0.5, 0.25], dtype=torch.float64)
    assert weighted_cross_entropy(LOGITS, LABELS, weights).item() == pytest.approx(0.42966595, abs=1e-8)
    assert weighted_cross_entropy(LOGITS, LABELS).item() == pytest.approx(
        (0.23954477 + 0.55144471 + 3.09492296) / 3, abs=1e-8
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_weights_of_one_is_the_plain_one(smoothing: float) -> None:
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(7) % 5
    plain = weighted_cross_entropy(logits, labels, label_smoothing=smoothing)
    assert torch.equal(weighted_cross_entropy(logits, labels, torch.ones(7), smoothing), plain)
    assert torch.equal(plain, F.cross_entropy(logits, labels, label_smoothing=smoothing))
    assert torch.equal(weighted_cross_entropy(LOGITS, LABELS, torch.ones(3)), F.cross_entropy(LOGITS, LABELS))


def test_weights_of_zero_have_no_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    weighted_cross_entropy(logits, LABELS, torch.tensor([1.0, 0.0, 1.0])).backward()
    assert logits.grad is not None
    assert (logits.grad[1] == 0).all() and (logits.grad[0] != 0).all()


def test_cross_entropy_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^logits must be"):
        weighted_cross_entropy(LOGITS, LABELS[:2])
    with pytest.raises(ValueError, match=r"^logits must be"):
        weighted_cross_entropy(LOGITS[:0], LABELS[:0])
    with pytest.raises(ValueError, match=r"^weights must be"):
        weighted_cross_entropy(LOGITS, LABELS, torch.ones(2))
    with pytest.raises(ValueError, match=r"^label_smoothing must be"):
        weighted_cross_entropy(LOGITS, LABELS, label_smoothing=2.0)
