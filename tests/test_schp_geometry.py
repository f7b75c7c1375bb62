"""The person warp: its numbers, its way back, the augmentation made of it, and the network's square."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.data.labels import LabelSpace, mirror_labels
from gingham.data.person_warp import PersonAugmentation, inverse_matrix, person_matrix, warp_bilinear, warp_nearest
from gingham.data.segmentation import SegmentationItem
from gingham.data.transforms import Normalize, imagenet_normalize
from gingham.methods.schp.geometry import IMAGENET_BLACK, warp_from_network, warp_to_network

RAW = Normalize((0.0, 0.0, 0.0))
LIP_PAIRS = ((14, 15), (16, 17), (18, 19))
ATR_PAIRS = ((9, 10), (12, 13), (14, 15))
STILL: dict[str, Any] = {"scale": 0.0, "rotation": 0.0, "flip_probability": 0.0}


def blocks(height: int, width: int, side: int = 40) -> Tensor:
    """A label map in which every block has its own value."""
    return torch.arange(height)[:, None] // side * 16 + torch.arange(width)[None] // side


def coordinates(height: int = 40, width: int = 56) -> SegmentationItem:
    """An item whose image holds each pixel's row and column and whose label holds row + column."""
    row = torch.arange(height)[:, None].expand(height, width)
    column = torch.arange(width)[None].expand(height, width)
    image = torch.stack([row, column, row + column]).to(torch.uint8)
    return {"image": image, "label": (row + column).to(torch.int64), "name": "coordinates"}


# ---------------------------------------------------------------------------------------------------- the matrix


@pytest.mark.parametrize(
    ("size", "target", "angle", "expected"),
    [
        ((300, 200), 473, 0, [[1.57860, 0, 78.92977], [0, 1.57860, 0]]),
        ((100, 300), 473, 0, [[1.57860, 0, 0], [0, 1.57860, 157.85953]]),
        ((473, 473), 473, 0, [[1, 0, 0], [0, 1, 0]]),
        ((101, 101), 101, 30, [[0.8660, 0.5, -18.3013], [-0.5, 0.8660, 31.6987]]),
    ],
)
def test_matrix_has_the_official_numbers(
    size: tuple[int, int], target: int, angle: float, expected: list[list[float]]
) -> None:
    matrix = person_matrix(size, (target, target), angle=angle)
    torch.testing.assert_close(matrix, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-5)


def test_a_larger_box_makes_the_person_smaller() -> None:
    matrix = person_matrix((300, 200), (473, 473), box_factor=1.25)
    torch.testing.assert_close(matrix[0, 0], person_matrix((300, 200), (473, 473))[0, 0] / 1.25)
    middle = torch.tensor([99.5, 149.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(matrix @ middle, torch.tensor([236.0, 236.0], dtype=torch.float64))


def test_a_picture_of_the_target_size_stays_whatever_its_shape() -> None:
    identity = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(person_matrix((64, 32), (64, 32)), identity)
    image = torch.randint(0, 256, (1, 3, 473, 473)).float()
    matrix = person_matrix((473, 473), (473, 473))
    assert torch.equal(warp_bilinear(image, matrix, (473, 473)).round(), image)
    assert torch.equal(warp_nearest(image, matrix, (473, 473)), image)


def test_inverse_is_the_way_back() -> None:
    matrix = person_matrix((300, 200), (473, 377), box_factor=0.8, angle=-50)
    both = torch.cat([matrix, torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)])
    back = inverse_matrix(matrix) @ both
    torch.testing.assert_close(back, torch.eye(3, dtype=torch.float64)[:2], rtol=0, atol=1e-9)


def test_smallest_pictures_have_a_matrix() -> None:
    assert torch.isfinite(person_matrix((1, 1), (8, 8))).all()
    assert warp_nearest(torch.full((1, 1), 5), person_matrix((1, 1), (9, 9)), (9, 9), fill=255)[4, 4] == 5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": (0, 3)}, r"size must be 1 or more, got \(0, 3\)"),
        ({"target": (473, 1)}, r"target must be 2 or more, got \(473, 1\)"),
        ({"box_factor": 0.0}, r"box_factor must be above 0, got 0.0"),
    ],
    ids=str,
)
def test_numbers_outside_their_range_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        person_matrix(**{"size": (3, 3), "target": (3, 3)} | options)


# ---------------------------------------------------------------------------------------------------- the warps


