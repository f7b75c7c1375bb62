"""Whole-image, sliding and multi-scale inference."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gingham.nn.inference import mirror_channels, multi_scale_flip, sliding_window, whole_image


class Output(NamedTuple):
    logits: Tensor


@pytest.fixture
def per_pixel() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, 5, 1).double()


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 37, 53, dtype=torch.float64)


def coarse(images: Tensor) -> Tensor:
    """A net whose features are coarser than its input and see its neighbourhood."""
    weight = torch.randn(4, 3, 3, 3, dtype=images.dtype, generator=torch.Generator().manual_seed(2))
    return F.conv2d(images, weight, stride=4, padding=1)


def symmetric(images: Tensor) -> Tensor:
    """A net that commutes with mirroring left to right, but not with mirroring top to bottom."""
    weight = torch.randn(4, 3, 3, 3, dtype=images.dtype, generator=torch.Generator().manual_seed(3))
    return F.conv2d(images, weight + weight.flip(-1), padding=1)


@pytest.mark.parametrize(("tile", "stride"), [(16, None), (16, 16), ((20, 12), (7, 5)), (64, None), (37, 30)])
def test_tiles_of_a_per_pixel_net_give_the_whole_image(per_pixel, images, tile, stride) -> None:
    result = sliding_window(per_pixel, images, tile=tile, stride=stride)
    torch.testing.assert_close(result, per_pixel(images), rtol=0, atol=1e-12)


def test_official_tiles_of_a_cityscapes_image() -> None:
    seen = []

    def predict(tile: Tensor) -> Tensor:
        seen.append((int(tile[0, 0, 0, 0]), int(tile[0, 1, 0, 0]), *tile.shape[-2:]))
        return tile[:, :1]

    rows, columns = torch.meshgrid(torch.arange(1024.0), torch.arange(2048.0), indexing="ij")
    sliding_window(predict, torch.stack([rows, columns, rows])[None])
    tops, lefts = (0, 255), (0, 513, 1026, 1279)
    assert seen == [(top, left, 769, 769) for top in tops for left in lefts]


def test_overlaps_are_averaged_and_padding_is_cut_off() -> None:
    levels = iter([1.0, 2.0, 5.0])

    def predict(tile: Tensor) -> Tensor:
        return torch.full((1, 1, *tile.shape[-2:]), next(levels))

    result = sliding_window(predict, torch.zeros(1, 3, 3, 7), tile=4, stride=2)
    expected = torch.tensor([1.0, 1.0, 1.5, (1 + 2 + 5) / 3, 3.5, 3.5, 5.0])
    torch.testing.assert_close(result, expected.expand(1, 1, 3, 7))


def test_small_images_are_padded_with_zeros_at_the_end() -> None:
    shapes = []

    def predict(tile: Tensor) -> Tensor:
        shapes.append(tuple(tile.shape))
        assert not tile[:, :, 3:].any()
        assert not tile[:, :, :, 5:].any()
        assert tile[:, :, :3, :5].all()
        return tile[:, :1]

    assert sliding_window(predict, torch.ones(2, 3, 3, 5), tile=8).shape == (2, 1, 3, 5)
    assert shapes == [(2, 3, 8, 8)]


def test_tile_logits_are_upsampled_with_aligned_corners() -> None:
    def predict(tile: Tensor) -> Tensor:
        return torch.tensor([[[[0.0, 4.0]]]])

    assert sliding_window(predict, torch.zeros(1, 3, 1, 5), tile=(1, 5)).tolist() == [[[[0.0, 1.0, 2.0, 3.0, 4.0]]]]
    assert whole_image(predict, torch.zeros(1, 3, 1, 5)).tolist() == [[[[0.0, 1.0, 2.0, 3.0, 4.0]]]]


@pytest.mark.parametrize(
    "infer",
    [
        partial(whole_image, coarse),
        partial(sliding_window, coarse, tile=16),
        partial(multi_scale_flip, coarse, scales=(0.5, 1.0, 1.7), flip=True),
        partial(multi_scale_flip, partial(sliding_window, coarse, tile=16), scales=(0.75, 1.25), flip=True),
    ],
    ids=["whole", "sliding", "multi-scale", "multi-scale sliding"],
)
def test_image_does_not_depend_on_its_batch(infer: Callable[[Tensor], Tensor], images: Tensor) -> None:
    together = infer(images)
    assert together.shape == (2, 4, 37, 53)
    alone = torch.cat([infer(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert not torch.allclose(together[0], together[1])


def test_flip_changes_nothing_for_a_symmetric_net(images: Tensor) -> None:
    result = multi_scale_flip(symmetric, images, flip=True)
    torch.testing.assert_close(result, symmetric(images), rtol=0, atol=1e-12)


def test_flip_averages_the_mirrored_prediction_mirrored_back(images: Tensor) -> None:
    expected = (coarse(images[..., :36, :53]) + coarse(images[..., :36, :53].flip(-1)).flip(-1)) / 2
    expected = F.interpolate(expected, size=(36, 53), mode="bilinear", align_corners=True)
    torch.testing.assert_close(multi_scale_flip(coarse, images[..., :36, :53], flip=True), expected)


def test_scales_count_equally_and_come_back_to_the_image_size() -> None:
    def predict(images: Tensor) -> Tensor:
        return torch.full((1, 1, *images.shape[-2:]), float(images.shape[-1]))

    result = multi_scale_flip(predict, torch.zeros(1, 3, 10, 20), scales=(0.5, 1.0, 1.5))
    torch.testing.assert_close(result, torch.full((1, 1, 10, 20), 20.0))


def test_logits_are_averaged_not_probabilities() -> None:
    def predict(images: Tensor) -> Tensor:
        logits = torch.zeros(1, 2, *images.shape[-2:])
        logits[:, 0] = 100.0 if images.shape[-1] == 20 else -1.0
        return logits

    result = multi_scale_flip(predict, torch.zeros(1, 3, 10, 20), scales=(0.5, 1.0, 1.5))
    torch.testing.assert_close(result[:, 0], torch.full((1, 10, 20), 98.0 / 3))


def test_probabilities_are_averaged_where_it_is_asked_for(images: Tensor) -> None:
    def upsampled(logits: Tensor) -> Tensor:
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=True)

    small = F.interpolate(images, (18, 26), mode="bilinear", align_corners=True)
    pairs = ((0, 3),)
    expected = torch.zeros(2, 4, 37, 53, dtype=torch.float64)
    for scaled in (small, images):
        mirrored = mirror_channels(coarse(scaled.flip(-1)).flip(-1), pairs)
        expected += (upsampled(coarse(scaled)).softmax(1) + upsampled(mirrored).softmax(1)) / 4
    infer = partial(multi_scale_flip, scales=(0.5, 1.0), flip=True, mirror_pairs=pairs, average="probabilities")
    result = infer(coarse, images)
    torch.testing.assert_close(result.exp(), expected)
    torch.testing.assert_close(result.softmax(1), expected)
    assert infer(lambda x: 1e4 * coarse(x), images).isfinite().all()


def test_model_outputs_and_low_precision_are_understood(images: Tensor) -> None:
    result = whole_image(lambda x: Output(coarse(x).bfloat16()), images)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), whole_image(coarse, images), rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    ("infer", "text"),
    [
        (partial(sliding_window, tile=0), "tile must be at least 1 pixel, got 0"),
        (partial(sliding_window, tile=8, stride=9), "stride must be between 1 and the tile 8, got 9"),
        (partial(sliding_window, tile=8, stride=0), "stride must be between 1 and the tile 8, got 0"),
        (partial(multi_scale_flip, scales=()), "scales must be one or more positive numbers"),
        (partial(multi_scale_flip, scales=(1.0, -1.0)), "scales must be one or more positive numbers"),
        (partial(multi_scale_flip, average="votes"), "average must be 'logits' or 'probabilities', got 'votes'"),
    ],
)
def test_wrong_arguments_are_named(infer, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        infer(coarse, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("infer", [whole_image, sliding_window, multi_scale_flip])
def test_images_must_be_floating_batches(infer) -> None:
    with pytest.raises(ValueError, match=r"images must be floating \[B, C, H, W\], got torch.uint8 \[3, 8, 8\]"):
        infer(coarse, torch.zeros(3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("pair", [(1, 4), (-1, 0)])
def test_pairs_without_channels_are_named(pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"mirror_pairs must be below the 4 channels, got \("):
        mirror_channels(torch.zeros(4, 2, 2), (pair,))


def test_left_and_right_change_places_in_the_mirrored_prediction(images: Tensor) -> None:
    pairs = ((0, 2),)

    def sided(x: Tensor) -> Tensor:  # class 0 likes the left, class 2 the right; a mirrored picture swaps them
        position = torch.linspace(-1, 1, x.shape[-1]).expand(x.shape[0], x.shape[2], -1)
        return torch.stack([-position, x[:, 0] * 0, position], dim=1)

    mirrored = multi_scale_flip(sided, images, flip=True, mirror_pairs=pairs)
    torch.testing.assert_close(mirrored, sided(images))
    assert multi_scale_flip(sided, images, flip=True).abs().max() < 1e-6
