"""Attention as a segmentation: scores over all thresholds at once, and how much of it lies on the background."""

import pytest
import torch

from gingham.errors import DataError
from gingham.metrics import AttentionMeter, SegmentationMeter


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(3, 4, 9, 13, generator=generator)
    attention[:, 2] = 0
    labels = torch.randint(0, 5, (3, 9, 13), generator=generator)
    labels[0, :3] = 255
    return attention, labels


def test_every_threshold_has_the_scores_of_a_segmentation_by_it() -> None:
    attention, labels = example()
    meter = AttentionMeter(4, steps=20)
    meter.update(attention, labels)
    scores = meter.compute()
    strongest, kind = attention.max(1)
    for index in (0, 5, 10, 19):
        threshold = float(scores.thresholds[index])
        single = SegmentationMeter(5, skip_absent=True)
        single.update(torch.where(strongest >= threshold - 1e-6, kind + 1, 0), labels)
        expected = single.compute()
        torch.testing.assert_close(scores.miou[index], expected.miou)
        torch.testing.assert_close(scores.object_iou[index], expected.iou[1:].nanmean())
        found = scores.at(threshold)
        torch.testing.assert_close(found.iou, expected.iou, equal_nan=True)
        taken = single.confusion[:, 1:].sum()
        hits = single.confusion.diagonal()[1:].sum()
        torch.testing.assert_close(scores.precision[index], hits / taken.clamp(min=1))
        torch.testing.assert_close(scores.recall[index], hits / single.confusion[1:].sum())
    assert scores.labelled_pixels == (labels != 255).sum()
    assert scores.miou[scores.best()] == scores.miou.max()


def test_leakage_is_the_share_of_the_attention_on_the_background() -> None:
    attention, labels = example()
    meter = AttentionMeter(4, steps=1000)
    meter.update(attention, labels)
    strongest, counted = attention.amax(1), labels != 255
    expected = strongest[labels == 0].sum() / strongest[counted].sum()
    assert float(meter.compute().leakage) == pytest.approx(float(expected), abs=2e-3)


def test_scores_do_not_depend_on_batches() -> None:
    attention, labels = example()
    whole, parts = AttentionMeter(4), AttentionMeter(4)
    whole.update(attention, labels)
    for index in range(3):
        parts.update(attention[index : index + 1], labels[index : index + 1])
    for one, other in zip(whole.compute(), parts.compute(), strict=True):
        assert torch.equal(one, other)


def test_no_attention_at_all_is_background() -> None:
    meter = AttentionMeter(2, steps=10)
    meter.update(torch.zeros(1, 2, 2, 3), torch.tensor([[[0, 1, 2], [0, 255, 0]]]))
    scores = meter.compute()
    assert scores.leakage == 0 and not scores.object_iou.any() and not scores.recall.any()
    assert scores.at(0.5).iou.tolist() == pytest.approx([0.6, 0.0, 0.0])


def test_a_perfect_map_is_perfect_up_to_its_value() -> None:
    labels = torch.tensor([[[0, 1, 2], [0, 1, 0]]])
    attention = torch.stack([(labels == 1) * 0.3, (labels == 2) * 0.7], dim=1)
    meter = AttentionMeter(2, steps=10)
    meter.update(attention, labels)
    scores = meter.compute()
    assert scores.object_iou.tolist() == pytest.approx([1.0] * 3 + [0.5] * 4 + [0.0] * 3)
    turned = AttentionMeter(2, steps=10)
    turned.update(attention.flip(-1), labels)
    assert turned.compute().object_iou.max() < 0.7


def test_what_does_not_fit_is_named() -> None:
    meter = AttentionMeter(2)
    with pytest.raises(DataError, match=r"attention must be \[B, 2, H, W\].*\[1, 3, 2, 2\]"):
        meter.update(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2))
    with pytest.raises(DataError, match="labels contain the value 3"):
        meter.update(torch.zeros(1, 2, 1, 1), torch.full((1, 1, 1), 3))
    for options in ({"num_classes": 0}, {"num_classes": 2, "steps": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            AttentionMeter(**options)