def test_labels_come_back_from_the_network_as_they_went() -> None:
    labels = blocks(400, 320)
    matrix = person_matrix((400, 320), (473, 473))
    warped = warp_nearest(labels, matrix, (473, 473), fill=255)
    assert round((warped == 255).double().mean().item(), 4) == 0.1987
    assert torch.equal(warp_nearest(warped, inverse_matrix(matrix), (400, 320)), labels)
    whole = person_matrix((400, 320), (473, 473), centre=(159, 199))
    agreement = (warp_nearest(warped, inverse_matrix(whole), (400, 320)) == labels).double().mean()
    assert 0.97 < agreement < 0.98


def test_bilinear_warp_interpolates_between_the_four_around() -> None:
    maps = torch.randn(2, 3, 9, 12, dtype=torch.float64)
    matrix = person_matrix((9, 12), (20, 17), box_factor=1.1, angle=20)
    warped = warp_bilinear(maps, matrix, (20, 17), fill=(0.5, -1.0, 2.0))
    back = inverse_matrix(matrix)
    padded = torch.stack(
        [F.pad(maps[:, channel], (2, 2, 2, 2), value=fill) for channel, fill in enumerate((0.5, -1.0, 2.0))], dim=1
    )
    for row, column in ((0, 0), (3, 5), (10, 8), (19, 16), (12, 2)):
        x, y = (back @ torch.tensor([column, row, 1.0], dtype=torch.float64)).tolist()
        if not (-1 <= x <= 12 and -1 <= y <= 9):
            expected = torch.tensor([[0.5, -1.0, 2.0]] * 2, dtype=torch.float64)
        else:
            left, top = math.floor(x), math.floor(y)
            corners = padded[:, :, top + 2 : top + 4, left + 2 : left + 4]
            weights = torch.tensor(
                [
                    [(1 - y + top) * (1 - x + left), (1 - y + top) * (x - left)],
                    [(y - top) * (1 - x + left), (y - top) * (x - left)],
                ],
                dtype=torch.float64,
            )
            expected = (corners * weights).sum(dim=(2, 3))
        torch.testing.assert_close(warped[:, :, row, column], expected)


