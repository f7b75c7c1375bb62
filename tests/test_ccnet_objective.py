"""CCNet's losses: golden values, and behaviour against plain loops and SciPy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.errors import DataError
from gingham.methods.ccnet.network import SegmentationOutput
from gingham.methods.ccnet.objective import (
    category_consistent_loss,
    distance_penalty,
    segmentation_loss,
    variance_penalty,
)
from gingham.nn.segmentation_loss import HardPixels, hard_pixel_labels


def as_map(points: list[list[float]]) -> Tensor:
    """Features [1, C, 1, N] of N points."""
    return torch.tensor(points, dtype=torch.float64).T[None, :, None]


# --- the category-consistent loss ------------------------------------------------------------------------------------


def test_category_consistent_goldens() -> None:
    features = as_map([[0, 0], [4, 0], [10, 0], [10, 2]])
    terms = category_consistent_loss(features, torch.tensor([[[0, 0, 1, 1]]]))
    assert [float(term) for term in terms] == pytest.approx([0.875, 0.0, (2 + math.sqrt(101)) / 2], abs=1e-12)
    terms = category_consistent_loss(as_map([[0, 0], [1, 0]]), torch.tensor([[[3, 7]]]))
    assert [float(term) for term in terms] == pytest.approx([0.0, 4.0, 0.5], abs=1e-12)


def test_penalty_goldens() -> None:
    assert variance_penalty(torch.tensor([0.3, 1.0, 1.5, 2.5])).tolist() == [0.0, 0.25, 1.0, 2.0]
    assert distance_penalty(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])).tolist() == [9.0, 4.0, 1.0, 0.0, 0.0]


def test_variance_penalty_keeps_the_papers_kink() -> None:
    distance = torch.tensor([1.5 - 1e-6, 1.5 + 1e-6], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(variance_penalty(distance).sum(), distance)
    assert slope.tolist() == pytest.approx([2.0, 1.0], abs=1e-5)


def by_the_formula(features: Tensor, labels: Tensor) -> list[float]:
    """The category-consistent loss with loops, for labels of the features' size."""
    pixels = {}
    for value, feature in zip(labels.flatten().tolist(), features.movedim(1, -1).flatten(0, 2).numpy(), strict=True):
        if value != 255:
            pixels.setdefault(value, []).append(feature)
    means = {value: np.mean(members, axis=0) for value, members in pixels.items()}

    def phi(d: float) -> float:
        return 0 if d <= 0.5 else (d - 0.5) ** 2 if d <= 1.5 else d - 1.5 + 1

    variance = np.mean([np.mean([phi(np.linalg.norm(means[c] - h)) for h in hs]) for c, hs in pixels.items()])
    pairs = [(means[a], means[b]) for a in means for b in means if a != b]
    distance = np.mean([max(0.0, 3 - np.linalg.norm(a - b)) ** 2 for a, b in pairs])
    return [variance, distance, np.mean([np.linalg.norm(mean) for mean in means.values()])]


def test_category_consistent_loss_follows_the_formula() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, 5, 7))
    labels[:, :2] = 255
    terms = category_consistent_loss(features, labels)
    assert [float(term) for term in terms] == pytest.approx(by_the_formula(features, labels), rel=1e-12)


def test_gradients_flow_through_the_means() -> None:
    torch.manual_seed(0)
    features = torch.randn(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (1, 3, 4))
    assert torch.autograd.gradcheck(lambda maps: category_consistent_loss(maps, labels), features)


@pytest.mark.parametrize(
    ("labels", "zero"),
    [([0, 0, 255, 255], "distance"), ([255, 255, 255, 255], "all"), ([4, 9, 9, 255], "none")],
)
def test_few_classes_give_finite_values_and_gradients(labels: list[int], zero: str) -> None:
    features = as_map([[1, 2], [1, 2], [1, 2], [1, 2]]).requires_grad_()  # also: all distances are 0
    terms = category_consistent_loss(features, torch.tensor([[labels]]))
    (gradient,) = torch.autograd.grad(sum(terms), features)
    assert gradient.isfinite().all()
    assert torch.stack(terms).isfinite().all()
    if zero != "none":
        assert terms.distance == 0
    if zero == "all":
        assert terms.variance == 0
        assert terms.regularity == 0
        assert not gradient.any()


def test_ignored_pixels_do_not_count() -> None:
    features = as_map([[0, 0], [4, 0], [10, 0], [10, 2], [1000, 1000]])
    terms = category_consistent_loss(features, torch.tensor([[[0, 0, 1, 1, 255]]]))
    assert float(terms.variance) == pytest.approx(0.875)


def test_translation_and_relabelling_change_nothing_they_should_not() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, 5, 7))
    terms = category_consistent_loss(features, labels)
    moved = category_consistent_loss(features + 3, labels)
    torch.testing.assert_close(moved[:2], terms[:2])
    relabelled = category_consistent_loss(features, torch.tensor([7, 3, 19, 0, 2])[labels])
    torch.testing.assert_close(tuple(relabelled), tuple(terms))


