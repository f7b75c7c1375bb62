"""A-CE2P and its pyramid pooling: parameter counts, sizes, wiring, options, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gingham.errors import CheckpointError
from gingham.methods.schp.network import ACE2P, EdgeBranch, ParsingBranch
from gingham.methods.schp.objective import parsing_loss
from gingham.nn.backbone import BackboneError
from gingham.nn.pyramid_pooling import PyramidPooling

SMALL: dict[str, Any] = {
    "backbone": "small",
    "num_classes": 5,
    "output_stride": 4,
    "context_channels": 12,
    "parsing_channels": 10,
    "detail_channels": 6,
    "edge_channels": 4,
    "backbone_options": {"widths": [8, 12, 16, 16]},
}


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 64, 48)


def small(**options: Any) -> ACE2P:
    torch.manual_seed(0)
    return ACE2P(**{**SMALL, **options})


def official(**options: Any) -> ACE2P:
    with torch.device("meta"):
        return ACE2P(**options)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---------------------------------------------------------------------------------------------------- the official one


@pytest.mark.parametrize(("classes", "total"), [(20, 66_723_928), (18, 66_722_900), (7, 66_717_246)])
def test_default_network_has_the_parameters_of_the_official_one(classes: int, total: int) -> None:
    model = official(num_classes=classes)
    assert count(model) == total
    assert count(model.backbone) == 42_623_936
    assert count(model.context) == 23_073_792
    assert count(model.edge) == 464_912
    if classes == 20:
        assert count(model.parsing) == 293_492
        assert count(model.fusion) == 267_796
    assert len(list(model.parameters())) == 365
    assert sum(not name.endswith("num_batches_tracked") for name in model.state_dict()) == 603


@pytest.mark.parametrize(("side", "expected"), [(473, 119), (512, 128), (384, 96), (128, 32)])
def test_outputs_of_the_official_network_have_a_quarter_of_the_size(side: int, expected: int) -> None:
    output = official()(torch.empty(2, 3, side, side, device="meta"))
    assert output.logits.shape == output.parsing.shape == (2, 20, expected, expected)
    assert output.edge.shape == (2, 2, expected, expected)


def test_stages_of_the_official_network_have_its_sizes() -> None:
    model = official()
    sizes = {}
    body = model.backbone.body
    watched = {"stem": body["conv1"], "pool": body["maxpool"], "context": model.context}
    watched |= {f"layer{index}": body[f"layer{index}"] for index in (1, 2, 3, 4)}
    for name, module in watched.items():
        module.register_forward_hook(lambda _, __, output, name=name: sizes.update({name: tuple(output.shape[1:])}))
    model(torch.empty(2, 3, 473, 377, device="meta"))
    assert sizes == {
        "stem": (128, 237, 189),
        "pool": (128, 119, 95),
        "layer1": (256, 119, 95),
        "layer2": (512, 60, 48),
        "layer3": (1024, 30, 24),
        "layer4": (2048, 30, 24),
        "context": (512, 30, 24),
    }


def test_every_block_of_the_last_stage_is_dilated() -> None:
    body = official().backbone.body
    spatial = {
        name: [module for module in body[name].modules() if getattr(module, "kernel_size", 0) == (3, 3)]
        for name in ("layer3", "layer4")
    }
    assert [layer.dilation for layer in spatial["layer4"]] == [(2, 2)] * 3
    assert [layer.padding for layer in spatial["layer4"]] == [(2, 2)] * 3
    assert {layer.dilation for layer in spatial["layer3"]} == {(1, 1)}


def test_heads_activate_with_a_leak_and_only_classifiers_have_a_bias() -> None:
    model = official()
    heads = [module for part in (model.context, model.parsing, model.edge, model.fusion) for module in part.modules()]
    slopes = [module.negative_slope for module in heads if isinstance(module, nn.LeakyReLU)]
    assert slopes == [0.01] * (5 + 4 + 3 + 1)
    assert not any(isinstance(module, nn.ReLU) for module in heads)
    with_bias = [module for module in heads if isinstance(module, nn.Conv2d) and module.bias is not None]
    assert with_bias == [model.parsing.classifier, model.edge.detect, model.edge.combine, model.fusion[-1]]
    dropouts = [(module, module.p) for module in heads if isinstance(module, nn.Dropout2d)]
    assert dropouts == [(model.fusion[3], 0.1)]


# ---------------------------------------------------------------------------------------------------- wiring


def test_parsing_branch_brings_the_context_to_the_details_and_puts_it_first() -> None:
    torch.manual_seed(0)
    branch = ParsingBranch(12, 8, 5, channels=10, detail_channels=6).eval()
    context, details = torch.randn(2, 12, 5, 7), torch.randn(2, 8, 17, 25)
    logits, features = branch(context, details)
    resized = F.interpolate(branch.context(context), size=(17, 25), mode="bilinear", align_corners=True)
    expected = branch.fuse(torch.cat([resized, branch.details(details)], dim=1))
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(logits, branch.classifier(expected))


def test_edges_are_detected_by_one_convolution_before_any_resizing() -> None:
    torch.manual_seed(0)
    branch = EdgeBranch([8, 12, 16], channels=4).eval()
    stages = [torch.randn(2, 8, 17, 25), torch.randn(2, 12, 9, 13), torch.randn(2, 16, 5, 7)]
    logits, features = branch(stages)

    def resized(x: Tensor) -> Tensor:
        return F.interpolate(x, size=(17, 25), mode="bilinear", align_corners=True)

    own = [reduce(stage) for reduce, stage in zip(branch.reduce, stages, strict=True)]
    maps = torch.cat([resized(branch.detect(feature)) for feature in own], dim=1)
    torch.testing.assert_close(logits, branch.combine(maps))
    torch.testing.assert_close(features, torch.cat([resized(feature) for feature in own], dim=1))


def test_prediction_fuses_the_parsing_feature_and_the_edges(images: Tensor) -> None:
    model = small().eval()
    details, third, fourth, last = model.backbone(images)
    parsing, parsing_features = model.parsing(model.context(last), details)
    edge, edge_features = model.edge([details, third, fourth])
    output = model(images)
    torch.testing.assert_close(output.parsing, parsing)
    torch.testing.assert_close(output.edge, edge)
    torch.testing.assert_close(output.logits, model.fusion(torch.cat([parsing_features, edge_features], dim=1)))


def test_outputs_are_at_the_resolution_of_the_first_stage(images: Tensor) -> None:
    output = small()(images)
    assert output.logits.shape == output.parsing.shape == (2, 5, 32, 24)
    assert output.edge.shape == (2, 2, 32, 24)
    assert small(output_stride=8).eval()(torch.randn(1, 3, 33, 47)).logits.shape == (1, 5, 17, 24)


def test_every_weight_gets_a_gradient(images: Tensor) -> None:
    model = small(dropout=0.0)
    labels = torch.randint(0, 5, (2, 64, 48))
    parsing_loss(model(images), labels).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_dropout_acts_in_training_only(images: Tensor) -> None:
    model = small(dropout=0.5)
    first, second = model(images), model(images)
    assert not torch.equal(first.logits, second.logits)
    assert torch.equal(first.parsing, second.parsing)
    model.eval()
    assert torch.equal(model(images).logits, model(images).logits)


def test_image_does_not_depend_on_its_batch(images: Tensor) -> None:
    model = small().eval()
    alone = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(model(images).logits, alone, rtol=1e-5, atol=1e-5)


def test_network_exports_with_any_batch_and_size(images: Tensor) -> None:
    model = small().eval()
    batch, height, width = (torch.export.Dim(name, min=least) for name, least in (("b", 1), ("h", 16), ("w", 16)))
    shapes = ({0: batch, 2: height, 3: width},)
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    other = torch.randn(1, 3, 50, 81)
    torch.testing.assert_close(program.module()(other).logits, model(other).logits)


def test_a_training_batch_of_one_image_is_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match="features must have two images or more in training, got a batch of one"):
        model(torch.randn(1, 3, 64, 48))
    assert model.eval()(torch.randn(1, 3, 64, 48)).logits.shape == (1, 5, 32, 24)


def test_options_outside_their_range_are_named() -> None:
    for name in ("num_classes", "context_channels", "parsing_channels", "detail_channels", "edge_channels"):
        with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0"):
            small(**{name: 0})
    with pytest.raises(ValueError, match="backbone must have four stages or more, small has 3"):
        small(backbone_options={"widths": [8, 12, 16]})
    with pytest.raises(BackboneError, match="unknown backbone 'resnet1O1'"):
        small(backbone="resnet1O1")


# ---------------------------------------------------------------------------------------------------- saving


def test_save_and_load_give_the_same_model(tmp_path: Path, images: Tensor) -> None:
    model = small(bins=(1, 2)).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["detail_channels"] == 6
    loaded = ACE2P.from_pretrained(tmp_path)
    assert not loaded.training and len(loaded.context.stages) == 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded(images), model(images), strict=True))
    with pytest.raises(CheckpointError, match=r"fusion.4.weight is \[5, 10, 1, 1\] in the file and \[7, 10"):
        ACE2P.from_pretrained(tmp_path, num_classes=7)


def test_saved_model_does_not_ask_for_its_backbone_weights(tmp_path: Path, images: Tensor) -> None:
    weights = tmp_path / "backbone.pth"
    torch.save(small().backbone.body.state_dict(), weights)
    model = small(backbone_weights=str(weights)).eval()
    model.save_pretrained(tmp_path / "model")
    weights.unlink()
    assert torch.equal(ACE2P.from_pretrained(tmp_path / "model")(images).logits, model(images).logits)


# ---------------------------------------------------------------------------------------------------- pyramid pooling


def by_hand(module: PyramidPooling, x: Tensor, order: list[int]) -> Tensor:
    """The pyramid with its parts in the given order; the last of them is the input."""
    parts = []
    for stage, size in zip(module.stages, module.bins, strict=True):
        rows = [x[:, :, start:end].mean(2, keepdim=True) for start, end in cells(x.shape[2], size)]
        grid = [torch.cat([row[..., s:e].mean(3, keepdim=True) for row in rows], 2) for s, e in cells(x.shape[3], size)]
        y = stage[3](stage[2](stage[1](torch.cat(grid, 3))))
        parts.append(F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=module.align_corners))
    parts.append(x)
    result: Tensor = module.bottleneck(torch.cat([parts[index] for index in order], dim=1))
    return result


def cells(extent: int, size: int) -> list[tuple[int, int]]:
    return [(index * extent // size, -(-(index + 1) * extent // size)) for index in range(size)]


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("input_first", [True, False])
def test_pyramid_averages_over_grids_and_keeps_their_order(align_corners: bool, input_first: bool) -> None:
    torch.manual_seed(0)
    module = PyramidPooling(6, 5, branch_channels=4, align_corners=align_corners, input_first=input_first).eval()
    x = torch.randn(2, 6, 9, 13)
    order = [4, 0, 1, 2, 3] if input_first else [0, 1, 2, 3, 4]
    torch.testing.assert_close(module(x), by_hand(module, x, order))
    assert module(x).shape == (2, 5, 9, 13)


@pytest.mark.parametrize(("activation", "kind"), [("leaky_relu", nn.LeakyReLU), ("relu", nn.ReLU)])
def test_activation_of_the_pyramid_is_an_option(activation: Any, kind: type) -> None:
    module = PyramidPooling(6, 5, bins=(1, 3), activation=activation)
    activations = [layer for layer in module.modules() if isinstance(layer, (nn.ReLU, nn.LeakyReLU))]
    assert [type(layer) for layer in activations] == [kind] * 3


def test_pyramid_takes_one_image_where_its_statistics_allow() -> None:
    x = torch.randn(1, 6, 9, 13)
    assert PyramidPooling(6, 5, bins=(2, 3))(x).shape == (1, 5, 9, 13)
    frozen = PyramidPooling(6, 5)
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert frozen(x).shape == (1, 5, 9, 13)
    with pytest.raises(ValueError, match=r"^features must have two images or more in training"):
        PyramidPooling(6, 5)(x)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"out_channels": 0}, "out_channels must be at least 1, got 0"),
        ({"branch_channels": 0}, "branch_channels must be at least 1, got 0"),
        ({"bins": ()}, r"bins must be one or more numbers of at least 1, got \(\)"),
        ({"bins": (2, 0)}, r"bins must be one or more numbers of at least 1, got \(2, 0\)"),
        ({"activation": "gelu"}, "activation must be 'relu' or 'leaky_relu', got 'gelu'"),
    ],
    ids=str,
)
def test_pyramid_options_outside_their_range_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        PyramidPooling(**{"in_channels": 6, "out_channels": 5} | options)
