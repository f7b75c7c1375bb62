"""Augmentation keeps image and label together, draws from torch's generator only, and pads with what is ignored."""

from __future__ import annotations

import pickle

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from gingham.data import CueScenes, SegmentationItem
from gingham.data.transforms import (
    EvaluationTransform,
    FixedSize,
    Normalize,
    PadTo,
    RandomCropWithin,
    RandomScale,
    RandomScaleCropFlip,
    bgr_mean_normalize,
    imagenet_normalize,
)

RAW = Normalize((0.0, 0.0, 0.0))


def coordinates(height: int = 40, width: int = 56) -> SegmentationItem:
    """An item whose image holds each pixel's row and column and whose label holds row + column."""
    row = torch.arange(height)[:, None].expand(height, width)
    column = torch.arange(width)[None].expand(height, width)
    image = torch.stack([row, column, row + column]).to(torch.uint8)
    return {"image": image, "label": (row + column).to(torch.int64), "name": "coordinates"}


def test_same_torch_state_gives_the_same_item() -> None:
    scenes = CueScenes("train", 4, transform=RandomScaleCropFlip(48))
    torch.manual_seed(7)
    first = [scenes[index] for index in range(4)]
    torch.manual_seed(7)
    again = [scenes[index] for index in range(4)]
    other = [scenes[index] for index in range(4)]
    assert all(
        torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
        for a, b in zip(first, again, strict=True)
    )
    assert not all(torch.equal(a["image"], b["image"]) for a, b in zip(first, other, strict=True))


def test_result_is_plain_tensors_of_the_crop_size() -> None:
    item = RandomScaleCropFlip((33, 70))(coordinates())
    assert type(item["image"]) is torch.Tensor and type(item["label"]) is torch.Tensor
    assert item["image"].shape == (3, 33, 70) and item["image"].dtype == torch.float32
    assert item["label"].shape == (33, 70) and item["label"].dtype == torch.int64
    assert item["image"].is_contiguous() and item["label"].is_contiguous() and item["name"] == "coordinates"


def test_crop_and_flip_keep_image_and_label_together() -> None:
    transform = RandomScaleCropFlip((20, 24), rescale=None, normalize=RAW)
    flips = set()
    for seed in range(40):
        torch.manual_seed(seed)
        item = transform(coordinates())
        row, column, total = item["image"].to(torch.int64)
        assert torch.equal(item["label"], total) and torch.equal(row + column, total)
        assert torch.equal(row[1:] - row[:-1], torch.ones(19, 24, dtype=torch.int64)), "rows keep their direction"
        flips.add(int(column[0, 1] - column[0, 0]))
    assert flips == {1, -1}


def test_crops_reach_every_offset_and_no_further() -> None:
    crop = RandomCropWithin((38, 56))
    tops = {int(crop(tv_tensors.Image(coordinates()["image"]))[0, 0, 0]) for _ in range(60)}
    assert tops == {0, 1, 2}


def test_padding_is_zero_after_normalisation_and_ignored_in_the_label() -> None:
    item = RandomScaleCropFlip((50, 64), rescale=None, flip_probability=0, normalize=bgr_mean_normalize())(
        coordinates()
    )
    assert (item["label"][40:] == 255).all() and (item["label"][:, 56:] == 255).all()
    assert (item["image"][:, 40:] == 0).all() and (item["image"][:, :, 56:] == 0).all()
    assert torch.equal(item["label"][:40, :56], coordinates()["label"])
    assert (item["image"][:, :40, :56] != 0).all()


def test_pad_to_leaves_what_is_large_enough() -> None:
    image = tv_tensors.Image(coordinates()["image"])
    assert PadTo((10, 10))(image).shape == image.shape


def test_scale_factors_of_the_official_recipe_are_fifteen() -> None:
    scale = RandomScale(0.7, 2.1, 0.1)
    image = tv_tensors.Image(torch.zeros(3, 10, 100, dtype=torch.uint8))
    sizes = {tuple(scale(image).shape[1:]) for _ in range(400)}
    assert sizes == {(round(tenths), 10 * tenths) for tenths in range(7, 22)}


