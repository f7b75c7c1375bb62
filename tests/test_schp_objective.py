"""The losses of SCHP: golden values, what the corrected forms mend, and what the official ones compute."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.errors import DataError
from gingham.methods.schp.network import ParsingOutput
from gingham.methods.schp.objective import (
    SoftLabels,
    consistency_loss,
    edge_loss,
    edge_map,
    lovasz_softmax,
    parsing_loss,
    refined_labels,
    soft_label_loss,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def two_classes(first: list[float]) -> Tensor:
    """Probabilities [1, 2, 1, N] whose class 0 is given."""
    p = torch.tensor(first, dtype=torch.float64)
    return torch.stack([p, 1 - p])[None, :, None]


def labels_of(*rows: list[int]) -> Tensor:
    return torch.tensor([rows])


# ---------------------------------------------------------------------------------------------------- edges


def test_straight_boundary_gives_a_band_of_four() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[:, :, 4:] = 1
    expected = torch.zeros(1, 8, 8, dtype=torch.int64)
    expected[:, :, 2:6] = 1
    assert torch.equal(edge_map(labels), expected)
    assert torch.equal(edge_map(labels.mT), expected.mT)


def test_single_pixel_has_the_official_outline() -> None:
    labels = torch.zeros(1, 7, 7, dtype=torch.int64)
    labels[0, 3, 3] = 1
    expected = torch.zeros(7, 7, dtype=torch.int64)
    expected[1:4, 1:6] = 1
    expected[4, 1:5] = 1
    expected[5, 2:5] = 1
    assert torch.equal(edge_map(labels)[0], expected)


def test_ignored_pixels_make_no_edge() -> None:
    labels = torch.full((1, 6, 9), 3)
    labels[0, :, 5:] = 255
    assert not edge_map(labels).any()
    assert not edge_map(torch.full((1, 6, 9), 255)).any()
    assert not edge_map(torch.full((1, 6, 9), 4)).any()
    assert edge_map(labels, ignore_index=254).any()


def edges_by_loop(labels: Tensor) -> Tensor:
    """Pixel by pixel, from the written rule."""
    height, width = labels.shape
    marked = torch.zeros(height, width, dtype=torch.bool)
    for r in range(height):
        for c in range(width):
            for dr, dc in ((-1, 0), (0, 1), (1, 1), (1, -1)):
                y, x = r + dr, c + dc
                if 0 <= y < height and 0 <= x < width:
                    here, there = int(labels[r, c]), int(labels[y, x])
                    marked[r, c] |= here != there and 255 not in (here, there)
    grown = torch.zeros(height, width, dtype=torch.int64)
    for r, c in marked.nonzero().tolist():
        grown[max(0, r - 1) : r + 2, max(0, c - 1) : c + 2] = 1
    return grown


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (9, 14)])
def test_edges_of_random_maps_follow_the_rule(size: tuple[int, int]) -> None:
    labels = F.interpolate(torch.randint(0, 4, (3, 1, 3, 4)).float(), size=size)[:, 0].long()
    labels[torch.rand(labels.shape) < 0.1] = 255
    expected = torch.stack([edges_by_loop(one) for one in labels])
    assert torch.equal(edge_map(labels), expected)
    assert edge_map(labels).dtype == torch.int64


# ---------------------------------------------------------------------------------------------------- Lovász


def test_lovasz_golden_values() -> None:
    uniform = torch.full((1, 3, 1, 3), 1 / 3)
    assert float(lovasz_softmax(uniform, labels_of([0, 1, 1]))) == pytest.approx(0.666667, abs=1e-6)
    assert float(lovasz_softmax(two_classes([0.7, 0.4]), labels_of([0, 1]))) == pytest.approx(0.375)
    probabilities = two_classes([0.9, 0.8, 0.4, 0.3])
    assert float(lovasz_softmax(probabilities, labels_of([0, 0, 0, 1]))) == pytest.approx(0.3875)


def test_lovasz_is_one_minus_mean_iou_of_hard_predictions() -> None:
    labels, predicted = torch.randint(0, 5, (2, 6, 9)), torch.randint(0, 6, (2, 6, 9))
    ious = []
    for index in labels.unique():
        mine, theirs = labels == index, predicted == index
        ious.append(float((mine & theirs).sum() / (mine | theirs).sum()))
    loss = lovasz_softmax(F.one_hot(predicted, 6).movedim(-1, 1).double(), labels)
    assert float(loss) == pytest.approx(1 - sum(ious) / len(ious), abs=1e-6)
    assert float(lovasz_softmax(F.one_hot(labels, 6).movedim(-1, 1).double(), labels)) == 0
    wrong = F.one_hot((labels == 0).long(), 6).movedim(-1, 1).double()
    assert float(lovasz_softmax(wrong, (labels != 0).long())) == pytest.approx(1)


def lovasz_by_sets(probabilities: Tensor, labels: Tensor) -> float:
    """Sum over the pixels in falling error of error times the growth of the Jaccard loss of the set of wrong pixels."""
    p, y = probabilities.movedim(1, -1).flatten(0, 2), labels.flatten()
    losses = []
    for index in y.unique().tolist():
        errors = ((y == index).double() - p[:, index]).abs().tolist()
        truth = {pixel for pixel, label in enumerate(y.tolist()) if label == index}
        wrong: set[int] = set()
        loss = before = 0.0
        for pixel in sorted(range(len(errors)), key=lambda pixel: -errors[pixel]):
            wrong.add(pixel)
            jaccard = len(wrong) / len(truth | wrong)
            loss += errors[pixel] * (jaccard - before)
            before = jaccard
        losses.append(loss)
    return sum(losses) / len(losses)


def test_lovasz_of_soft_predictions_is_the_extension_of_the_jaccard_loss() -> None:
    probabilities = torch.randn(2, 4, 3, 5, dtype=torch.float64).softmax(dim=1)
    labels = torch.randint(0, 3, (2, 3, 5))
    assert float(lovasz_softmax(probabilities, labels)) == pytest.approx(lovasz_by_sets(probabilities, labels))


def test_lovasz_weighs_sorted_errors_as_written() -> None:
    """The errors are sorted already, and their foreground is (1, 0, 1): weights 1/2, 1/6, 1/3."""
    probabilities = two_classes([0.1, 0.7, 0.6]).requires_grad_()
    labels = labels_of([0, 1, 0])
    (gradient,) = torch.autograd.grad(lovasz_softmax(probabilities, labels), probabilities)
    expected = torch.tensor([-1 / 2, 1 / 6, -1 / 3], dtype=torch.float64) / 2  # the mean over two classes
    torch.testing.assert_close(gradient[0, 0, 0], expected)


def test_lovasz_gradient() -> None:
    logits = torch.randn(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (1, 3, 4))
    assert torch.autograd.gradcheck(lambda x: lovasz_softmax(x.softmax(dim=1), labels), (logits,))


def test_lovasz_ignores_order_absent_classes_and_ignored_pixels() -> None:
    logits, labels = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randint(0, 3, (2, 3, 5))
    probabilities = logits.softmax(dim=1)
    loss = lovasz_softmax(probabilities, labels)
    order = torch.randperm(15)
    permuted = probabilities.flatten(2)[..., order].reshape(2, 4, 5, 3)
    torch.testing.assert_close(lovasz_softmax(permuted, labels.flatten(1)[:, order].reshape(2, 5, 3)), loss)
    classes = torch.tensor([2, 0, 3, 1])  # old class of each new one
    torch.testing.assert_close(lovasz_softmax(probabilities[:, classes], classes.argsort()[labels]), loss)
    padded = F.pad(probabilities, (0, 2, 3, 0), value=0.25)
    torch.testing.assert_close(lovasz_softmax(padded, F.pad(labels, (0, 2, 3, 0), value=255)), loss)
    # one loss over the batch, not one for each image
    each = torch.stack([lovasz_softmax(p[None], y[None]) for p, y in zip(probabilities, labels, strict=True)])
    assert not torch.allclose(each.mean(), loss)


def test_lovasz_of_ignored_pixels_only_is_zero() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = lovasz_softmax(logits.softmax(dim=1), torch.full((1, 2, 2), 255))
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("refined", [False, True])
def test_the_whole_loss_of_many_pixels_is_summed_in_single_precision(dtype: torch.dtype, refined: bool) -> None:
    labels = torch.randint(0, 4, (1, 300, 300))
    output = ParsingOutput(*(torch.randn(1, k, 300, 300).to(dtype) for k in (4, 4, 2)))
    exact = ParsingOutput(*(logits.float() for logits in output))
    soft = SoftLabels(torch.randn(1, 4, 300, 300).softmax(1), torch.randn(1, 2, 300, 300).softmax(1))
    options: Any = {"soft": soft} if refined else {}
    torch.testing.assert_close(
        parsing_loss(output, labels, **options), parsing_loss(exact, labels, **options), rtol=2e-3, atol=0
    )


def test_lovasz_of_half_precision_is_computed_in_single() -> None:
    probabilities, labels = torch.randn(1, 3, 40, 50).softmax(dim=1).half(), torch.randint(0, 3, (1, 40, 50))
    torch.testing.assert_close(lovasz_softmax(probabilities, labels), lovasz_softmax(probabilities.float(), labels))


# ---------------------------------------------------------------------------------------------------- edges, loss


def test_edge_loss_balances_the_two_kinds() -> None:
    logits, edges = torch.randn(2, 2, 5, 7, dtype=torch.float64), torch.zeros(2, 5, 7, dtype=torch.int64)
    edges[0, :2, :3] = 1
    pixels = F.cross_entropy(logits, edges, reduction="none")
    expected = (pixels[edges == 1].mean() + pixels[edges == 0].mean()) / 2
    torch.testing.assert_close(edge_loss(logits, edges), expected)
    weights = torch.tensor([6 / 70, 64 / 70], dtype=torch.float64)
    torch.testing.assert_close(edge_loss(logits, edges), F.cross_entropy(logits, edges, weight=weights))


@pytest.mark.parametrize("kind", [0, 1])
def test_edge_loss_of_one_kind_is_zero(kind: int) -> None:
    logits = torch.randn(2, 2, 5, 7, requires_grad=True)
    loss = edge_loss(logits, torch.full((2, 5, 7), kind))
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_edges_are_zero_or_one() -> None:
    with pytest.raises(DataError, match="labels contain the value 255"):
        edge_loss(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2), 255))


# ---------------------------------------------------------------------------------------------------- refined labels


def test_blend_of_probabilities_and_of_logits() -> None:
    logits, labels = torch.tensor([2.0, 0.0, -1.0]).reshape(1, 3, 1, 1), labels_of([1])
    mixed = refined_labels(logits, labels, 0.5).flatten()
    torch.testing.assert_close(mixed, torch.tensor([0.4219, 0.5571, 0.0210]), rtol=0, atol=5e-5)
    official = refined_labels(logits, labels, 0.5, blend="logits").flatten()
    torch.testing.assert_close(official, torch.tensor([0.5465, 0.3315, 0.1220]), rtol=0, atol=5e-5)


def test_share_of_the_labels_decides() -> None:
    logits, labels = torch.randn(2, 20, 3, 4), torch.randint(0, 20, (2, 6, 9))
    onehot = F.one_hot(labels, 20).movedim(-1, 1).float()
    torch.testing.assert_close(refined_labels(logits, labels, 1.0), onehot)
    resized = F.interpolate(logits, size=(6, 9), mode="bilinear", align_corners=True)
    torch.testing.assert_close(refined_labels(logits, labels, 0.0), resized.softmax(dim=1))
    official = refined_labels(logits, labels, 1.0, blend="logits")
    torch.testing.assert_close(official[onehot == 1], torch.full((108,), 0.12516), rtol=0, atol=1e-5)
    torch.testing.assert_close(official[onehot == 0], torch.full((108 * 19,), 0.04604), rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_a_teacher_that_knows_the_truth_changes_nothing(alpha: float) -> None:
    labels = torch.randint(0, 4, (2, 5, 6))
    truth = F.one_hot(labels, 4).movedim(-1, 1).float()
    torch.testing.assert_close(refined_labels(1000 * truth, labels, alpha), truth)


@pytest.mark.parametrize("blend", ["probabilities", "logits"])
def test_refined_labels_are_distributions_without_gradient(blend: Any) -> None:
    logits = torch.randn(2, 4, 3, 4, requires_grad=True)
    labels = torch.randint(0, 4, (2, 6, 9))
    labels[:, 2:4] = 255
    before = labels.clone()
    soft = refined_labels(logits, labels, 0.25, blend=blend)
    assert torch.equal(labels, before) and not soft.requires_grad and soft.shape == (2, 4, 6, 9)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(2, 6, 9))
    assert (soft >= 0).all()
    as_background = refined_labels(logits, labels.masked_fill(labels == 255, 0), 0.25, blend=blend)
    resized = F.interpolate(logits.detach(), size=(6, 9), mode="bilinear", align_corners=True)
    ignored = (labels == 255)[:, None].expand_as(soft)
    expected = as_background if blend == "logits" else resized.softmax(dim=1)
    torch.testing.assert_close(soft[ignored], expected[ignored])
    torch.testing.assert_close(soft[~ignored], as_background[~ignored])


# ---------------------------------------------------------------------------------------------------- divergence


@pytest.mark.filterwarnings("ignore:reduction")
def test_divergence_of_the_official_scale_is_divided_by_the_classes() -> None:
    logits, soft = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5).softmax(dim=1)
    labels = torch.zeros(2, 3, 5, dtype=torch.int64)
    by_pixel = (soft * (soft.log() - logits.log_softmax(dim=1))).sum(dim=1).mean()
    torch.testing.assert_close(soft_label_loss(logits, soft, labels, reduction="pixel"), by_pixel)
    torch.testing.assert_close(soft_label_loss(logits, soft, labels), by_pixel / 4)
    torch.testing.assert_close(soft_label_loss(logits, soft, labels), F.kl_div(logits.log_softmax(dim=1), soft))


def test_divergence_counts_valid_pixels_only() -> None:
    logits, soft = torch.randn(1, 4, 3, 6), torch.randn(1, 4, 3, 6).softmax(dim=1)
    labels = torch.zeros(1, 3, 6, dtype=torch.int64)
    labels[:, :, 4:] = 255
    expected = soft_label_loss(logits[..., :4], soft[..., :4], labels[..., :4])
    torch.testing.assert_close(soft_label_loss(logits, soft, labels), expected)
    nothing = soft_label_loss(logits.requires_grad_(), soft, torch.full((1, 3, 6), 255))
    nothing.backward()
    assert nothing == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_divergence_from_certain_labels_is_the_cross_entropy() -> None:
    logits, labels = torch.randn(2, 4, 3, 5), torch.randint(0, 4, (2, 3, 5))
    certain = F.one_hot(labels, 4).movedim(-1, 1).float()
    loss = soft_label_loss(logits, certain, labels, reduction="pixel")
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))


# ---------------------------------------------------------------------------------------------------- consistency


def parsing_with_edges() -> Tensor:
    """Logits of three classes in vertical stripes with a little noise that changes no class, [1, 3, 8, 12]."""
    labels = (torch.arange(12) // 4).expand(1, 8, 12)
    return 5 * F.one_hot(labels, 3).movedim(-1, 1) + torch.rand(1, 3, 8, 12)


def test_consistency_is_the_doubt_of_the_edge_branch_on_predicted_edges() -> None:
    parsing, edge = parsing_with_edges(), torch.randn(1, 2, 8, 12)
    labels = torch.zeros(1, 8, 12, dtype=torch.int64)
    labels[:, :, 7:] = 255
    predicted = parsing.argmax(dim=1)
    predicted[:, :, 7:] = 255
    counts = edge_map(predicted) == 1
    counts[:, :, 7:] = False
    assert 0 < counts.sum() < counts.numel()
    expected = (1 - edge.softmax(dim=1)[:, 1])[counts].mean()
    torch.testing.assert_close(consistency_loss(parsing, edge, labels), expected)


def test_consistency_teaches_the_edge_branch_alone() -> None:
    parsing, edge = parsing_with_edges().requires_grad_(), torch.randn(1, 2, 8, 12, requires_grad=True)
    consistency_loss(parsing, edge, torch.zeros(1, 8, 12, dtype=torch.int64)).backward()
    assert edge.grad.any()
    assert (edge.grad[:, 1] <= 0).all()  # more edge, less loss
    assert parsing.grad is None


def test_consistency_is_zero_where_the_edge_branch_is_certain_and_never_nan() -> None:
    parsing, labels = parsing_with_edges(), torch.zeros(1, 8, 12, dtype=torch.int64)
    certain = torch.tensor([-50.0, 50.0]).reshape(1, 2, 1, 1).expand(1, 2, 8, 12)
    assert consistency_loss(parsing, certain, labels) == pytest.approx(0, abs=1e-12)
    edge = torch.randn(1, 2, 8, 12, requires_grad=True)
    for nothing in (
        consistency_loss(torch.ones(1, 3, 8, 12), edge, labels),
        consistency_loss(parsing, edge, torch.full((1, 8, 12), 255)),
    ):
        assert nothing == 0
        nothing.backward()
    assert torch.equal(edge.grad, torch.zeros_like(edge))


# ---------------------------------------------------------------------------------------------------- the whole loss


@pytest.fixture
def output() -> ParsingOutput:
    return ParsingOutput(*(torch.randn(2, channels, 5, 6, requires_grad=True) for channels in (4, 4, 2)))


@pytest.fixture
def labels() -> Tensor:
    labels = torch.randint(0, 4, (2, 1, 4, 3)).float()
    labels = F.interpolate(labels, size=(17, 11))[:, 0].long()
    labels[:, 13:] = 255
    return labels


def resized(logits: Tensor) -> Tensor:
    return F.interpolate(logits, size=(17, 11), mode="bilinear", align_corners=True)


def soft_labels(labels: Tensor, blend: Any = "probabilities") -> SoftLabels:
    torch.manual_seed(7)
    parsing = refined_labels(3 * torch.randn(2, 4, 5, 6), labels, 0.5, blend=blend)
    return SoftLabels(parsing, refined_labels(3 * torch.randn(2, 2, 5, 6), edge_map(labels), 0.5, blend=blend))


def test_loss_before_the_cycles(output: ParsingOutput, labels: Tensor) -> None:
    before = labels.clone()
    expected = edge_loss(resized(output.edge), edge_map(labels))
    for logits in map(resized, (output.parsing, output.logits)):
        expected = expected + 0.5 * F.cross_entropy(logits, labels, ignore_index=255)
        expected = expected + 0.5 * lovasz_softmax(logits.softmax(dim=1), labels)
    torch.testing.assert_close(parsing_loss(output, labels, consistency_weight=0), expected)
    for logits in map(resized, (output.parsing, output.logits)):
        expected = expected + 0.1 * consistency_loss(logits, resized(output.edge), labels)
    torch.testing.assert_close(parsing_loss(output, labels), expected)
    assert torch.equal(labels, before)


def test_loss_in_the_cycles(output: ParsingOutput, labels: Tensor) -> None:
    soft, before = soft_labels(labels), labels.clone()
    valid = labels != 255
    edge = resized(output.edge)

    def divergence(logits: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(logits.log_softmax(dim=1), target, reduction="none").movedim(1, -1)[valid].mean()

    expected = divergence(edge, soft.edge)
    for logits in map(resized, (output.parsing, output.logits)):
        expected = expected + 0.5 * divergence(logits, soft.parsing)
        expected = expected + 0.5 * lovasz_softmax(logits.softmax(dim=1), labels)
        expected = expected + 0.1 * consistency_loss(logits, edge, labels)
    torch.testing.assert_close(parsing_loss(output, labels, soft=soft), expected)
    assert torch.equal(labels, before)


def test_ignored_pixels_never_count(output: ParsingOutput, labels: Tensor) -> None:
    """In cycles the prediction under them does not, whatever their soft labels are; the edges' own loss has no mask."""
    soft = soft_labels(labels)
    at_size = ParsingOutput(*(resized(logits).detach() for logits in output))
    losses = []
    for shift in (0.0, 3.0):
        moved = [logits.clone() for logits in at_size]
        for logits in moved:
            logits[:, 1, 13:] += shift
        target = SoftLabels(*(s.clone() for s in soft))
        target.parsing[:, :, 13:] = target.parsing[:, :, 13:].flip(1) if shift else target.parsing[:, :, 13:]
        losses.append(parsing_loss(ParsingOutput(*moved), labels, soft=target))
    torch.testing.assert_close(losses[0], losses[1])


