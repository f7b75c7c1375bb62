"""The pieces of segmentation losses: label arithmetic and hard pixels against SciPy and plain code, soft labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from gingham.errors import DataError
from gingham.nn.segmentation_loss import (
    HardPixels,
    cross_entropy,
    hard_pixel_labels,
    shrink_labels,
    upsample_logits,
)

# --- label arithmetic ------------------------------------------------------------------------------------------------


def test_official_crop_shrinks_to_every_eighth_pixel() -> None:
    labels = torch.randint(0, 19, (1, 769, 769))
    assert torch.equal(shrink_labels(labels, (97, 97)), labels[:, ::8, ::8])


@pytest.mark.parametrize("size", [(64, 48), (37, 101), (8, 769), (20, 12)])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_shrinking_has_the_grid_of_scipy(size: tuple[int, int], factor: int) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 19, size)
    expected = ndimage.zoom(labels.numpy(), 1 / factor, order=0, mode="nearest")
    assert torch.equal(shrink_labels(labels[None], expected.shape)[0], torch.from_numpy(expected))


@pytest.mark.parametrize(("extent", "size"), [(64, 8), (63, 8), (9, 4), (5, 5), (7, 1)])
@pytest.mark.parametrize("align_corners", [True, False])
def test_shrinking_takes_the_pixel_nearest_to_where_upsampling_puts_the_cell(
    extent: int, size: int, align_corners: bool
) -> None:
    labels = torch.arange(extent).expand(1, 3, extent)
    found = shrink_labels(labels, (3, size), align_corners=align_corners)
    assert torch.equal(found[0, 0], found[0, 2]) and found.shape == (1, 3, size)
    index = torch.arange(size, dtype=torch.float64)
    centre = index * (extent - 1) / max(size - 1, 1) if align_corners else (index + 0.5) * extent / size - 0.5
    assert torch.equal(found[0, 0], (centre + 0.5).floor().long())


def test_upsampling_aligns_corners_by_default() -> None:
    logits = torch.tensor([[[[0.0, 4.0]]]])
    assert upsample_logits(logits, (1, 5)).tolist() == [[[[0.0, 1.0, 2.0, 3.0, 4.0]]]]
    assert upsample_logits(logits, (1, 4), align_corners=False).tolist() == [[[[0.0, 1.0, 3.0, 4.0]]]]
    assert upsample_logits(logits, (1, 2)) is logits


# --- hard pixels -----------------------------------------------------------------------------------------------------


def official_threshold(probabilities: np.ndarray, labels: np.ndarray, selection: HardPixels) -> float:
    """The selection of hard pixels with SciPy: shrink, then the k-th smallest probability of the true class."""
    factor = 1 / selection.shrink
    small = ndimage.zoom(probabilities, (1.0, 1.0, factor, factor), order=1, mode="nearest")
    small_labels = ndimage.zoom(labels, (1.0, factor, factor), order=0, mode="nearest")
    valid = small_labels != 255
    kept = selection.min_kept // selection.shrink**2
    if kept >= valid.sum():
        return 1.0
    batch, rows, columns = np.nonzero(valid)
    of_true_class = np.sort(small[batch, small_labels[valid], rows, columns])
    return max(selection.threshold, of_true_class[kept - 1]) if kept else selection.threshold


@pytest.mark.parametrize("min_kept", [0, 100, 1500, 4000, 8000, 10**6])
@pytest.mark.parametrize("size", [(64, 96), (57, 101)])
def test_hard_pixels_are_those_of_the_official_code(size: tuple[int, int], min_kept: int) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (2, *size))
    labels[:, :, :20] = 255
    logits = F.one_hot(labels.clamp(max=3), 4).movedim(-1, 1) * 2.0 + torch.randn(2, 4, *size)
    selection = HardPixels(threshold=0.5, min_kept=min_kept)
    probabilities = logits.softmax(dim=1)
    threshold = official_threshold(probabilities.numpy(), labels.numpy(), selection)
    of_true_class = probabilities.gather(1, labels.clamp(max=3)[:, None])[:, 0]
    decided = (of_true_class - threshold).abs() > 1e-5  # the k-th value itself may round either way
    expected = labels.where(of_true_class <= threshold, 255)
    assert torch.equal(hard_pixel_labels(logits, labels, selection)[decided], expected[decided])


def test_keeping_all_changes_no_label() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 32, 32), torch.randint(0, 4, (2, 32, 32))
    assert torch.equal(hard_pixel_labels(logits, labels, HardPixels(min_kept=10**6)), labels)


def test_easy_pictures_keep_about_min_kept_pixels() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (2, 64, 64))
    logits = F.one_hot(labels, 4).movedim(-1, 1) * (5 + torch.rand(2, 1, 64, 64))
    kept = (hard_pixel_labels(logits, labels, HardPixels(0.7, 2000)) != 255).sum()
    assert 1500 <= kept <= 2500  # the threshold is found on a coarse map


def test_ignored_pixels_are_never_kept() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (2, 32, 32))
    labels[:, 8:24] = 255
    for min_kept in (0, 500, 10**6):
        result = hard_pixel_labels(torch.randn(2, 4, 32, 32), labels, HardPixels(0.7, min_kept))
        assert (result[labels == 255] == 255).all()


# --- cross-entropy ---------------------------------------------------------------------------------------------------


def test_cross_entropy_of_nothing_is_zero() -> None:
    assert cross_entropy(torch.randn(1, 3, 2, 2), torch.full((1, 2, 2), 255)) == 0


def test_cross_entropy_is_the_mean_over_valid_pixels() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 6, 7), torch.randint(0, 5, (2, 6, 7))
    labels[0, :, :3] = 255
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits, labels, ignore_index=255))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_many_pixels_are_summed_in_single_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 4, 300, 300).to(dtype).requires_grad_(), torch.randint(0, 4, (1, 300, 300))
    soft = torch.randn(1, 4, 300, 300).softmax(1)
    for options in ({}, {"soft": soft}):
        loss = cross_entropy(logits, labels, **options)
        torch.testing.assert_close(loss, cross_entropy(logits.float(), labels, **options))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.dtype == dtype and gradient.isfinite().all()


def test_labels_and_soft_labels_that_do_not_fit_are_named() -> None:
    logits, labels = torch.zeros(1, 4, 2, 3), torch.zeros(1, 2, 3, dtype=torch.int64)
    for wrong, text in (
        (labels + 7, "labels contain the value 7, which is neither a class"),
        (labels.float(), "labels must be int64"),
        (labels[:, :1], "sizes differ"),
    ):
        with pytest.raises(DataError, match=text):
            cross_entropy(logits, wrong)
    for soft, ignored in ((torch.ones(1, 1, 1, 1), labels), (torch.ones(1, 4, 2, 3), labels[:, :1])):
        with pytest.raises(
            DataError, match=r"logits and soft must be \[B, K, H, W\] alike and labels \[B, H, W\], got"
        ):
            cross_entropy(logits, ignored, soft=soft)
    assert cross_entropy(logits, labels + 7, soft=torch.full((1, 4, 2, 3), 0.25)) == 0  # only say what is ignored


def test_soft_labels_have_the_gradient_of_soft_cross_entropy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    soft = torch.randn(2, 5, 4, 3, dtype=torch.float64).softmax(1)
    labels = torch.zeros(2, 4, 3, dtype=torch.int64)
    labels[0, 1] = 255
    (gradient,) = torch.autograd.grad(cross_entropy(logits, labels, soft=soft), logits)
    expected = (logits.softmax(1) - soft) * (labels != 255)[:, None] / (labels != 255).sum()
    torch.testing.assert_close(gradient, expected.detach())
    onehot = F.one_hot(labels.masked_fill(labels == 255, 0), 5).movedim(-1, 1).double()
    torch.testing.assert_close(cross_entropy(logits, labels, soft=onehot), cross_entropy(logits, labels))
    nothing = cross_entropy(logits, torch.full_like(labels, 255), soft=soft)
    assert nothing == 0
    assert torch.autograd.grad(nothing, logits)[0].abs().max() == 0
