"""PDML's network: shapes and parameter counts, what the features are, options, saving and loading."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gingham.errors import CheckpointError
from gingham.methods.pdml.network import PDML, DilatedClassifier

SMALL: dict[str, Any] = {"backbone": "small", "num_classes": 5, "output_stride": 4, "head_channels": 16}
SMALL |= {"auxiliary_channels": 8, "backbone_options": {"widths": [8, 16, 24]}}


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 48)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small(**options: Any) -> PDML:
    torch.manual_seed(0)
    return PDML(**{**SMALL, **options})


def test_default_network_has_the_layers_of_the_table() -> None:
    with torch.device("meta"):
        model = PDML(auxiliary=True, metric_channels=128)
    assert model.backbone.channels == [1024, 2048] and model.backbone.strides[-1] == 8
    branches = 4 * (2048 * 512 + 2 * 512)
    assert count(model.head) == branches + 4096 * 512 * 9 + 2 * 512
    assert count(model.classifier) == 512 * 59 + 59
    assert count(model.auxiliary) == 1024 * 256 * 9 + 2 * 256 + 256 * 59 + 59
    assert count(model.metric_projection) == 512 * 128 + 128
    assert model.feature_channels == 128
    stem = [layer for layer in model.backbone.body["conv1"] if isinstance(layer, nn.Conv2d)]
    assert [(layer.out_channels, layer.kernel_size) for layer in stem] == [(64, (3, 3)), (64, (3, 3)), (128, (3, 3))]
    with torch.device("meta"):
        plain = PDML()
    assert plain.auxiliary is None and count(plain.metric_projection) == 0 and plain.feature_channels == 512


def test_a_bins_width_does_not_depend_on_how_many_there_are() -> None:
    with torch.device("meta"):
        model = PDML(bins=(1, 2))
        assert count(model.head) == 2 * (2048 * 512 + 2 * 512) + (2048 + 2 * 512) * 512 * 9 + 2 * 512
        narrow = PDML(bins=(1, 2), branch_channels=32)
    assert count(narrow.head) == 2 * (2048 * 32 + 2 * 32) + (2048 + 2 * 32) * 512 * 9 + 2 * 512


@pytest.mark.parametrize(("backbone", "deep_stem"), [("resnet18", None), ("resnet18", False), ("resnet26d", None)])
def test_every_stem_rounds_the_same_way(backbone: str, deep_stem: bool | None) -> None:
    with torch.device("meta"):
        model = PDML(backbone, num_classes=5, deep_stem=deep_stem, head_channels=16).eval()
        assert model(torch.zeros(1, 3, 96, 128)).logits.shape == (1, 5, 12, 16)


def test_deeplab_head_classifies_the_last_stage() -> None:
    with torch.device("meta"):
        model = PDML(head="deeplab", num_classes=150)
    assert model.feature_channels == 2048
    assert count(model.head) == 0 and count(model.classifier) == 4 * (2048 * 150 * 9 + 150)
    assert isinstance(model.classifier, DilatedClassifier)
    assert [branch.dilation for branch in model.classifier.branches] == [(6, 6), (12, 12), (18, 18), (24, 24)]


@pytest.mark.parametrize(("head", "channels"), [("psp", 16), ("deeplab", 24)])
def test_outputs_are_at_the_resolution_of_the_features(images: Tensor, head: str, channels: int) -> None:
    model = small(head=head, auxiliary=True)
    logits, features, auxiliary = model(images)
    assert logits.shape == auxiliary.shape == (2, 5, 8, 12)
    assert features.shape == (2, channels, 8, 12) and model.feature_channels == channels
    assert model.eval()(images).auxiliary is None
    assert small(metric_channels=3)(images).features.shape == (2, 3, 8, 12)


@pytest.mark.parametrize("head", ["psp", "deeplab"])
def test_features_are_read_before_dropout_and_before_the_projection(images: Tensor, head: str) -> None:
    model = small(head=head, dropout=0.5)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    first, second = model(images), model(images)
    assert torch.equal(first.features, second.features)
    assert not torch.equal(first.logits, second.logits)
    model.eval()
    output = model(images)
    torch.testing.assert_close(model.classifier(output.features), output.logits)
    projected = small(head=head, metric_channels=4).eval()(images)
    torch.testing.assert_close(projected.logits, small(head=head).eval()(images).logits)


def test_dilated_classifier_sums_its_branches() -> None:
    torch.manual_seed(0)
    classifier = DilatedClassifier(6, 3, dilations=(1, 5))
    features = torch.randn(1, 6, 9, 13)
    alone = [branch(features) for branch in classifier.branches]
    torch.testing.assert_close(classifier(features), alone[0] + alone[1])
    for branch in classifier.branches:
        assert 0.005 < branch.weight.std() < 0.015 and not branch.bias.any()


def test_every_weight_gets_a_gradient(images: Tensor) -> None:
    model = small(auxiliary=True, metric_channels=4)
    output = model(images)
    sum(part.square().mean() for part in output).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_image_does_not_depend_on_its_batch_and_rows_are_not_columns(images: Tensor) -> None:
    model = small().eval()
    alone = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(model(images).logits, alone, rtol=1e-5, atol=1e-5)
    turned = model(images.transpose(2, 3)).logits.transpose(2, 3)
    assert turned.shape == alone.shape and not torch.allclose(turned, alone)


def test_save_and_load_give_the_same_model(tmp_path: Path, images: Tensor) -> None:
    model = small(bins=(1, 2), metric_channels=4, activation="leaky_relu").eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["metric_channels"] == 4
    loaded = PDML.from_pretrained(tmp_path)
    for one, other in zip(loaded(images), model(images), strict=True):
        assert one is other is None or torch.equal(one, other)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        PDML.from_pretrained(tmp_path, num_classes=7)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"head_channels": 0}, "head_channels must be at least 1, got 0"),
        ({"branch_channels": 0}, "branch_channels must be at least 1, got 0"),
        ({"metric_channels": 0}, "metric_channels must be at least 1, got 0"),
        ({"head": "aspp"}, "head must be 'psp' or 'deeplab', got 'aspp'"),
        ({"activation": "gelu"}, "activation must be 'relu' or 'leaky_relu', got 'gelu'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"bins": ()}, "bins must be"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        small(**options)