def test_official_loss_has_no_consistency(output: ParsingOutput, labels: Tensor) -> None:
    official = parsing_loss(output, labels, semantics="official")
    assert torch.equal(official, parsing_loss(output, labels, consistency_weight=0))
    assert not torch.allclose(official, parsing_loss(output, labels))


def test_official_loss_in_cycles_takes_ignored_pixels_for_background(output: ParsingOutput, labels: Tensor) -> None:
    """From the first divergence on, which comes after the first Lovász-softmax."""
    soft, before = soft_labels(labels, "logits"), labels.clone()
    overwritten = labels.masked_fill(labels == 255, 0)
    expected = F.kl_div(resized(output.edge).log_softmax(dim=1), soft.edge, reduction="none").mean()
    for logits, seen in ((resized(output.parsing), labels), (resized(output.logits), overwritten)):
        expected = expected + 0.5 * F.kl_div(logits.log_softmax(dim=1), soft.parsing, reduction="none").mean()
        expected = expected + 0.5 * lovasz_softmax(logits.softmax(dim=1), seen)
    torch.testing.assert_close(parsing_loss(output, labels, soft=soft, semantics="official"), expected)
    assert torch.equal(labels, before)


def test_soft_labels_without_edges_leave_the_edges_to_the_labels(output: ParsingOutput, labels: Tensor) -> None:
    soft = soft_labels(labels)
    hard = edge_loss(resized(output.edge), edge_map(labels))
    kept = {"parsing_weight": 0.0, "consistency_weight": 0.0}
    torch.testing.assert_close(parsing_loss(output, labels, soft=soft._replace(edge=None), **kept), hard)
    assert not torch.allclose(parsing_loss(output, labels, soft=soft, **kept), hard)