def test_scale_range_is_continuous_and_kept() -> None:
    scale = RandomScale(0.5, 2.0)
    image = tv_tensors.Image(torch.zeros(3, 1, 1000, dtype=torch.uint8))
    widths = [scale(image).shape[2] for _ in range(100)]
    assert len(set(widths)) > 80 and 500 <= min(widths) < 700 and 1700 < max(widths) <= 2000


def test_scaling_invents_no_label_values_and_is_not_transposed() -> None:
    scenes = CueScenes("train", 1)
    item = scenes[0]
    scaled = RandomScaleCropFlip((128, 96), rescale=RandomScale(2, 2), flip_probability=0, normalize=RAW)(item)
    assert set(scaled["label"].unique().tolist()) <= set(item["label"].unique().tolist())
    doubled = item["label"].repeat_interleave(2, 0).repeat_interleave(2, 1)
    shifts = [torch.equal(scaled["label"], doubled[:, left : left + 96]) for left in range(33)]
    assert any(shifts)


def test_random_short_side_of_torchvision_fits_in() -> None:
    transform = RandomScaleCropFlip(32, rescale=v2.RandomShortestSize([20, 30]), normalize=RAW)
    assert transform(coordinates())["image"].shape == (3, 32, 32)


def test_bgr_normalisation_swaps_and_subtracts() -> None:
    item = coordinates()
    item["image"] = torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1).expand(3, 40, 56)
    image = EvaluationTransform(normalize=bgr_mean_normalize())(item)["image"]
    expected = torch.tensor([50 - 104.00698793, 100 - 116.66876762, 200 - 122.67891434])
    torch.testing.assert_close(image[:, 3, 5], expected)


def test_imagenet_normalisation_equals_torchvision() -> None:
    image = coordinates()["image"]
    expected = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(image.float() / 255)
    torch.testing.assert_close(imagenet_normalize()(tv_tensors.Image(image)).as_subclass(torch.Tensor), expected)


def test_evaluation_keeps_size_and_label() -> None:
    item = EvaluationTransform()(coordinates())
    assert torch.equal(item["label"], coordinates()["label"]) and item["image"].shape == (3, 40, 56)
    assert type(item["image"]) is torch.Tensor


def test_pictures_are_brought_to_one_size_and_mirrored_with_their_labels() -> None:
    item = coordinates()
    same = FixedSize(None, normalize=RAW)(item)
    assert same["image"].equal(item["image"].float()) and same["label"].equal(item["label"])
    mirrored = FixedSize(None, flip_probability=1.0, normalize=RAW)(item)
    assert mirrored["image"].equal(item["image"].flip(2).float()) and mirrored["label"].equal(item["label"].flip(1))
    half = FixedSize((20, 28), normalize=RAW)(item)
    torch.testing.assert_close(half["image"][0, 1:-1, 5], 2 * torch.arange(1.0, 19) + 0.5, atol=0.6, rtol=0)
    torch.testing.assert_close(half["image"][1, 5, 1:-1], 2 * torch.arange(1.0, 27) + 0.5, atol=0.6, rtol=0)
    assert (half["label"].float() - half["image"][2]).abs().max() < 3
    with pytest.raises(ValueError, match="size must be rows and columns, 1 or above, got"):
        FixedSize((0, 8))
    with pytest.raises(ValueError, match="flip_probability must be 0 to 1, got 2"):
        FixedSize(None, flip_probability=2)


def test_transforms_travel_to_worker_processes() -> None:
    transform = pickle.loads(pickle.dumps(RandomScaleCropFlip(16)))
    torch.manual_seed(0)
    one = transform(coordinates())
    torch.manual_seed(0)
    assert torch.equal(one["image"], RandomScaleCropFlip(16)(coordinates())["image"])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RandomScaleCropFlip(0), "crop_size must be 1 or above, got 0"),
        (lambda: RandomScaleCropFlip(8, flip_probability=1.5), "flip_probability must be 0 to 1, got 1.5"),
        (lambda: RandomScale(2, 1), "scale factors must satisfy 0 < low <= high, got 2 and 1"),
        (lambda: RandomScale(1, 2, 0), "step must be above 0, got 0"),
        (lambda: Normalize((1.0,)), "mean and std must have three entries, got 1 and 3"),
        (lambda: Normalize((1.0, 1.0, 1.0), channels="GRB"), "channels must be 'RGB' or 'BGR', got 'GRB'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_named(make: object, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()  # type: ignore[operator]
    assert str(caught.value) == text
