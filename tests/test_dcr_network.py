"""DCR's network: shapes, decoupling, detection in parts, and detectors of torchvision or anyone's."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.ops import roi_pool

import gingham
from gingham.errors import CheckpointError, DataError
from gingham.methods.dcr import detector as base_detectors
from gingham.methods.dcr.detector import BaseOutput, DetectorError, FasterRCNNBase, MultiScaleRoIPool
from gingham.methods.dcr.network import DCR, RefinedDetector, RefinementBranch
from gingham.methods.dcr.objective import SamplingRule

pytestmark = pytest.mark.usefixtures("one_thread")

BASE: dict[str, Any] = {
    "min_size": 64,
    "max_size": 96,
    "rpn_post_nms_top_n_train": 40,
    "rpn_post_nms_top_n_test": 30,
    "box_batch_size_per_image": 24,
    "widths": (8, 12, 16),
    "channels": 16,
    "head_channels": 32,
}


def network(seed: int = 0, **options: Any) -> DCR:
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "num_classes": 3,
        "pool_size": 8,
        "frozen_norm": False,
        "freeze_stem": False,
        "base_options": BASE,
    }
    return DCR("small", **defaults | options)


def batch(count: int = 2, seed: int = 0) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, 64, 64 + 16 * i, generator=generator) for i in range(count)]
    boxes = torch.tensor([[4.0, 8, 24, 30], [30, 20, 50, 44]])
    return images, [{"boxes": boxes + i, "labels": torch.tensor([1, 3])} for i in range(count)]


def untrained(seed: int = 0, **options: Any) -> DCR:
    """In evaluation mode, with scores of every size."""
    model = network(seed, **options).eval()
    model.detector.model.roi_heads.box_predictor.cls_score.weight.data.normal_(std=0.5)
    if model.branch is not None:
        model.branch.classifier.weight.data.normal_(std=2)
    return model


# ------------------------------------------------------------------------------------------------ the branch


def test_the_branch_has_the_shapes_and_parameters_of_the_specification() -> None:
    with torch.device("meta"):
        model = DCR("resnet101", num_classes=80, frozen_norm=False, base_options={"min_size": 600})
    branch, detector = model.branch, model.detector
    assert branch is not None
    assert (detector.stride, detector.channels, branch.pool.output_size) == (4, 256, (56, 56))
    features = torch.zeros(2, 256, 56, 56, device="meta")
    shapes = []
    for stage in branch.stages.eval():
        features = stage(features)
        shapes.append(list(features.shape[1:]))
    assert shapes == [[512, 28, 28], [1024, 14, 14], [2048, 7, 7]]
    assert branch.classifier.out_features == 81
    assert sum(p.numel() for p in branch.parameters()) == 42_440_785
    assert sum(p.numel() for p in branch.classifier.parameters()) == 165_969


def test_with_frozen_norms_the_rest_of_the_branch_trains_and_the_first_stage_does_not() -> None:
    with torch.device("meta"):
        model = DCR("resnet101", num_classes=80)
    assert model.branch is not None
    assert sum(p.numel() for p in model.branch.parameters() if p.requires_grad) == 42_338_385
    frozen = {name.split(".")[3] for name, p in model.detector.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}


def test_boxes_are_pooled_by_their_last_pixels() -> None:
    branch = RefinementBranch(nn.Identity(), 2, stride=2, channels=3, pool_size=4)
    features = torch.randn(2, 3, 20, 30)
    boxes = [torch.tensor([[2.0, 4, 18, 20]]), torch.tensor([[0.0, 0, 8, 8], [10, 6, 60, 40]])]
    inclusive = torch.tensor([[0.0, 2, 4, 17, 19], [1, 0, 0, 7, 7], [1, 10, 6, 59, 39]])
    pooled = roi_pool(features, inclusive, 4, 0.5)
    torch.testing.assert_close(branch(features, boxes), branch.classifier(pooled.mean(dim=(2, 3))))


def test_detecting_in_parts_gives_the_same_scores() -> None:
    torch.manual_seed(0)
    branch = RefinementBranch(nn.Conv2d(3, 4, 3), 2, stride=2, channels=3, pool_size=4).eval()
    features, boxes = torch.randn(1, 3, 20, 30), 30 * torch.rand(23, 2)
    boxes = [torch.cat([boxes, boxes + 10], dim=1)]
    expected = branch(features, boxes).softmax(1)
    assert expected.std(dim=0).min() > 0
    one_box = 3 * 4 * 4 * 4
    for count in (1, 7, 300):
        torch.testing.assert_close(branch.probabilities(features, boxes, max_bytes=count * one_box), expected)
    assert branch.probabilities(features, [torch.zeros(0, 4)], max_bytes=one_box).shape == (0, 3)
    with pytest.raises(ValueError, match="max_bytes must be at least 192"):
        branch.probabilities(features, boxes, max_bytes=one_box - 1)


def test_the_branch_runs_in_bfloat16() -> None:
    model = untrained()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        output = model.detector(batch()[0])
        assert output.features.dtype == torch.bfloat16
        assert all(torch.isfinite(x).all() for x in model.fused_scores(output))


@pytest.mark.parametrize("training", [False, True])
def test_boxes_are_computed_in_float32_under_autocast(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = untrained(base_options={**BASE, "min_size": 640, "max_size": 960}).train(training)
    detector: Any = model.detector.model
    heard: dict[str, Any] = {}
    detector.rpn.register_forward_pre_hook(lambda _, inputs: heard.update(rpn=inputs))
    detector.rpn.head.register_forward_hook(lambda _, __, outputs: heard.update(head=outputs))
    detector.rpn.anchor_generator.register_forward_hook(lambda _, __, anchors: heard.update(anchors=anchors[0]))
    detector.roi_heads.box_roi_pool.register_forward_pre_hook(lambda _, inputs: heard.update(pooled=inputs[1][0]))
    images, targets = batch(1)
    targets[0]["boxes"] += 0.3
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        output = model.detector(images, targets if training else None)
    given, features, _ = heard["rpn"]
    proposals, anchors, outputs = heard["pooled"], heard["anchors"], heard["head"]
    assert features["0"].dtype == torch.bfloat16
    assert output.boxes[0].dtype == proposals.dtype == torch.float32
    monkeypatch.setattr(detector.rpn.head, "forward", lambda _: outputs)
    with torch.no_grad():
        ((expected,), _) = detector.rpn(given, {name: x.float() for name, x in features.items()}, targets)
    assert torch.equal(heard["anchors"], anchors)
    assert anchors.max() > 600
    if training:  # a choice of the proposals and the objects
        expected = torch.cat([expected, output.objects[0]])
        assert (proposals[:, None] == output.objects[0]).all(dim=2).any()
        assert ((proposals[:, None] - expected).abs().amax(dim=2).amin(dim=1) < 1e-2).all()
    else:
        torch.testing.assert_close(proposals, expected, rtol=0, atol=1e-2)


def test_its_stages_begin_as_the_detectors_and_are_its_own() -> None:
    model = network()
    assert model.branch is not None
    theirs, own = (
        dict(model.detector.model.backbone.body.named_parameters()),
        dict(model.branch.stages.named_parameters()),
    )
    assert own
    for name, value in own.items():
        assert torch.equal(value, theirs[name])
        value.data += 1
        assert not torch.equal(value, theirs[name])


# ------------------------------------------------------------------------------------------------ decoupling


def test_no_gradient_of_the_branch_reaches_the_detector() -> None:
    model = network().train()
    images, targets = batch()
    loss = model.losses(images, targets)["loss_refinement"]
    assert loss > 0
    loss.backward()
    assert model.branch is not None
    assert all(p.grad is None for p in model.detector.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.branch.parameters())


def test_coupled_the_branch_trains_the_stage_before_it_and_nothing_else() -> None:
    model = network(decoupled=False).train()
    model.losses(*batch())["loss_refinement"].backward()
    touched = {name for name, p in model.detector.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched
    assert all(name.startswith("model.backbone.body.0.") for name in touched)


def trained(model: DCR, steps: int = 3) -> list[list[float]]:
    """The detector's losses in some steps of training."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    torch.manual_seed(5)
    history = []
    for step in range(steps):
        losses = model.losses(*batch(seed=step))
        history.append([value.item() for name, value in losses.items() if name != "loss_refinement"])
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    return history


