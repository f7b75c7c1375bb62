"""The network of one-shot adaptation: parameters of the code's, outputs, classifiers, grouped batch normalisation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm", reason="networks need the extra: pip install gingham[train]")
import gingham
from gingham.methods.oneshot_reid.network import GroupedBatchNorm, OneShotReID
from gingham.nn.backbone import BackboneError

SMALL: dict[str, Any] = {"backbone": "small", "embedding_channels": 12, "backbone_options": {"widths": [8, 8, 16]}}


def small(**options: Any) -> OneShotReID:
    torch.manual_seed(0)
    return OneShotReID(**SMALL | options)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("persons", [0, 702, 751])
def test_the_default_network_has_the_parameters_of_the_code(persons: int) -> None:
    with torch.device("meta"):
        model = OneShotReID(num_classes=persons)
    assert count(model.backbone) == 23_508_032
    assert count(model.embedding) == 4_198_400
    assert count(model) == 23_508_032 + 4_198_400 + 2049 * persons


@pytest.mark.parametrize(("stride", "size"), [(2, (8, 4)), (1, (16, 8))])
def test_the_last_stride_changes_the_map_and_no_weights(stride: int, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = OneShotReID(last_stride=stride).eval()
        (features,) = model.backbone(torch.empty(1, 3, 256, 128))
        assert features.shape == (1, 2048, *size)
        assert model.state_dict().keys() == OneShotReID().state_dict().keys()


def test_retrieval_is_by_the_plain_mean_of_the_map() -> None:
    model = small().eval()
    images = torch.randn(3, 3, 64, 32)
    output = model(images)
    (features,) = model.backbone(images)
    assert features.shape[-2:] == (8, 4)
    torch.testing.assert_close(output.pooled, features.mean((2, 3)))
    assert output.embedding.shape == (3, 12) and bool((output.embedding >= 0).all())
    assert output.source_logits is None and output.target_logits is None


def test_classifiers_see_the_embedding_and_differ_by_name_only() -> None:
    model = small(num_classes=5, target_classes=7, dropout=0.5)
    images = torch.randn(4, 3, 64, 32)
    output = model.eval()(images)
    assert output.source_logits.shape == (4, 5) and output.target_logits.shape == (4, 7)
    torch.testing.assert_close(output.source_logits, model.source_classifier(output.embedding))
    bare = small().state_dict().keys()
    assert model.state_dict().keys() - bare == {
        f"{domain}_classifier.{name}" for domain in ("source", "target") for name in ("weight", "bias")
    }
    model.train()
    assert not torch.equal(model(images).source_logits, model(images).source_logits)  # dropout


@pytest.mark.parametrize(("parts", "rows"), [(2, 4), (3, 2)])
def test_parts_are_means_of_as_many_rows_each_from_the_top(parts: int, rows: int) -> None:
    model, whole = small(num_parts=parts).eval(), small().eval()
    assert model.state_dict().keys() == whole.state_dict().keys()
    images = torch.randn(3, 3, 64, 32)
    output = model(images)
    (features,) = model.backbone(images)
    assert output.parts.shape == (3, parts, 16)
    for part in range(parts):
        expected = features[:, :, part * rows : (part + 1) * rows].mean((2, 3))
        torch.testing.assert_close(output.parts[:, part], expected)
    torch.testing.assert_close(output.pooled, whole(images).pooled)
    assert whole(images).parts is None
    assert small(num_parts=parts, num_classes=2).eval()(images).parts.shape == (3, parts, 16)
    with pytest.raises(ValueError, match=rf"large enough for {parts} parts, got a map of 1 rows"):
        model(images[:, :, :8])


def test_new_layers_begin_small() -> None:
    model = small(num_classes=40, embedding_channels=400)
    for layer in (model.embedding[0], model.source_classifier):
        assert float(layer.weight.detach().std()) == pytest.approx(0.001, rel=0.05)
    assert not model.source_classifier.bias.any()


# --- grouped batch normalisation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 3), (12, 3, 4, 2)])
def test_groups_are_normalised_as_on_devices_of_their_own(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    kind: Any = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    plain = kind(3)
    nn.init.normal_(plain.weight)
    norm = GroupedBatchNorm(plain, group=4)
    features = torch.randn(shape) * torch.arange(1, 13).view(-1, *(1 for _ in shape[1:]))
    expected = torch.cat([plain(part) for part in features.split(4)])
    torch.testing.assert_close(norm(features), expected)
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])
    assert not torch.allclose(kind(3)(features), expected)
    torch.testing.assert_close(norm.eval()(features), plain.eval()(features))


def test_no_group_is_smaller_than_asked_for() -> None:
    sizes = []

    class Watched(GroupedBatchNorm):
        def _check_input_dim(self, input: Tensor) -> None:
            sizes.append(len(input))

    norm = Watched(nn.BatchNorm1d(2), group=4)
    for images in (3, 4, 7, 9):
        norm(torch.randn(images, 2))
    assert sizes == [3, 4, 7, 5, 4]


def test_groups_change_training_only_and_no_weights() -> None:
    images = torch.randn(8, 3, 32, 16)
    grouped, whole = small(bn_group=4), small(bn_group=None)
    assert sum(isinstance(module, GroupedBatchNorm) for module in grouped.modules()) == 4
    assert grouped.state_dict().keys() == whole.state_dict().keys()
    for value, other in zip(grouped.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(value, other)
    assert torch.equal(grouped.eval()(images).pooled, whole.eval()(images).pooled)
    assert not torch.allclose(grouped.train()(images).pooled, whole.train()(images).pooled)
    assert torch.equal(small(bn_group=64)(images).pooled, small(bn_group=None)(images).pooled)  # one group


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": -1},
        {"target_classes": -1},
        {"embedding_channels": 0},
        {"dropout": 1.0},
        {"num_parts": 0},
        {"last_stride": 4},
        {"bn_group": 1},
    ],
    ids=str,
)
def test_options_outside_their_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        small(**options)


def test_a_backbone_whose_batch_normalisation_has_no_groups_is_refused() -> None:
    with torch.device("meta"):
        with pytest.raises(BackboneError, match="pass bn_group=None"):
            OneShotReID("mobilenetv2_050")
        assert OneShotReID("mobilenetv2_050", bn_group=None).embedding[0].in_features == 160


def test_a_saved_network_comes_back(tmp_path: Path) -> None:
    model = gingham.create_model("oneshot_reid", **SMALL, num_classes=3).eval()
    model.save_pretrained(tmp_path)
    again = OneShotReID.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 16)
    assert torch.equal(again(images).source_logits, model(images).source_logits)
