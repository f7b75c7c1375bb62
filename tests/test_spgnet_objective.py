"""SPGNet's loss: a cross-entropy per stage, what it trains, and what it leaves alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gingham.errors import DataError
from gingham.methods.spgnet.network import SPGNet
from gingham.methods.spgnet.objective import check_stage_weights, stage_supervision
from gingham.nn.segmentation_loss import HardPixels, hard_pixel_labels

SMALL = {"backbone": "small", "num_classes": 5, "decoder_channels": 8, "backbone_options": {"widths": [4, 6, 8, 10]}}


def stage_logits(stages: int = 2, classes: int = 5, size: tuple[int, int] = (4, 6)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, classes, *size, generator=generator) for _ in range(stages)]


def some_labels(size: tuple[int, int] = (8, 12)) -> Tensor:
    return torch.randint(0, 5, (2, *size), generator=torch.Generator().manual_seed(1))


def by_hand(logits: Tensor, labels: Tensor, align_corners: bool = True) -> Tensor:
    upsampled = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=align_corners)
    return F.cross_entropy(upsampled, labels, ignore_index=255)


@pytest.mark.parametrize("align_corners", [True, False])
def test_loss_is_the_weighted_sum_over_the_stages(align_corners: bool) -> None:
    stages, labels = stage_logits(3), some_labels()
    labels[0, :3] = 255
    each = [by_hand(logits, labels, align_corners) for logits in stages]
    loss = stage_supervision(stages, labels, align_corners=align_corners)
    torch.testing.assert_close(loss, each[0] + each[1] + each[2])
    loss = stage_supervision(stages, labels, weights=(0.4, 0.0, 2.0), align_corners=align_corners)
    torch.testing.assert_close(loss, 0.4 * each[0] + 2 * each[2])
    assert not torch.allclose(each[0], by_hand(stages[0], labels, not align_corners))


def test_a_stage_without_weight_costs_nothing_whatever_it_predicts() -> None:
    stages, labels = stage_logits(), some_labels()
    stages[0] = torch.full_like(stages[0], torch.inf).requires_grad_()
    loss = stage_supervision(stages, labels, weights=(0.0, 1.0))
    torch.testing.assert_close(loss, by_hand(stages[1], labels))
    (gradient,) = torch.autograd.grad(loss, stages[0])  # for several processes, which wait for every gradient
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_hard_pixels_concern_the_last_stage_only() -> None:
    stages, labels = stage_logits(), some_labels()
    selection = HardPixels(threshold=0.2, min_kept=0, shrink=1)
    upsampled = F.interpolate(stages[1], labels.shape[-2:], mode="bilinear", align_corners=True)
    hard = hard_pixel_labels(upsampled, labels, selection)
    assert 0 < (hard == 255).sum() < hard.numel()
    loss = stage_supervision(stages, labels, hard_pixels=selection)
    torch.testing.assert_close(loss, by_hand(stages[0], labels) + by_hand(stages[1], hard))


def test_soft_labels_take_the_place_of_labels_in_every_stage() -> None:
    stages, labels = stage_logits(), some_labels()
    hot = F.one_hot(labels, 5).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(stage_supervision(stages, labels, soft=hot), stage_supervision(stages, labels))
    soft = torch.rand(2, 5, 8, 12).softmax(1)
    expected = 0.0
    for logits in stages:
        upsampled = F.interpolate(logits, (8, 12), mode="bilinear", align_corners=True)
        expected = expected + F.kl_div(upsampled.log_softmax(1), soft, reduction="none").sum(1).mean()
    torch.testing.assert_close(stage_supervision(stages, labels, soft=soft), expected)


def test_ignored_pixels_give_no_gradient() -> None:
    """At the size of the labels, so that no pixel leaks into its neighbours by upsampling."""
    stages = [logits.requires_grad_() for logits in stage_logits(size=(8, 12))]
    labels = some_labels()
    labels[:, 2:5, :7] = 255
    stage_supervision(stages, labels).backward()
    for logits in stages:
        touched = logits.grad.ne(0).any(dim=1)
        assert torch.equal(touched, labels != 255)


def test_a_batch_without_labels_costs_nothing() -> None:
    torch.manual_seed(0)
    model = SPGNet(**SMALL)
    labels = torch.full((2, 32, 48), 255)
    loss = stage_supervision(model(torch.randn(2, 3, 32, 48)).stages, labels)
    loss.backward()
    assert loss == 0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


# --- what the losses train -------------------------------------------------------------------------------------------


def gradients(weights: tuple[float, float], **options) -> tuple[SPGNet, dict[str, float]]:
    """A network after a backward pass, and the size of the gradient of each of its parts."""
    torch.manual_seed(0)
    model = SPGNet(**SMALL, **options)
    stage_supervision(model(torch.randn(2, 3, 32, 48)).stages, some_labels((32, 48)), weights=weights).backward()
    parts = {
        "first": [model.stem, model.stages[0].encoder, model.stages[0].laterals, model.stages[0].blocks],
        "classifier of first": [model.stages[0].classifier],
        "between": [model.gates, model.transitions],
        "second": [model.stages[1]],
    }
    sizes = {}
    for name, modules in parts.items():
        parameters = [parameter for module in modules for parameter in module.parameters()]
        sizes[name] = sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None)
    return model, sizes


def test_supervision_reaches_the_features_of_its_own_stage() -> None:
    model, sizes = gradients((1.0, 0.0))
    assert sizes["first"] > 0 and sizes["classifier of first"] > 0
    assert sizes["second"] == sizes["between"] == 0
    weights = [parameter for name, parameter in model.stages[0].named_parameters() if "pooling" not in name]
    assert all(parameter.grad.any() for parameter in weights)


def test_unsupervised_prediction_learns_through_the_gate() -> None:
    _, sizes = gradients((0.0, 1.0), aggregation=False)
    assert all(size > 0 for size in sizes.values())
    _, sizes = gradients((0.0, 1.0), aggregation=False, guidance=False)
    assert sizes["classifier of first"] == 0
    assert sizes["first"] > 0


def test_detached_unsupervised_prediction_learns_nothing() -> None:
    _, sizes = gradients((0.0, 1.0), aggregation=False, detach_guidance=True)
    assert sizes["classifier of first"] == 0
    assert sizes["first"] > 0 and sizes["between"] > 0


def test_detached_prediction_learns_from_its_own_loss_alone() -> None:
    alone, _ = gradients((1.0, 0.0), aggregation=False)
    detached, _ = gradients((1.0, 1.0), aggregation=False, detach_guidance=True)
    attached, _ = gradients((1.0, 1.0), aggregation=False)
    own, kept, changed = (model.stages[0].classifier[1].weight.grad for model in (alone, detached, attached))
    torch.testing.assert_close(kept, own)
    assert not torch.allclose(changed, own)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ((1.0,), r"weights must be one for each of 2 stages, got \(1.0,\)"),
        ((1.0, 1.0, 1.0), "weights must be one for each of 2 stages"),
        ((-0.1, 1.0), r"weights must be 0 or more and not all 0, got \(-0.1, 1.0\)"),
        ((0.0, 0.0), "weights must be 0 or more and not all 0"),
        ((float("nan"), 1.0), "weights must be 0 or more and not all 0"),
        ((float("inf"), 1.0), "weights must be 0 or more and not all 0"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_named(weights: tuple[float, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_stage_weights(weights, 2)
    with pytest.raises(ValueError, match=text):
        stage_supervision(stage_logits(), some_labels(), weights=weights)


def test_labels_that_do_not_fit_are_refused() -> None:
    labels = some_labels()
    labels[0, 0, 0] = 5
    with pytest.raises(DataError, match=r"the value 5, which is neither a class \(0 to 4\)"):
        stage_supervision(stage_logits(), labels)
    with pytest.raises(DataError, match="labels must be int64"):
        stage_supervision(stage_logits(), some_labels().int())
    with pytest.raises(DataError, match=r"logits must be \[B, K, h, w\]"):
        stage_supervision(stage_logits(), some_labels()[:1])