def test_low_precision_features_are_summed_in_float32() -> None:
    features = torch.full((1, 1, 64, 64), 0.1, dtype=torch.bfloat16)
    terms = category_consistent_loss(features, torch.zeros(1, 64, 64, dtype=torch.int64))
    assert float(terms.regularity) == pytest.approx(float(features[0, 0, 0, 0]), rel=1e-5)


def test_labels_of_image_size_are_shrunk_to_the_features() -> None:
    features = as_map([[0, 0], [4, 0], [10, 0], [10, 2]]).expand(1, 2, 1, 4)
    labels = torch.tensor([[[0, 9, 9, 0, 9, 9, 1, 9, 9, 1]]])  # every third pixel is where a feature stands
    assert float(category_consistent_loss(features, labels).variance) == pytest.approx(0.875)


# --- the whole segmentation loss -------------------------------------------------------------------------------------


def test_auxiliary_term_weighs_two_fifths_and_sees_all_pixels() -> None:
    torch.manual_seed(0)
    logits, auxiliary = torch.randn(2, 2, 4, 9, 9)
    labels = torch.randint(0, 4, (2, 65, 65))
    labels[:, :30] = 255

    def plain(maps: Tensor, target: Tensor) -> Tensor:
        resized = F.interpolate(maps, size=(65, 65), mode="bilinear", align_corners=True)
        return F.cross_entropy(resized, target, ignore_index=255)

    output = SegmentationOutput(logits, auxiliary, logits)
    torch.testing.assert_close(
        segmentation_loss(output, labels), plain(logits, labels) + 0.4 * plain(auxiliary, labels)
    )
    selection = HardPixels(threshold=0.2, min_kept=0)
    upsampled = F.interpolate(logits, size=(65, 65), mode="bilinear", align_corners=True)
    hard = hard_pixel_labels(upsampled, labels, selection)
    assert (hard != labels).any()
    expected = plain(logits, hard) + 0.4 * plain(auxiliary, labels)
    torch.testing.assert_close(segmentation_loss(output, labels, hard_pixels=selection), expected)


@pytest.mark.parametrize("value", [19, 254, -1])
def test_label_out_of_range_is_named(value: int) -> None:
    output = SegmentationOutput(torch.zeros(1, 19, 4, 4), None, torch.zeros(1, 8, 4, 4))
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[0, 3, 3] = value
    text = rf"labels contain the value {value}, which is neither a class \(0 to 18\) nor ignore_index 255"
    with pytest.raises(DataError, match=text):
        segmentation_loss(output, labels)
    with pytest.raises(ValueError, match=text):
        hard_pixel_labels(torch.zeros(1, 19, 8, 8), labels)


def test_wrong_shapes_and_dtypes_are_named() -> None:
    output = SegmentationOutput(torch.zeros(2, 3, 4, 4), None, torch.zeros(2, 8, 4, 4))
    with pytest.raises(DataError, match=r"got \[2, 3, 4, 4\] and \[1, 8, 8\]"):
        segmentation_loss(output, torch.zeros(1, 8, 8, dtype=torch.int64))
    with pytest.raises(DataError, match=r"labels must be int64, got torch.uint8"):
        segmentation_loss(output, torch.zeros(2, 8, 8, dtype=torch.uint8))
    with pytest.raises(DataError, match="sizes differ"):
        hard_pixel_labels(torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64))
    with pytest.raises(DataError, match=r"features must be \[B, C, h, w\]"):
        category_consistent_loss(torch.zeros(3, 4, 4), torch.zeros(1, 8, 8, dtype=torch.int64))


@pytest.mark.parametrize("hard_pixels", [None, HardPixels(min_kept=0), HardPixels()])
def test_all_ignored_gives_a_differentiable_zero(hard_pixels: HardPixels | None) -> None:
    logits = torch.randn(1, 4, 8, 8, requires_grad=True)
    output = SegmentationOutput(logits, logits * 2, logits)
    loss = segmentation_loss(output, torch.full((1, 64, 64), 255), hard_pixels=hard_pixels)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_soft_labels_are_learned_as_they_are() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3, 3, requires_grad=True)
    soft = torch.randn(2, 4, 9, 9).softmax(1)
    labels = torch.randint(0, 4, (2, 9, 9))
    labels[1, :4] = 255
    output = SegmentationOutput(logits, None, logits)
    resized = F.interpolate(logits, size=(9, 9), mode="bilinear", align_corners=True)
    by_pixel = (soft * (soft.log() - resized.log_softmax(1))).sum(1)
    torch.testing.assert_close(segmentation_loss(output, labels, soft=soft), by_pixel[labels != 255].mean())