def test_nearest_warp_takes_any_type_and_number_of_axes() -> None:
    matrix = person_matrix((6, 4), (6, 6))
    labels = torch.arange(24, dtype=torch.uint8).reshape(6, 4)
    expected = F.pad(labels, (1, 1), value=7)
    assert torch.equal(warp_nearest(labels, matrix, (6, 6), fill=7), expected)
    stacked = labels.expand(2, 5, 6, 4).clone()
    assert torch.equal(warp_nearest(stacked, matrix, (6, 6), fill=7), expected.expand(2, 5, 6, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_square_is_of_the_type_of_the_images(dtype: torch.dtype) -> None:
    images = torch.rand(1, 3, 6, 9)
    expected = warp_to_network(images.to(dtype).float(), 12)
    square = warp_to_network(images.to(dtype), 12)
    assert square.dtype == dtype
    torch.testing.assert_close(square, expected.to(dtype), rtol=0.01, atol=0.01)


def test_half_precision_maps_are_warped_in_single() -> None:
    maps = torch.rand(1, 1, 6, 300).half()
    matrix = person_matrix((6, 300), (200, 200))
    assert torch.equal(warp_bilinear(maps, matrix, (200, 200)), warp_bilinear(maps.float(), matrix, (200, 200)))


# ---------------------------------------------------------------------------------------------------- augmentation


def test_mirroring_exchanges_left_and_right() -> None:
    row = torch.tensor([[14, 15, 16, 17, 18, 19, 5]])
    assert mirror_labels(row.flip(-1), LIP_PAIRS).tolist() == [[5, 18, 19, 16, 17, 14, 15]]
    item: SegmentationItem = {"image": torch.zeros(3, 7, 7, dtype=torch.uint8), "label": row.expand(7, 7), "name": "x"}
    mirrored = PersonAugmentation(7, **{**STILL, "flip_probability": 1.0}, mirror_pairs=LIP_PAIRS)(item)
    assert mirrored["label"][3].tolist() == [5, 18, 19, 16, 17, 14, 15]


@pytest.mark.parametrize(("classes", "pairs"), [(20, LIP_PAIRS), (18, ATR_PAIRS), (7, ())])
def test_mirroring_twice_is_nothing(classes: int, pairs: tuple[tuple[int, int], ...]) -> None:
    palette = ((0, 0, 0),) * classes
    space = LabelSpace(tuple(map(str, range(classes))), palette, mirror_pairs=pairs)
    augment = PersonAugmentation((9, 13), **{**STILL, "flip_probability": 1.0}, mirror_pairs=pairs, normalize=RAW)
    item: SegmentationItem = {
        "image": torch.randint(0, 256, (3, 9, 13), dtype=torch.uint8),
        "label": torch.randint(0, space.num_classes, (9, 13)),
        "name": "x",
    }
    once = augment(item)
    assert not torch.equal(once["label"], item["label"])
    twice = augment({**once, "image": once["image"].to(torch.uint8)})
    assert torch.equal(twice["label"], item["label"])
    assert torch.equal(twice["image"], item["image"].float())


def test_image_and_label_move_together() -> None:
    augment = PersonAugmentation((70, 90), normalize=RAW)
    flips = set()
    for seed in range(25):
        torch.manual_seed(seed)
        item = augment(coordinates())
        row, column, total = item["image"]
        known = item["label"] != 255
        around = F.pad((~known)[None].float(), (2, 2, 2, 2), value=1)
        inner = F.max_pool2d(around, 5, 1)[0] == 0  # away from the border, which is mixed with black
        assert inner.sum() > 500
        assert ((row + column - total)[inner].abs() <= 2).all()
        assert ((total - item["label"])[inner].abs() <= 2).all()
        middle = column[35, 20:70][inner[35, 20:70]]
        flips.add(bool(middle[-1] < middle[0]))
    assert flips == {True, False}


def test_around_the_picture_lie_black_and_ignored_labels() -> None:
    item: SegmentationItem = {
        "image": torch.full((3, 20, 10), 200, dtype=torch.uint8),
        "label": torch.full((20, 10), 3),
        "name": "x",
    }
    warped = PersonAugmentation(20, **STILL)(item)
    black = imagenet_normalize()
    expected = torch.tensor([-mean / std for mean, std in zip(black.mean, black.std, strict=True)])
    torch.testing.assert_close(warped["image"][:, 3, 2], expected)
    assert (warped["label"][:, 5:15] == 3).all()
    assert (warped["label"][:, :5] == 255).all() and (warped["label"][:, 15:] == 255).all()


def test_a_picture_of_the_size_comes_out_as_it_went_in() -> None:
    item = coordinates(64, 32)
    result = PersonAugmentation((64, 32), **STILL, normalize=RAW)(item)
    assert torch.equal(result["image"], item["image"].float())
    assert torch.equal(result["label"], item["label"])


def test_scale_and_rotation_have_the_official_distribution() -> None:
    augment = PersonAugmentation(101)
    torch.manual_seed(0)
    matrices = torch.stack([augment.draw_matrix((101, 101)) for _ in range(2000)])
    factors = 1 / torch.linalg.det(matrices[:, :, :2]).sqrt()
    angles = torch.rad2deg(torch.atan2(matrices[:, 0, 1], matrices[:, 0, 0]))
    assert factors.min().item() == pytest.approx(0.75) and factors.max().item() == pytest.approx(1.25)
    for limit in (0.75, 1.25):  # each holds the tail beyond one deviation
        assert ((factors - limit).abs() < 1e-6).double().mean().item() == pytest.approx(0.1587, abs=0.03)
    rotated = angles.abs() > 1e-9
    assert rotated.double().mean().item() == pytest.approx(0.6, abs=0.03)
    assert angles.abs().max().item() == pytest.approx(60)
    assert (angles[rotated].abs() < 30).double().mean().item() == pytest.approx(0.6827, abs=0.03)
    assert angles[rotated].mean().abs() < 3


def test_same_torch_state_gives_the_same_item_in_any_process() -> None:
    augment = PersonAugmentation((33, 21))
    copied = pickle.loads(pickle.dumps(augment))
    results = []
    for transform in (augment, copied, augment):
        torch.manual_seed(5 if len(results) < 2 else 6)
        results.append(transform(coordinates()))
    assert torch.equal(results[0]["image"], results[1]["image"])
    assert torch.equal(results[0]["label"], results[1]["label"])
    assert not torch.equal(results[0]["image"], results[2]["image"])


def test_result_is_plain_tensors_of_the_size() -> None:
    before = coordinates()
    item = PersonAugmentation((33, 70))(before)
    assert type(item["image"]) is Tensor and type(item["label"]) is Tensor
    assert item["image"].shape == (3, 33, 70) and item["image"].dtype == torch.float32
    assert item["label"].shape == (33, 70) and item["label"].dtype == torch.int64
    assert item["image"].is_contiguous() and item["label"].is_contiguous() and item["name"] == "coordinates"
    assert torch.equal(before["label"], coordinates()["label"]) and torch.equal(before["image"], coordinates()["image"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 1}, r"size must be 2 or above, got 1"),
        ({"scale": 1.0}, r"scale must be 0 or more and below 1, got 1.0"),
        ({"rotation": -1.0}, r"rotation must be 0 or more, got -1.0"),
        ({"rotation_probability": 1.5}, r"rotation_probability must be 0 to 1, got 1.5"),
        ({"flip_probability": -0.5}, r"flip_probability must be 0 to 1, got -0.5"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        PersonAugmentation(**{"size": 8} | options)


# ---------------------------------------------------------------------------------------------------- the square


def test_pictures_lie_in_the_middle_of_the_square_with_black_around() -> None:
    images = torch.randn(2, 3, 9, 17)
    square = warp_to_network(images, 17)
    torch.testing.assert_close(square[:, :, 4:13], images)
    black = torch.tensor(IMAGENET_BLACK).reshape(3, 1, 1)
    torch.testing.assert_close(square[:, :, :4], black.expand(2, 3, 4, 17))
    torch.testing.assert_close(square[:, :, 13:], black.expand(2, 3, 4, 17))
    torch.testing.assert_close(imagenet_black(), black)


def imagenet_black() -> Tensor:
    from torchvision import tv_tensors

    return imagenet_normalize()(tv_tensors.Image(torch.zeros(3, 1, 1, dtype=torch.uint8))).as_subclass(Tensor)


@pytest.mark.parametrize("protocol", ["labels", "logits"])
@pytest.mark.parametrize("size", [(400, 320), (33, 91)])
def test_predictions_come_back_to_the_picture(protocol: Any, size: tuple[int, int]) -> None:
    labels = blocks(*size)
    onehot = F.one_hot(labels, int(labels.max()) + 1).movedim(-1, 0)[None].float()
    matrix = person_matrix(size, (473, 473))
    logits = warp_nearest(onehot, matrix, (473, 473))
    back = warp_from_network(logits, size, protocol=protocol)
    assert back.shape == onehot.shape
    assert (back.argmax(1)[0] == labels).double().mean() > (0.995 if protocol == "logits" else 0.9999)


def test_labels_protocol_warps_the_most_likely_class() -> None:
    """As the official evaluation: argmax in the square, then the nearest label, and background around it."""
    logits = torch.randn(2, 5, 61, 61)
    for whole_centre in (False, True):
        warped = warp_from_network(logits, (40, 30), whole_centre=whole_centre).argmax(1)
        centre = (14, 19) if whole_centre else None
        back = inverse_matrix(person_matrix((40, 30), (61, 61), centre=centre))
        assert torch.equal(warped, warp_nearest(logits.argmax(1), back, (40, 30), fill=0))


def test_logits_protocol_interpolates_and_the_two_differ_along_boundaries() -> None:
    logits = F.interpolate(torch.randn(1, 5, 6, 6), size=(61, 61), mode="bilinear", align_corners=True)
    labels, smooth = (warp_from_network(logits, (40, 30), protocol=p) for p in ("labels", "logits"))
    back = inverse_matrix(person_matrix((40, 30), (61, 61)))
    torch.testing.assert_close(smooth, warp_bilinear(logits, back, (40, 30)))
    differing = (labels.argmax(1) != smooth.argmax(1)).double().mean()
    assert 0 < differing < 0.1


def test_whole_centre_is_off_by_half_a_pixel_in_even_sizes_only() -> None:
    logits = torch.randn(1, 3, 61, 61)
    odd = (41, 31)
    assert torch.equal(warp_from_network(logits, odd), warp_from_network(logits, odd, whole_centre=True))
    assert not torch.equal(warp_from_network(logits, (40, 30)), warp_from_network(logits, (40, 30), whole_centre=True))
    with pytest.raises(ValueError, match=r"^protocol must be 'labels' or 'logits', got 'nearest'"):
        warp_from_network(logits, odd, protocol="nearest")  # type: ignore[arg-type]
