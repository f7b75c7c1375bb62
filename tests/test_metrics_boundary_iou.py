"""Boundary IoU against a plain count of pixels by their distance to other classes."""

import pytest
import torch
from torch import Tensor

from gingham.errors import DataError
from gingham.metrics import BoundaryMeter


def plain_boundary(mask: Tensor, valid: Tensor, width: int) -> Tensor:
    """Pixels of a mask [H, W] with a valid pixel of another class, or the outside, in the square around them."""
    rows, columns = mask.shape
    found = torch.zeros_like(mask)
    for y in range(rows):
        for x in range(columns):
            for dy in range(-width, width + 1):
                for dx in range(-width, width + 1):
                    inside = 0 <= y + dy < rows and 0 <= x + dx < columns
                    if not inside or (valid[y + dy, x + dx] and not mask[y + dy, x + dx]):
                        found[y, x] = True
    return found & mask & valid


@pytest.mark.parametrize("width", [1, 2])
def test_boundaries_are_those_of_a_plain_count(width: int) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (3, 4, 3)).repeat_interleave(3, 1).repeat_interleave(4, 2)
    labels[0, :2] = 255
    prediction = labels.roll((1, 2), (1, 2)).masked_fill(labels.roll((1, 2), (1, 2)) == 255, 0)
    meter = BoundaryMeter(3, width=width)
    meter.update(prediction[:1], labels[:1])
    meter.update(prediction[1:], labels[1:])
    for index in range(3):
        shared = either = 0
        for drawn, predicted in zip(labels, prediction, strict=True):
            valid = drawn != 255
            one, other = (plain_boundary(mask, valid, width) for mask in (drawn == index, predicted == index))
            shared += int((one & other).sum())
            either += int((one | other).sum())
        assert meter.compute().iou[index].item() == pytest.approx(shared / either)
    assert meter.compute().mean.item() == pytest.approx(meter.compute().iou.mean().item())


def test_a_blurred_outline_costs_more_than_a_wrong_inside() -> None:
    labels = torch.zeros(1, 16, 16, dtype=torch.int64)
    labels[:, 3:13, 3:13] = 1
    hole = labels.clone()
    hole[:, 7:9, 7:9] = 0
    meters = [BoundaryMeter(2), BoundaryMeter(2)]
    meters[0].update(labels.roll(1, 2), labels)
    meters[1].update(hole, labels)
    assert meters[0].compute().iou[1] < 0.6 < meters[1].compute().iou[1]


def test_perfect_predictions_and_absent_classes() -> None:
    meter = BoundaryMeter(3)
    labels = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]]])
    meter.update(labels, labels)
    scores = meter.compute()
    assert scores.iou[:2].tolist() == [1.0, 1.0]
    assert scores.iou[2].isnan()
    assert scores.mean == 1


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_classes must be"):
        BoundaryMeter(0)
    with pytest.raises(ValueError, match="width must be"):
        BoundaryMeter(2, width=0)
    with pytest.raises(DataError, match=r"one shape, got \[1, 2, 2\] and \[1, 2, 3\]"):
        BoundaryMeter(2).update(torch.zeros(1, 2, 2), torch.zeros(1, 2, 3))