def test_weights_scale_their_terms(output: ParsingOutput, labels: Tensor) -> None:
    none = {"parsing_weight": 0.0, "edge_weight": 0.0, "consistency_weight": 0.0}
    alone = {name: parsing_loss(output, labels, **{**none, name: 1.0}) for name in none}
    total = parsing_loss(output, labels, parsing_weight=2.0, edge_weight=3.0, consistency_weight=5.0)
    expected = 2 * alone["parsing_weight"] + 3 * alone["edge_weight"] + 5 * alone["consistency_weight"]
    torch.testing.assert_close(total, expected)
    assert all(term > 0 for term in alone.values())


def test_share_of_lovasz_moves_between_the_two_parsing_terms(output: ParsingOutput, labels: Tensor) -> None:
    others = {"edge_weight": 0.0, "consistency_weight": 0.0}
    cross_entropies, halves, lovasz = (parsing_loss(output, labels, lovasz_share=x, **others) for x in (0.0, 0.5, 1.0))
    torch.testing.assert_close(
        cross_entropies,
        sum(F.cross_entropy(resized(x), labels, ignore_index=255) for x in (output.parsing, output.logits)),
    )
    torch.testing.assert_close(halves, (cross_entropies + lovasz) / 2)


def test_reduction_changes_the_divergences(output: ParsingOutput, labels: Tensor) -> None:
    soft, others = soft_labels(labels), {"lovasz_share": 0.0, "consistency_weight": 0.0}
    element, pixel = (parsing_loss(output, labels, soft=soft, reduction=r, **others) for r in ("element", "pixel"))
    edges = parsing_loss(output, labels, soft=soft, parsing_weight=0.0, **others)
    torch.testing.assert_close(pixel, 4 * (element - edges) + 2 * edges)


