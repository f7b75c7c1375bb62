"""DCR's samples, loss, fusion and suppression, against the specification's numbers and plain loops."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from gingham.methods.dcr.objective import (
    IGNORED,
    Candidates,
    SamplingRule,
    candidates,
    detections,
    fuse,
    highest_scored,
    refinement_loss,
    sample_boxes,
)

CLASSES = 4


def boxes(count: int, seed: int = 0, size: float = 100.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = size * torch.rand(count, 2, generator=generator)
    return torch.cat([corner, corner + 5 + 40 * torch.rand(count, 2, generator=generator)], dim=1)


def probabilities(count: int, seed: int = 0) -> Tensor:
    return (3 * torch.randn(count, CLASSES + 1, generator=torch.Generator().manual_seed(seed))).softmax(dim=1)


def found(overlaps: list[float], labels: list[int], predicted: list[int], scores: list[float]) -> Candidates:
    """Candidates without meaningful boxes, which are numbered by their first coordinate."""
    numbers = torch.arange(float(len(labels)))[:, None].expand(-1, 4)
    return Candidates(
        numbers, torch.tensor(labels), torch.tensor(overlaps), torch.tensor(predicted), torch.tensor(scores)
    )


def drawn(candidates: Candidates, rule: SamplingRule, times: int = 1) -> list[list[tuple[int, int]]]:
    """(number, label) of the samples of each draw."""
    generator = torch.Generator().manual_seed(0)
    draws = [sample_boxes(candidates, rule, generator) for _ in range(times)]
    return [list(zip(draw.boxes[:, 0].int().tolist(), draw.labels.tolist(), strict=True)) for draw in draws]


# ------------------------------------------------------------------------------------------------ labels


def test_an_overlap_of_exactly_a_half_is_foreground() -> None:
    objects, classes = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([3])
    looked_at = torch.tensor([[0.0, 0, 10, 20], [0, 0, 10, 20.01], [0, 0, 10, 10], [50, 50, 60, 60]])
    result = candidates(looked_at, probabilities(4), objects, classes)
    assert result.labels.tolist() == [3, 3, 0, 3, 0]
    assert result.overlaps[0] == result.overlaps[3] == 1
    assert 0.499 < result.overlaps[2] < 0.5


def test_candidates_are_the_objects_and_then_the_boxes() -> None:
    objects, classes = boxes(3, seed=1), torch.tensor([4, 1, 2])
    looked_at, scores = boxes(6), probabilities(6)
    result = candidates(looked_at, scores, objects, classes)
    assert torch.equal(result.boxes, torch.cat([objects, looked_at]))
    assert result.predicted.tolist() == [4, 1, 2, *scores.argmax(1).tolist()]
    assert torch.equal(result.scores, torch.cat([torch.ones(3), scores.amax(1)]))
    overlap = box_iou(looked_at, objects)
    for row, label, value in zip(overlap, result.labels[3:], result.overlaps[3:], strict=True):
        assert value == row.max()
        assert label == (classes[row.argmax()] if row.max() >= 0.5 else 0)


def test_no_gradient_flows_into_boxes_or_scores() -> None:
    looked_at, scores = boxes(4).requires_grad_(), probabilities(4).requires_grad_()
    result = candidates(looked_at, scores, boxes(1), torch.tensor([1]))
    assert not any(part.requires_grad for part in result)


def test_an_image_without_objects_or_boxes_is_background() -> None:
    none, nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    result = candidates(boxes(3), probabilities(3), none, nothing)
    assert result.labels.tolist() == [0, 0, 0]
    assert result.overlaps.tolist() == [0, 0, 0]
    empty = candidates(none, torch.zeros(0, CLASSES + 1), none, nothing)
    assert len(sample_boxes(empty, SamplingRule()).labels) == 0
    alone = sample_boxes(candidates(none, torch.zeros(0, CLASSES + 1), boxes(2), torch.tensor([1, 2])), SamplingRule(4))
    assert alone.labels.tolist() == [1, 2, IGNORED, IGNORED]


# ------------------------------------------------------------------------------------------------ sampling


def mixed(objects: int = 5, others: int = 128, seed: int = 0) -> Candidates:
    """Objects, then boxes of every kind."""
    generator = torch.Generator().manual_seed(seed)
    overlaps = torch.rand(others, generator=generator) * 0.98
    labels = torch.where(overlaps >= 0.5, torch.randint(1, CLASSES + 1, (others,), generator=generator), 0)
    predicted = torch.randint(0, CLASSES + 1, (others,), generator=generator)
    scores = torch.rand(others, generator=generator)
    own = torch.randint(1, CLASSES + 1, (objects,), generator=generator)
    sure = torch.ones(objects)
    return found(
        torch.cat([sure, overlaps]).tolist(),
        torch.cat([own, labels]).tolist(),
        torch.cat([own, predicted]).tolist(),
        torch.cat([sure, scores]).tolist(),
    )


def test_with_the_released_thresholds_every_box_is_equally_likely() -> None:
    draws = drawn(mixed(), SamplingRule.released(), times=4000)
    counts = torch.zeros(133)
    for draw in draws:
        numbers = [number for number, _ in draw]
        assert len(set(numbers)) == 32
        assert all(label != IGNORED for _, label in draw)
        assert set(range(5)) <= set(numbers)
        counts[numbers] += 1
    share = counts[5:] / 4000
    assert share.mean() == pytest.approx(27 / 128)
    assert (share - 27 / 128).abs().max() < 5 * (0.211 * 0.789 / 4000) ** 0.5  # five standard deviations


def test_more_objects_than_boxes_leave_no_room_for_negatives() -> None:
    (draw,) = drawn(mixed(objects=40), SamplingRule())
    assert len({number for number, _ in draw}) == 32
    assert all(number < 40 and label > 0 for number, label in draw)
    draws = drawn(mixed(objects=40), SamplingRule(), times=50)
    assert {number for draw in draws for number, _ in draw} == set(range(40))  # a random choice


def test_too_few_candidates_are_filled_up_with_ignored_ones() -> None:
    some = mixed(objects=2, others=20)
    (draw,) = drawn(some, SamplingRule())
    assert [number for number, _ in draw[:22]] == list(range(22))
    assert [label for _, label in draw[:22]] == some.labels.tolist()
    assert [label for _, label in draw[22:]] == [IGNORED] * 10


KINDS = found(
    #          object, right, unsure, wrong class, missed, near, far, claimed, unsure claim, sure background
    overlaps=[1.0, 0.8, 0.7, 0.6, 0.6, 0.3, 0.05, 0.05, 0.02, 0.3],
    labels=[2, 2, 2, 2, 2, 0, 0, 0, 0, 0],
    predicted=[2, 2, 2, 3, 0, 0, 0, 1, 1, 0],
    scores=[1.0, 0.9, 0.5, 0.9, 0.6, 0.2, 0.9, 0.7, 0.2, 0.9],
)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {1, 2, 3, 4, 5, 7, 9}),
        ({"heuristic": "random"}, {1, 2, 3, 4, 5, 6, 7, 8, 9}),
        ({"heuristic": "hard"}, {3, 4, 7}),
        ({"heuristic": "hard+foreground"}, {1, 2, 3, 4, 7}),
        ({"heuristic": "hard+background"}, {3, 4, 5, 7, 9}),
        ({"heuristic": "hard_foreground"}, {2, 3, 4, 5, 7, 9}),
        ({"heuristic": "hard", "require_foreground_prediction": False}, {3, 4, 6, 7, 9}),
        ({"heuristic": "hard", "confidence": 0.8}, {3, 4}),
        ({"background_low": 0.0}, {1, 2, 3, 4, 5, 6, 7, 8, 9}),
        ({"background_low": 0.04}, {1, 2, 3, 4, 5, 6, 7, 9}),
    ],
    ids=str,
)
def test_the_pool_holds_what_the_heuristic_says(options: dict[str, Any], expected: set[int]) -> None:
    draws = drawn(KINDS, SamplingRule(**{"boxes": 10, **options}), times=20)
    for draw in draws:
        assert {number for number, label in draw if label != IGNORED} == expected | {0}
        assert len(draw) == 10


def test_far_background_may_only_fill_up() -> None:
    for draw in drawn(KINDS, SamplingRule(boxes=10), times=200):
        assert all(label == IGNORED for number, label in draw if number == 6)


def test_a_quarter_is_foreground_as_in_faster_rcnn() -> None:
    for draw in drawn(mixed(), SamplingRule(heuristic="rcnn"), times=20):
        labels = [label for _, label in draw]
        assert sum(label > 0 for label in labels) == 8
        assert sum(label == 0 for label in labels) == 24


def test_the_generator_decides() -> None:
    rule = SamplingRule()
    first, again, other = (sample_boxes(mixed(), rule, torch.Generator().manual_seed(seed)).boxes for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "options",
    [
        {"boxes": 0},
        {"heuristic": "easy"},
        {"confidence": 1.5},
        {"overlap": 0.0},
        {"background_low": 0.5},
        {"background_low": -0.1},
    ],
    ids=str,
)
def test_rules_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must"):
        SamplingRule(**options)


# ------------------------------------------------------------------------------------------------ loss


def test_ignored_boxes_cost_nothing_and_have_no_gradient() -> None:
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, IGNORED, 2, 1, IGNORED])
    loss = refinement_loss(logits, labels)
    kept = labels != IGNORED
    expected = -logits.detach()[kept].float().log_softmax(1)[range(3), labels[kept]].mean()
    torch.testing.assert_close(loss.detach(), expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[~kept] == 0).all()
    assert (gradient[kept] != 0).all()


def test_a_batch_of_ignored_boxes_costs_zero() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    loss = refinement_loss(logits, torch.tensor([IGNORED, IGNORED]))
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros(2, 3))
    assert refinement_loss(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)) == 0


# ------------------------------------------------------------------------------------------------ fusion


def test_scores_are_multiplied_and_never_rise() -> None:
    scores, refined = probabilities(6), probabilities(6, seed=1)
    fused = fuse(scores, refined, torch.arange(6))
    assert torch.equal(fused, scores * refined)
    assert (fused <= scores).all()
    assert torch.equal(fuse(scores, torch.ones_like(scores), torch.arange(6)), scores)


def test_the_best_half_of_five_boxes_are_two_and_the_rest_keep_their_scores() -> None:
    scores = probabilities(5)
    which = highest_scored(scores, 0.5)
    best = sorted(range(5), key=lambda i: -scores[i, 1:].max().item())[:2]
    assert which.tolist() == best
    fused = fuse(scores, probabilities(2, seed=1), which)
    rest = [i for i in range(5) if i not in best]
    assert torch.equal(fused[rest], scores[rest])
    assert (fused[best] != scores[best]).all()
    assert [len(highest_scored(scores, top)) for top in (0.0, 0.19, 0.2, 1.0)] == [0, 0, 1, 5]


def test_ties_keep_their_order() -> None:
    assert highest_scored(torch.full((4, 3), 1 / 3), 0.5).tolist() == [0, 1]


# ------------------------------------------------------------------------------------------------ suppression


def by_loops(boxes: Tensor, scores: Tensor, threshold: float, overlap: float, most: int) -> list[tuple[int, int]]:
    """(label, box) of the detections: section 7 of the specification, box by box."""
    kept = []
    for label in range(1, scores.shape[1]):
        order = sorted(range(len(boxes)), key=lambda i: -scores[i, label].item())
        mine: list[int] = []
        for i in order:
            if scores[i, label] > threshold and all(
                box_iou(boxes[i : i + 1], boxes[k : k + 1]) <= overlap for k in mine
            ):
                mine.append(i)
        kept += [(scores[i, label].item(), label, i) for i in mine]
    kept.sort(reverse=True)
    return [(label, i) for score, label, i in kept if score >= kept[min(most, len(kept)) - 1][0]]


def test_detections_are_those_of_plain_loops() -> None:
    looked_at, scores = boxes(30, size=60), probabilities(30)
    result = detections(looked_at, scores, threshold=0.01, overlap=0.3, most=12)
    expected = by_loops(looked_at, scores, 0.01, 0.3, 12)
    assert len(expected) == 12
    assert result.labels.tolist() == [label for label, _ in expected]
    assert torch.equal(result.boxes, looked_at[[i for _, i in expected]])
    assert torch.equal(result.scores, scores[[i for _, i in expected], result.labels])


def test_what_ties_with_the_last_detection_is_kept() -> None:
    apart = torch.arange(5.0)[:, None] * 100 + torch.tensor([0.0, 0, 10, 10])
    scores = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.8, 0.2]])
    assert detections(apart, scores, most=2).scores.tolist() == pytest.approx([0.9, 0.5, 0.5, 0.5])


def test_uniform_refinement_keeps_the_ranking() -> None:
    looked_at, scores = boxes(30, size=60), probabilities(30)
    uniform = fuse(scores, torch.full_like(scores, 1 / (CLASSES + 1)), torch.arange(30))
    plain = detections(looked_at, scores, threshold=0.05)
    scaled = detections(looked_at, uniform, threshold=0.05 / (CLASSES + 1))
    assert torch.equal(plain.boxes, scaled.boxes)
    assert torch.equal(plain.labels, scaled.labels)
    torch.testing.assert_close(plain.scores / (CLASSES + 1), scaled.scores)


def test_the_order_of_boxes_does_not_matter() -> None:
    looked_at, scores = boxes(30, size=60), probabilities(30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for one, other in zip(detections(looked_at, scores), detections(looked_at[order], scores[order]), strict=True):
        assert torch.equal(one, other)


def test_no_boxes_give_no_detections() -> None:
    result = detections(torch.zeros(0, 4), torch.zeros(0, 3))
    assert [len(part) for part in result] == [0, 0, 0]


def test_a_refiner_that_sees_what_the_detector_confuses_helps_and_cannot_move_boxes() -> None:
    """The specification's proof of benefit: the product beats either; what is badly placed stays wrong."""
    from gingham.metrics import DetectionMeter

    generator = torch.Generator().manual_seed(0)
    count = 120
    place = torch.arange(count)[:, None] * 30.0 + torch.tensor([0.0, 0, 20, 20])
    label = torch.randint(1, 3, (count,), generator=generator)
    kinds = torch.arange(count) % 6  # 0 badly placed, 1 background, the rest on an object
    looked_at = place + (kinds == 0)[:, None] * torch.tensor([15.0, 0, 15, 0])
    truth = torch.where(kinds == 1, 0, label)
    sees = torch.nn.functional.one_hot(truth, 3).float()

    def softened(confusion: Tensor, sharpness: float) -> Tensor:
        noise = 0.8 * torch.randn(count, 3, generator=generator)
        return (sharpness * confusion + noise).softmax(dim=1)

    confused = sees.clone()
    confused[::2, 1:] = 0.5 * sees[::2, 1:].sum(1, keepdim=True)  # the two classes are alike to it on half its boxes
    base = softened(confused, 3.0)
    refined = softened(sees, 1.5)
    objects = torch.cat(
        [
            label[:, None].double(),
            place[:, :2].double(),
            torch.full((count, 2), 20.0),
            torch.full((count, 1), 400.0),
            torch.zeros(count, 1),
        ],
        dim=1,
    )[kinds != 1]

    def score(values: Tensor, kept: Tensor) -> float:
        meter = DetectionMeter(2)
        result = detections(looked_at[kept], values[kept], most=1000)
        meter.update([0], [objects], *([part] for part in (result.boxes, result.labels, result.scores)))
        return float(meter.compute().ap50)

    everything = torch.ones(count, dtype=torch.bool)
    product = fuse(base, refined, torch.arange(count))
    assert score(product, everything) > max(score(base, everything), score(refined, everything)) + 0.02
    assert score(product, kinds == 0) == score(base, kinds == 0) == 0