def test_the_detector_trains_to_the_same_weights_with_and_without_a_branch() -> None:
    with_branch, without = network(), network(refine=False)
    assert trained(with_branch) == trained(without)
    for value, other in zip(with_branch.detector.parameters(), without.detector.parameters(), strict=True):
        assert torch.equal(value, other)


def test_frozen_norms_do_not_change_in_training() -> None:
    model = network(frozen_norm=True)
    norms = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if any(part in name for part in ("running_", "body.0.1", "body.1.1", "stages.1.1"))
    }
    assert len(norms) > 10
    before = copy.deepcopy(model.state_dict())
    trained(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in norms.items())
    assert not torch.equal(after["branch.stages.1.0.weight"], before["branch.stages.1.0.weight"])


@pytest.mark.parametrize(("base", "stem"), [("small", ("0",)), ("resnet18", ("conv1", "bn1", "layer1"))])
def test_a_frozen_stem_stays_as_it_is_where_other_norms_train(base: str, stem: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    options = BASE if base == "small" else {"min_size": 64, "max_size": 96}
    model = DCR(base, num_classes=3, pool_size=8, frozen_norm=False, freeze_stem=True, base_options=options)
    before = copy.deepcopy(model.detector.model.backbone.body.state_dict())
    assert any("running_mean" in name and name.startswith(stem) for name in before)
    trained(model, 1)
    after = model.detector.model.backbone.body.state_dict()
    assert list(after) == list(before)
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert any("running_mean" in name for name in changed)
    assert not any(name.startswith(stem) for name in changed)


# ------------------------------------------------------------------------------------------------ detection


def test_boxes_stay_and_scores_do_not_rise() -> None:
    model = untrained()
    with torch.no_grad():
        output = model.detector(batch()[0])
        fused = model.fused_scores(output)
    for boxes, scores, product in zip(output.boxes, output.scores, fused, strict=True):
        assert boxes.shape == (len(scores), 4)
        assert (product <= scores).all()
        assert (product < scores).any()
        torch.testing.assert_close(scores.sum(1), torch.ones(len(scores)))


def test_top_is_the_share_of_boxes_that_is_refined() -> None:
    model = untrained()
    with torch.no_grad():
        output = model.detector(batch()[0])
        full = model.fused_scores(output)
        changed = {}
        for top in (0.0, 0.5, 1.0):
            model.top = top
            found = model.fused_scores(output)
            changed[top] = [int((a != b).any(1).sum()) for a, b in zip(found, output.scores, strict=True)]
            for scores, product, base in zip(found, full, output.scores, strict=True):
                refined = (scores != base).any(1)
                torch.testing.assert_close(scores[refined], product[refined])
    counts = [len(scores) for scores in output.scores]
    assert changed == {0.0: [0, 0], 0.5: [n // 2 for n in counts], 1.0: counts}


@pytest.mark.parametrize("top", [0.5, 1.0])
def test_the_order_of_boxes_does_not_matter_to_their_refinement(top: float) -> None:
    model = untrained(top=top)
    with torch.no_grad():
        output = model.detector(batch()[0])
        orders = [torch.randperm(len(boxes)) for boxes in output.boxes]
        mixed = output._replace(
            boxes=[boxes[order] for boxes, order in zip(output.boxes, orders, strict=True)],
            scores=[scores[order] for scores, order in zip(output.scores, orders, strict=True)],
        )
        pairs = zip(model.fused_scores(mixed), model.fused_scores(output), orders, strict=True)
        for found, expected, order in pairs:
            assert not torch.equal(expected, expected[order])
            torch.testing.assert_close(found, expected[order])


@pytest.mark.parametrize("refine", [True, False])
def test_an_image_without_proposals_has_no_detections(refine: bool) -> None:
    model = untrained(refine=refine, base_options={**BASE, "rpn_score_thresh": 1.0})
    with torch.no_grad():
        for found in model(batch()[0]):
            assert [list(x.shape) for x in found] == [[0, 4], [0], [0]]


def test_a_picture_that_no_row_is_left_of_is_refused_and_the_narrowest_is_not() -> None:
    model = untrained()  # with max_size 96
    with torch.no_grad():
        with pytest.raises(DataError, match=r"a picture of 600x6 pixels .* has no row left when .* is 96"):
            model([torch.rand(3, 6, 600)])
        with pytest.raises(DataError, match=r"a picture of 6x600 pixels .* has no column left"):
            model([torch.rand(3, 600, 6)])
        assert model([torch.rand(3, 7, 600)])[0].boxes.shape[1] == 4


def test_without_refinement_the_detections_are_the_detectors_own() -> None:
    images, _ = batch()
    alone = untrained(refine=False)
    for options in ({"top": 0.0}, {"fusion": "base"}):
        model = untrained(**options)
        with torch.no_grad():
            for one, other in zip(model(images), alone(images), strict=True):
                assert len(one.scores) > 3
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_refined_scores_alone_are_the_branchs() -> None:
    model = untrained(fusion="refined")
    with torch.no_grad():
        output = model.detector(batch()[0])
        refined = torch.cat(model.fused_scores(output))
        assert model.branch is not None
        torch.testing.assert_close(refined, model.branch(output.features, output.boxes).softmax(1))


def test_a_detection_does_not_depend_on_the_batch_and_is_in_pixels_of_its_image() -> None:
    model = untrained(base_options={**BASE, "min_size": 128, "max_size": 256})
    images, _ = batch()
    with torch.no_grad():
        together = model(images)
        for image, found in zip(images, together, strict=True):
            height, width = image.shape[-2:]
            assert (found.boxes[:, [0, 2]] <= width + 1e-3).all()
            assert (found.boxes[:, [1, 3]] <= height + 1e-3).all()
            assert found.boxes.max() > 0.8 * max(height, width)
        (last,) = model([images[-1]])  # the smaller image is padded in a batch, which convolutions see at its border
    torch.testing.assert_close(together[-1].scores, last.scores)
    torch.testing.assert_close(together[-1].boxes, last.boxes)


def test_an_empty_image_can_be_learned_from() -> None:
    model = network().train()
    images, targets = batch()
    targets[0] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = model.losses(images, targets)
    assert all(torch.isfinite(value) for value in losses.values())
    assert set(losses) == {
        "loss_objectness",
        "loss_rpn_box_reg",
        "loss_classifier",
        "loss_box_reg",
        "loss_refinement",
    }


# ------------------------------------------------------------------------------------------------ anyone's detector


class OneStage(nn.Module):
    """A detector of someone else's: four cells of an image, a box and scores for each."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.head = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> BaseOutput:
        features = self.early(torch.stack(images))
        logits = nn.functional.adaptive_avg_pool2d(self.head(features), 2).flatten(2).mT
        height, width = images[0].shape[-2:]
        corners = torch.tensor([[0.0, 0], [width / 2, 0], [0, height / 2], [width / 2, height / 2]])
        boxes = torch.cat([corners, corners + torch.tensor([width / 2, height / 2])], dim=1)
        return BaseOutput(
            boxes=[boxes] * len(images),
            scores=list(logits.softmax(2)),
            features=features,
            sizes=[(height, width)] * len(images),
            objects=[target["boxes"] for target in targets or []],
            losses={"loss_cells": logits.square().mean()} if self.training else {},
        )


def test_any_detector_that_gives_boxes_scores_and_features_can_be_refined() -> None:
    torch.manual_seed(0)
    branch = RefinementBranch(nn.Conv2d(4, 8, 3), 2, stride=2, channels=4, pool_size=5)
    model = RefinedDetector(OneStage(), branch)
    images = list(torch.rand(2, 3, 20, 28))
    targets = [{"boxes": torch.tensor([[1.0, 1, 12, 9]]), "labels": torch.tensor([2])}] * 2
    assert set(model.losses(images, targets)) == {"loss_cells", "loss_refinement"}
    found = model.eval()(images)
    assert len(found) == 2
    assert found[0].boxes.max() == 28


def drawn_boxes(steps: int, state: Tensor | None = None) -> tuple[list[list[float]], Tensor]:
    """What the branch of a detector without random numbers learns from, and the state afterwards."""
    torch.manual_seed(0)
    branch = RefinementBranch(nn.Conv2d(4, 8, 3), 2, stride=2, channels=4, pool_size=5)
    model = RefinedDetector(OneStage(), branch, sampling=SamplingRule(2, "random"))
    model.sampling_state = state
    drawn: list[list[float]] = []
    branch.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[1][0][1].tolist()))
    targets = [{"boxes": torch.tensor([[1.0, 1, 12, 9]]), "labels": torch.tensor([2])}]
    before = torch.get_rng_state()
    for _ in range(steps):
        model.losses([torch.ones(3, 20, 28)], targets)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.sampling_state is not None
    return drawn, model.sampling_state


def test_steps_draw_other_boxes_though_the_detector_draws_none() -> None:
    drawn, _ = drawn_boxes(12)
    assert len({tuple(box) for box in drawn}) == 4
    first, state = drawn_boxes(5)
    assert first + drawn_boxes(7, state)[0] == drawn


@pytest.mark.parametrize("own", [True, False], ids=["small", "anyone's"])
@pytest.mark.parametrize(
    ("boxes", "labels", "reason"),
    [
        ([[1.0, 1, 1, 9]], [1], r"boxes of targets must be finite, with x2 above x1 .*, got \[1.0, 1.0, 1.0, 9.0\]"),
        ([[1.0, 9, 5, 2]], [1], "boxes of targets must be finite"),
        ([[1.0, 1, float("nan"), 9]], [1], "boxes of targets must be finite"),
        ([[1.0, 1, 5, 9]], [9], "labels of targets must be 1 to 3, got 9"),
        ([[1.0, 1, 5, 9]], [0], "labels of targets must be 1 to 3, got 0"),
        ([[1.0, 1, 5, 9]], [1, 2], r"boxes \[g, 4\] and labels \[g\], got \[1, 4\] and \[2\]"),
    ],
)
def test_targets_that_nothing_can_be_learned_from_are_named(
    own: bool, boxes: list[Any], labels: list[int], reason: str
) -> None:
    if own:
        model: RefinedDetector = network(refine=False)
    else:
        model = RefinedDetector(OneStage(), RefinementBranch(nn.Conv2d(4, 8, 3), 3, stride=2, channels=4, pool_size=5))
    with pytest.raises(ValueError, match=reason):
        model.train().losses([torch.rand(3, 64, 64)], [{"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}])


# ------------------------------------------------------------------------------------------------ building


def test_level_pooling_takes_each_box_from_the_level_of_its_size() -> None:
    pool = MultiScaleRoIPool((4, 8), output_size=2, canonical_size=64)
    features = {str(i): torch.randn(2, 3, 32 // 2**i, 64 // 2**i) for i in range(2)} | {
        "pool": torch.randn(2, 3, 8, 16)
    }
    boxes = [torch.tensor([[0.0, 0, 20, 30], [0, 0, 200, 100]]), torch.tensor([[4.0, 8, 240, 120]])]
    result = pool(features, boxes, [(128, 256), (128, 200)])
    inclusive = torch.tensor([[0.0, 0, 0, 19, 29], [0, 0, 0, 199, 99], [1, 4, 8, 239, 119]])
    assert torch.equal(result[:1], roi_pool(features["0"], inclusive[:1], 2, 1 / 4))
    assert torch.equal(result[1:], roi_pool(features["1"], inclusive[1:], 2, 1 / 8))


@pytest.mark.parametrize("name", ["resnet18", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_detectors_of_torchvision_are_refined(name: str) -> None:
    options = {} if name == "resnet18" else {"fork": "3"}
    torch.manual_seed(0)
    model = DCR(name, num_classes=3, pool_size=14, base_options={"min_size": 64, "max_size": 96}, **options).train()  # type: ignore[arg-type]
    assert model.detector.stride == 4
    losses = model.losses(*batch(1))
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(value) for value in losses.values())
    with torch.no_grad():
        (found,) = model.eval()(batch(1)[0])
    assert len(found.scores) > 0


def test_a_class_dependent_detector_gives_the_box_of_its_likeliest_object() -> None:
    torch.manual_seed(0)
    model = DCR(
        "fasterrcnn_mobilenet_v3_large_320_fpn", 3, refine=False, fork="3", base_options={"min_size": 64}
    ).eval()
    base: FasterRCNNBase = model.detector
    heads: Any = base.model.roi_heads
    heads.box_predictor.bbox_pred.weight.data.zero_()
    heads.box_predictor.bbox_pred.bias.data = torch.arange(4).repeat_interleave(4).float()  # of each class its number
    with torch.no_grad():
        output = base(batch(1)[0])
        heads.box_predictor.cls_score.bias.data[2] += 100
        shifted = base(batch(1)[0])
    assert output.boxes[0].shape == shifted.boxes[0].shape
    assert (shifted.scores[0].argmax(1) == 2).all()
    assert not torch.equal(output.boxes[0], shifted.boxes[0])


def test_weights_of_the_backbone_go_to_detector_and_branch(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = resnet18(weights=None)
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    model = DCR("resnet18", 3, backbone_weights=str(tmp_path / "resnet18.pth"))
    assert model.branch is not None
    for stages in (model.detector.model.backbone.body, model.branch.stages):
        assert torch.equal(stages.layer3[0].conv1.weight, source.layer3[0].conv1.weight)
        assert torch.equal(stages.layer3[0].bn1.running_var, source.layer3[0].bn1.running_var)


def test_weights_of_a_detector_with_other_classes_leave_its_last_layer(tmp_path: Path) -> None:
    name, options = "fasterrcnn_mobilenet_v3_large_320_fpn", {"fork": "3", "refine": False}
    torch.manual_seed(1)
    source = DCR(name, 90, **options).detector.model  # type: ignore[arg-type]
    torch.save(source.state_dict(), tmp_path / "detector.pth")
    model = DCR(name, 3, backbone_weights=str(tmp_path / "detector.pth"), **options).detector.model  # type: ignore[arg-type]
    assert torch.equal(model.rpn.head.cls_logits.weight, source.rpn.head.cls_logits.weight)
    assert torch.equal(model.roi_heads.box_head.fc6.weight, source.roi_heads.box_head.fc6.weight)
    assert model.roi_heads.box_predictor.cls_score.out_features == 4


def with_old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torchvision called layers before it put them into blocks."""
    for block in ("inner_blocks", "layer_blocks"):
        state = {
            f"{name[: -len('.0.' + end)]}.{end}" if f".{block}." in name else name: value
            for name, value in state.items()
            for end in [name.rpartition(".")[2]]
        }
    return {name.replace("rpn.head.conv.0.0.", "rpn.head.conv."): value for name, value in state.items()}


def test_weights_of_a_detector_may_have_the_old_names(tmp_path: Path) -> None:
    name, options = "fasterrcnn_mobilenet_v3_large_320_fpn", {"fork": "3", "refine": False}
    torch.manual_seed(1)
    source = DCR(name, 3, frozen_norm=False, **options).detector.model  # type: ignore[arg-type]
    old = with_old_names(source.state_dict())
    assert {"backbone.fpn.inner_blocks.0.weight", "backbone.fpn.layer_blocks.1.bias", "rpn.head.conv.bias"} <= set(old)
    source.load_state_dict(old)  # torchvision takes them
    torch.save(old, tmp_path / "detector.pth")
    model = DCR(name, 3, backbone_weights=str(tmp_path / "detector.pth"), frozen_norm=False, **options).detector.model  # type: ignore[arg-type]
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_file_of_torchvisions_without_epsilon_is_corrected_and_anyone_elses_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        shapes = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4).state_dict()
    file = tmp_path / "detector.pth"
    torch.save({name: torch.tensor(0.5).expand(value.shape) for name, value in shapes.items()}, file)
    for beginning, variance in (("258fb6c6", 0.5), (hashlib.sha256(file.read_bytes()).hexdigest()[:8], 0.5 - 1e-5)):
        monkeypatch.setattr(base_detectors, "_WITHOUT_EPSILON", beginning)
        state = DCR("fasterrcnn_resnet50_fpn", 3, refine=False, backbone_weights=str(file)).detector.model.state_dict()
        assert state["backbone.body.layer1.0.bn1.running_var"][0].item() == pytest.approx(variance, abs=1e-7)
        assert state["backbone.body.layer1.0.bn1.running_mean"][0] == 0.5
    url = base_detectors.models.get_model_weights("fasterrcnn_resnet50_fpn")["DEFAULT"].url
    assert "258fb6c6" in url


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"base": "resnot"}, "unknown base 'resnot'; valid are small, fasterrcnn_"),
        ({"fork": "9"}, "fork must be one of 0, 1, got '9'"),
        ({"base_options": {"moon": 1}}, "base 'small' has no option 'moon'; valid are anchor_sizes, "),
        ({"base_options": {"box_score_thresh": 0.5}}, "box_score_thresh does nothing .*: give threshold, an option"),
        ({"base_options": {"box_nms_thresh": 0.5}}, "box_nms_thresh does nothing in base_options: give overlap"),
        ({"base_options": {"box_detections_per_img": 9}}, "box_detections_per_img does nothing .*: give most"),
        ({"base_options": {"anchor_sizes": (8, 16)}}, "three anchor_sizes"),
        ({"base_options": {"output_stride": 4}}, "needs stages of stride 4 and 8"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"box_pool": "mean"}, "box_pool must be 'max' or 'align'"),
        ({"top": 1.5}, "top must be 0 to 1"),
        ({"fusion": "sum"}, "fusion must be"),
        ({"overlap": -0.1}, "overlap must be 0 to 1"),
        ({"most": 0}, "most must be 1 or more"),
        ({"sampling": {"boxes": 0}}, "boxes must be 1 or more"),
        ({"sampling": {"box": 8}}, "sampling has no option 'box': there are boxes, heuristic, confidence"),
        ({"fusion": "refined", "top": 0.5}, "top must be 1 with fusion 'refined'"),
        ({"fusion": "refined", "top": 0.0}, "top must be 1 with fusion 'refined'"),
        (
            {"max_mib": 1, "pool_size": 200},
            "max_mib must be at least 5, got 1: one box of 32 channels .* pool_size 200",
        ),
        ({"pool_size": 0}, "output_size must be a positive"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], reason: str) -> None:
    given = {"base": "small", "num_classes": 3, **options}
    with pytest.raises(ValueError, match=reason):
        DCR(**given)
    if options.keys() & {"base", "fork", "base_options"}:
        with pytest.raises(DetectorError):
            DCR(**given)


@pytest.mark.parametrize(
    ("base", "weights", "reason"),
    [
        ("small", "DEFAULT", "base small has no pretrained weights"),
        ("resnet18", "MOON", "torchvision's are IMAGENET1K_V1"),
    ],
)
def test_weights_that_do_not_exist_are_named(base: str, weights: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        DCR(base, 3, backbone_weights=weights)


def test_a_model_is_saved_with_its_options(tmp_path: Path) -> None:
    model = untrained()
    model.save_pretrained(tmp_path)
    again = DCR.from_pretrained(tmp_path)
    images, _ = batch()
    with torch.no_grad():
        for one, other in zip(model(images), again(images), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    created = gingham.create_model("dcr", base="small", num_classes=3, refine=False)
    assert created.branch is None