@pytest.mark.parametrize("cycles", [False, True])
@pytest.mark.parametrize("semantics", ["corrected", "official"])
@pytest.mark.parametrize("labels_are", ["uniform", "ignored"])
def test_degenerate_batches_are_finite(output: ParsingOutput, cycles: bool, semantics: Any, labels_are: str) -> None:
    labels = torch.full((2, 17, 11), 255 if labels_are == "ignored" else 2)
    soft = soft_labels(labels, "logits" if semantics == "official" else "probabilities") if cycles else None
    loss = parsing_loss(output, labels, soft=soft, semantics=semantics)
    loss.backward()
    assert loss.isfinite()
    assert all(logits.grad.isfinite().all() for logits in output)


def test_edge_loss_of_uniform_labels_leaves_the_edge_branch_alone(output: ParsingOutput) -> None:
    parsing_loss(output, torch.ones(2, 17, 11, dtype=torch.int64), consistency_weight=0).backward()
    assert not output.edge.grad.any()
    assert output.logits.grad.any()


def test_one_image_will_do(output: ParsingOutput, labels: Tensor) -> None:
    one = ParsingOutput(*(logits[:1] for logits in output))
    assert parsing_loss(one, labels[:1]).isfinite()
    assert parsing_loss(one, labels[:1], soft=SoftLabels(*(s[:1] for s in soft_labels(labels)))).isfinite()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"semantics": "paper"}, "semantics must be 'corrected' or 'official', got 'paper'"),
        ({"lovasz_share": 1.5}, "lovasz_share must be between 0 and 1, got 1.5"),
        ({"lovasz_share": math.nan}, "lovasz_share must be between 0 and 1, got nan"),
    ],
    ids=str,
)
def test_wrong_options_are_named(output: ParsingOutput, labels: Tensor, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        parsing_loss(output, labels, **options)


def test_wrong_input_is_named(output: ParsingOutput, labels: Tensor) -> None:
    with pytest.raises(DataError, match=r"labels contain the value 4, which is neither a class \(0 to 3\)"):
        parsing_loss(output, labels.masked_fill(labels == 0, 4))
    with pytest.raises(DataError, match=r"labels must be int64, got torch.uint8"):
        parsing_loss(output, labels.to(torch.uint8))
    with pytest.raises(ValueError, match=r"^labels must be \[B, H, W\], got \[17, 11\]"):
        edge_map(labels[0])
    with pytest.raises(ValueError, match=r"^alpha must be between 0 and 1, got 1.5"):
        refined_labels(output.logits, labels, 1.5)
    with pytest.raises(ValueError, match=r"^blend must be 'probabilities' or 'logits', got 'labels'"):
        refined_labels(output.logits, labels, 0.5, blend="labels")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^reduction must be 'element' or 'pixel', got 'mean'"):
        soft_label_loss(output.logits, output.logits, labels, reduction="mean")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"logits are \[5, 6\] and labels \[17, 11\]: sizes differ"):
        lovasz_softmax(output.logits, labels)
