"""Backbones by name: sizes, dilations, weights from files, errors."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from gingham.errors import CheckpointError
from gingham.nn.backbone import Backbone, BackboneError, SmallNetwork, deep_stem_names


@pytest.fixture(scope="module")
def resnet101() -> Backbone:
    with torch.device("meta"):
        return Backbone("resnet101", output_stride=8, deep_stem=True).eval()


@pytest.mark.parametrize(("image", "features"), [((769, 769), (97, 97)), ((1024, 2048), (129, 257))])
def test_feature_sizes_are_the_papers(resnet101: Backbone, image: tuple[int, int], features: tuple[int, int]) -> None:
    layer3, layer4 = resnet101(torch.empty(1, 3, *image, device="meta"))
    assert layer3.shape == (1, 1024, *features)
    assert layer4.shape == (1, 2048, *features)


def test_deep_stem_and_dilations_are_the_papers(resnet101: Backbone) -> None:
    body = resnet101.body
    stem = [layer for layer in body["conv1"] if isinstance(layer, nn.Conv2d)]
    assert [(layer.in_channels, layer.out_channels, layer.stride) for layer in stem] == [
        (3, 64, (2, 2)),
        (64, 64, (1, 1)),
        (64, 128, (1, 1)),
    ]
    assert body["maxpool"].ceil_mode
    for name, blocks, dilation in (("layer1", 3, 1), ("layer2", 4, 1), ("layer3", 23, 2), ("layer4", 3, 4)):
        convolutions = [block.conv2 for block in body[name]]
        assert len(convolutions) == blocks
        assert {layer.dilation for layer in convolutions} == {layer.padding for layer in convolutions}
        assert {layer.dilation for layer in convolutions} == {(dilation, dilation)}


@pytest.mark.parametrize(("name", "widths"), [("resnet18", [64, 64, 128]), ("resnet18d", [32, 32, 64])])
def test_deep_stem_of_none_replaces_only_a_plain_one(name: str, widths: list[int]) -> None:
    with torch.device("meta"):
        body = Backbone(name, deep_stem=None).body
    assert [layer.out_channels for layer in body["conv1"] if isinstance(layer, nn.Conv2d)] == widths


def test_a_backbone_that_is_no_resnet_keeps_its_stem() -> None:
    with torch.device("meta"):
        body = Backbone("mobilenetv2_050", deep_stem=None).body
    first = next(layer for layer in body.modules() if isinstance(layer, nn.Conv2d))
    assert (first.in_channels, first.kernel_size, first.stride) == (3, (3, 3), (2, 2))


def test_contracted_dilation_starts_a_stage_with_the_one_before() -> None:
    with torch.device("meta"):
        body = Backbone("resnet50", output_stride=8, contract_dilation=True).body
    assert [block.conv2.dilation[0] for block in body["layer3"]] == [1, 2, 2, 2, 2, 2]
    assert [block.conv2.dilation[0] for block in body["layer4"]] == [2, 4, 4]


@pytest.mark.parametrize("name", ["resnet50", "mobilenetv2_050"])
def test_a_last_stride_of_one_need_not_be_dilated(name: str) -> None:
    with torch.device("meta"):
        usual, dilated = Backbone(name).eval(), Backbone(name, output_stride=16)
        backbone = Backbone(name, output_stride=16, dilate=False).eval()
        assert backbone(torch.empty(1, 3, 256, 128))[-1].shape[-2:] == (16, 8)

    def convolutions(network: nn.Module) -> list[tuple[object, ...]]:
        return [(x.kernel_size, x.dilation, x.padding) for x in network.modules() if isinstance(x, nn.Conv2d)]

    assert convolutions(backbone) == convolutions(usual) != convolutions(dilated)
    assert backbone.state_dict().keys() == usual.state_dict().keys()


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_output_stride_is_kept(stride: int) -> None:
    backbone = Backbone("resnet18", output_stride=stride, options={"channels": [8, 8, 16, 16]}).eval()
    *_, last = backbone(torch.zeros(1, 3, 64, 96))
    assert last.shape == (1, 16, 64 // stride, 96 // stride)
    assert backbone.channels == [16, 16]
    assert backbone.strides[-1] == stride


@pytest.mark.parametrize(
    ("name", "output_stride", "channels"),
    [("mobilenetv2_050", 16, [48, 160]), ("convnext_atto", 32, [160, 320]), ("test_vit", 16, None)],
)
def test_other_networks_give_their_last_stages(name: str, output_stride: int, channels: list[int] | None) -> None:
    options = {"img_size": 64} if channels is None else None
    if channels is None:
        backbone = Backbone(name, options=options).eval()
    else:
        backbone = Backbone(name, output_stride=output_stride).eval()
        assert backbone.channels == channels
    features = backbone(torch.zeros(1, 3, 64, 64))
    assert [stage.shape[1] for stage in features] == backbone.channels
    assert [64 // stage.shape[-1] for stage in features] == backbone.strides


def test_channels_last_networks_give_channels_first() -> None:
    backbone = Backbone("swin_tiny_patch4_window7_224", options={"img_size": 64, "depths": (1, 1, 1, 1)}).eval()
    assert [list(stage.shape) for stage in backbone(torch.zeros(1, 3, 64, 64))] == [[1, 384, 4, 4], [1, 768, 2, 2]]


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_small_network_reaches_its_stride_early(stride: int) -> None:
    backbone = Backbone("small", output_stride=stride, options={"widths": (8, 16, 24), "depth": 2}).eval()
    auxiliary, features = backbone(torch.zeros(2, 3, 64, 32))
    assert auxiliary.shape == (2, 16, 64 // min(stride, 4), 32 // min(stride, 4))
    assert features.shape == (2, 24, 64 // stride, 32 // stride)
    assert backbone.channels == [16, 24]


def test_small_network_sees_little() -> None:
    network = SmallNetwork(output_stride=4, widths=(8, 8, 8)).eval()
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(image)[-1][0, :, 8, 8].sum(), image)
    rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 <= 20


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("resnet999", {}, "unknown backbone 'resnet999'; valid are small and timm's models, such as .*resnet"),
        ("convnext_atto", {"deep_stem": True}, "is no ResNet and has no deep stem; leave deep_stem out"),
        ("swin_tiny_patch4_window7_224", {"output_stride": 8}, "cannot be built .*output_stride"),
        ("resnet18", {"output_stride": 5}, "output_stride=5 is not possible"),
        ("resnet18", {"options": {"colour": 1}}, "cannot be built .*colour"),
        ("small", {"output_stride": 4, "deep_stem": True}, "is no ResNet and has no deep stem; leave deep_stem out"),
        ("small", {"output_stride": 32}, r"reaches output_stride \[2, 4, 8, 16\], not 32"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(name: str, options: dict, text: str) -> None:
    with pytest.raises(BackboneError, match=text) as caught:
        Backbone(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_come_from_a_file_without_its_classifier(tmp_path: Path, ending: str) -> None:
    options = {"channels": [8, 8, 16, 16]}
    source = Backbone("resnet18", output_stride=8, options=options).eval()
    state = source.body.state_dict() | {"fc.weight": torch.zeros(5, 16), "fc.bias": torch.zeros(5)}
    path = tmp_path / f"weights.{ending}"
    if ending == "pth":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    loaded = Backbone("resnet18", output_stride=8, weights=str(path), options=options).eval()
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(image)[-1], source(image)[-1])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
        ("densenet121", {"growth_rate": 4, "block_config": (1, 1, 1, 1)}),
    ],
)
def test_weights_of_a_whole_network_fit_where_timm_takes_its_containers_apart(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    whole = timm.create_model(name, **options).eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    loaded = Backbone(name, weights=str(tmp_path / "weights.pth"), options=options).eval()
    image = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(loaded(image)[-1], whole.forward_features(image))
    torch.save(loaded.body.state_dict(), tmp_path / "features.pth")
    again = Backbone(name, weights=str(tmp_path / "features.pth"), options=options).eval()
    assert torch.equal(again(image)[-1], loaded(image)[-1])


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(Backbone("resnet18", options={"channels": [8, 8, 16, 16]}).body.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*of another shape \(") as caught:
        Backbone("resnet18", options={"channels": [8, 8, 16, 24]}, weights=str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_weights_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.pth: no such checkpoint file"):
        Backbone("resnet18", weights="nowhere.pth")
    with pytest.raises(CheckpointError, match="has no weights 'a9_in9k': no such file, and timm's tags are a1_in1k"):
        Backbone("resnet18", weights="a9_in9k")
    with pytest.raises(CheckpointError, match="backbone small has no pretrained weights named 'timm'"):
        Backbone("small", weights="timm", output_stride=4)


@pytest.mark.parametrize("naming", ["official", "mmsegmentation", "timm"])
def test_three_namings_of_the_deep_stem_become_timms(naming: str) -> None:
    layers = ["conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1"]
    theirs = {
        "official": ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3"],
        "mmsegmentation": ["stem.0", "stem.1", "stem.3", "stem.4", "stem.6", "stem.7"],
        "timm": layers,
    }[naming]
    state = {f"{name}.weight": torch.tensor(float(index)) for index, name in enumerate(theirs)}
    state |= {"bn1.running_var" if naming == "timm" else f"{theirs[-1]}.running_var": torch.tensor(9.0)}
    state |= {"layer1.0.conv1.weight": torch.tensor(7.0), "layer1.0.bn3.weight": torch.tensor(8.0)}
    renamed = deep_stem_names(state)
    expected = {f"{name}.weight": float(index) for index, name in enumerate(layers)}
    expected |= {"bn1.running_var": 9.0, "layer1.0.conv1.weight": 7.0, "layer1.0.bn3.weight": 8.0}
    assert {name: float(value) for name, value in renamed.items()} == expected
