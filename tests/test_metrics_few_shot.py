"""The scores of few-shot segmentation: the numbers of its protocols, constant predictions, runs, and refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gingham.errors import DataError
from gingham.metrics import FewShotMeter
from gingham.metrics.few_shot import foreground_background_iou


def episode(hits: int, union: int, background_hits: int) -> tuple[Tensor, Tensor]:
    """A prediction and a label [1, 1, W] with these counts; what is wrong is missed."""
    truth = torch.tensor([1] * union + [0] * background_hits)
    seen = torch.tensor([1] * hits + [0] * (union - hits) + [0] * background_hits)
    return seen[None, None], truth[None, None]


def test_scores_are_those_of_the_specification() -> None:
    meter = FewShotMeter(classes=(11, 12, 13))
    for name, hits, union, background_hits, background_union in (
        (11, 30, 60, 100, 130),
        (11, 10, 50, 80, 120),
        (12, 5, 20, 200, 215),
        (13, 0, 10, 90, 100),
    ):
        assert background_union == background_hits + union - hits
        meter.update(*episode(hits, union, background_hits), torch.tensor([name]))
    scores = meter.compute()
    torch.testing.assert_close(scores.iou, torch.tensor([40 / 110, 0.25, 0.0]))
    assert scores.miou.item() == pytest.approx(0.2045, abs=5e-5)  # the mean IoU of the episodes is 0.2375
    assert scores.fb_iou.item() == pytest.approx((45 / 140 + 470 / 565) / 2)
    assert scores.fb_iou.item() == pytest.approx(0.5766, abs=5e-5)
    assert scores.episodes.tolist() == [2, 1, 1]


def test_a_class_without_episodes_counts_as_zero() -> None:
    meter = FewShotMeter(classes=(3, 7))
    meter.update(*episode(5, 10, 5), torch.tensor([7]))
    assert meter.compute().iou.tolist() == [0.0, 0.5] and meter.compute().miou == 0.25


def test_constant_predictions() -> None:
    torch.manual_seed(0)
    label = (torch.rand(6, 9, 7) < 0.3).long()
    names = torch.tensor([1, 2, 1, 2, 2, 1])
    nothing, everything = FewShotMeter((1, 2)), FewShotMeter((1, 2))
    nothing.update(torch.zeros_like(label), label, names)
    everything.update(torch.ones_like(label), label, names)
    assert nothing.compute().miou == 0
    background = 1 - label.float().mean()
    torch.testing.assert_close(nothing.compute().fb_iou, background / 2)
    areas = torch.stack([label[names == name].float().mean() for name in (1, 2)])
    torch.testing.assert_close(everything.compute().iou, areas)
    for meter in (nothing, everything):
        torch.testing.assert_close(meter.compute().all_foreground, areas.mean())


def test_ignored_pixels_do_not_count_and_an_episode_of_them_is_none() -> None:
    meter = FewShotMeter((1,))
    label = torch.tensor([[[1, 1, 0, 255, 255]], [[255] * 5]])
    meter.update(torch.tensor([[[1, 0, 0, 1, 0]], [[1] * 5]]), label, torch.tensor([1, 1]))
    scores = meter.compute()
    assert scores.iou == 0.5 and scores.episodes == 1
    assert scores.counts.tolist() == [[[1, 2, 1, 2]]]


def test_scores_are_means_over_runs() -> None:
    meter = FewShotMeter((1, 2), runs=2)
    for run, name, hits in ((0, 1, 2), (0, 2, 4), (1, 1, 6), (1, 2, 8)):
        meter.update(*episode(hits, 10, 10), torch.tensor([name]), torch.tensor([run]))
    scores = meter.compute()
    torch.testing.assert_close(scores.iou, torch.tensor([0.4, 0.6]))
    assert scores.miou.item() == pytest.approx(0.5) and scores.miou_spread.item() == pytest.approx(0.2)
    by_run = [foreground_background_iou(scores.counts[run : run + 1]) for run in range(2)]
    assert scores.fb_iou.item() == pytest.approx(float(sum(by_run)) / 2)


def test_folds_are_pooled_by_their_counts() -> None:
    meters = [FewShotMeter((1,)), FewShotMeter((6,))]
    meters[0].update(*episode(40, 110, 200), torch.tensor([1]))
    meters[1].update(*episode(5, 30, 300), torch.tensor([6]))
    counts = torch.cat([meter.compute().counts for meter in meters], dim=1)
    expected = (45 / 140 + 500 / (500 + 95)) / 2
    assert foreground_background_iou(counts).item() == pytest.approx(expected)


def test_batches_do_not_matter() -> None:
    torch.manual_seed(1)
    label, seen = torch.randint(0, 2, (8, 5, 6)), torch.randint(0, 2, (8, 5, 6))
    names = torch.tensor([1, 2, 3, 1, 2, 3, 1, 1])
    together, apart = FewShotMeter((1, 2, 3)), FewShotMeter((1, 2, 3))
    together.update(seen, label, names)
    for index in reversed(range(8)):
        apart.update(seen[index, None].bool(), label[index, None], names[index, None])
    for one, other in zip(together.compute(), apart.compute(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"classes": ()}, "classes must be one or more"),
        ({"classes": (0, 1)}, "classes must be one or more class indices from 1 to 255"),
        ({"classes": (2, 2)}, "classes must be different"),
        ({"classes": (2,), "runs": 0}, "runs must be at least 1"),
    ],
)
def test_meters_that_cannot_be_are_named(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FewShotMeter(**options)


def test_what_cannot_be_counted_is_named() -> None:
    meter = FewShotMeter((1,))
    seen, label = episode(1, 2, 3)
    with pytest.raises(DataError, match=r"prediction and label must be \[B, H, W\]"):
        meter.update(seen[..., 1:], label, torch.tensor([1]))
    with pytest.raises(DataError, match="label contains the value 4, expected 0, 1 or 255"):
        meter.update(seen, 4 * label, torch.tensor([1]))
    with pytest.raises(DataError, match="an episode is of class 2 and run 0, which are not evaluated here"):
        meter.update(seen, label, torch.tensor([2]))
    with pytest.raises(DataError, match="of class 1 and run 1"):
        meter.update(seen, label, torch.tensor([1]), torch.tensor([1]))
