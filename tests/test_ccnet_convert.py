"""Checkpoints of the official code and of mmsegmentation give the outputs of the network that they describe."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gingham.errors import CheckpointError
from gingham.methods.ccnet.convert import load_checkpoint
from gingham.methods.ccnet.network import CCNet

OPTIONS = {"num_classes": 4, "head_channels": 16, "auxiliary_channels": 8}
OPTIONS |= {"backbone_options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}}
OFFICIAL = {"backbone": "resnet50"}
MMSEGMENTATION = {"backbone": "resnet50c", "contract_dilation": True, "activation": "relu"}

OFFICIAL_STEM = {"conv1.0": "conv1", "conv1.1": "bn1", "conv1.3": "conv2", "conv1.4": "bn2", "conv1.6": "conv3"}
OFFICIAL_STEM |= {"bn1": "bn3"}
MMSEGMENTATION_STEM = {f"conv1.{index}": f"stem.{index}" for index in (0, 1, 3, 4, 6)} | {"bn1": "stem.7"}
MMSEGMENTATION_HEADS = {
    "head.conva.0": "decode_head.convs.0.conv",
    "head.conva.1": "decode_head.convs.0.bn",
    "head.cca.query_conv": "decode_head.cca.query_conv",
    "head.cca.key_conv": "decode_head.cca.key_conv",
    "head.cca.value_conv": "decode_head.cca.value_conv",
    "head.convb.0": "decode_head.convs.1.conv",
    "head.convb.1": "decode_head.convs.1.bn",
    "head.bottleneck.0": "decode_head.conv_cat.conv",
    "head.bottleneck.1": "decode_head.conv_cat.bn",
    "head.bottleneck.4": "decode_head.conv_seg",
    "auxiliary.0": "auxiliary_head.convs.0.conv",
    "auxiliary.1": "auxiliary_head.convs.0.bn",
    "auxiliary.4": "auxiliary_head.conv_seg",
}


def random_model(**options) -> CCNet:
    """A model none of whose tensors has its initial value."""
    torch.manual_seed(0)
    model = CCNet(**OPTIONS, **options)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape) * 0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def official_names(model: CCNet) -> dict[str, Tensor]:
    state = {}
    for name, value in model.state_dict().items():
        layer, _, tensor = name.rpartition(".")
        if name.startswith("backbone.body."):
            layer = layer.removeprefix("backbone.body.")
            layer = OFFICIAL_STEM.get(layer, layer)
        layer = {"head.bottleneck.4": "head.bottleneck.3", "auxiliary.4": "dsn.3"}.get(layer, layer)
        if tensor != "num_batches_tracked":
            state[f"{layer}.{tensor}".replace("auxiliary.", "dsn.")] = value.clone()
    return state


def mmsegmentation_names(model: CCNet) -> dict[str, Tensor]:
    state = {}
    for name, value in model.state_dict().items():
        layer, _, tensor = name.rpartition(".")
        if name == "head.cca.gamma":
            state["decode_head.cca.gamma.scale"] = value.reshape(())
        elif name.startswith("backbone.body."):
            layer = layer.removeprefix("backbone.body.")
            state[f"backbone.{MMSEGMENTATION_STEM.get(layer, layer)}.{tensor}"] = value.clone()
        elif name != "auxiliary.0.bias":
            state[f"{MMSEGMENTATION_HEADS[layer]}.{tensor}"] = value.clone()
    return state


def assert_same_outputs(loaded: CCNet, model: CCNet) -> None:
    images = torch.randn(2, 3, 33, 41)
    torch.testing.assert_close(loaded.eval()(images).logits, model.eval()(images).logits)
    auxiliary_in = torch.randn(2, 32, 5, 6)
    torch.testing.assert_close(loaded.auxiliary(auxiliary_in), model.auxiliary(auxiliary_in))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("gamma_shape", [(1,), ()])
def test_official_checkpoint(tmp_path: Path, prefix: str, gamma_shape: tuple[int, ...]) -> None:
    model = random_model(**OFFICIAL)
    state = official_names(model)
    state["head.cca.gamma"] = state["head.cca.gamma"].reshape(gamma_shape)
    path = tmp_path / "CS_scenes_60000.pth"
    torch.save({f"{prefix}{name}": value for name, value in state.items()}, path)
    loaded = CCNet(**OPTIONS, **OFFICIAL)
    load_checkpoint(loaded, path, inplace_batch_norm=False)
    assert_same_outputs(loaded, model)


def test_in_place_batch_norm_scales_by_the_magnitude(tmp_path: Path) -> None:
    model = random_model(**OFFICIAL)
    state = official_names(model)
    batch_norms = [name.removesuffix("running_var") for name in state if name.endswith("running_var")]
    signs = torch.Generator().manual_seed(1)
    for name in batch_norms:  # |weight| + eps is what the model has
        weight = state[f"{name}weight"]
        sign = torch.randint(0, 2, weight.shape, generator=signs) * 2 - 1
        state[f"{name}weight"] = sign * (weight - 1e-5)
    path = tmp_path / "official.pth"
    torch.save(state, path)
    loaded = CCNet(**OPTIONS, **OFFICIAL)
    load_checkpoint(loaded, path)
    assert_same_outputs(loaded, model)
    load_checkpoint(loaded, path, inplace_batch_norm=False)
    images = torch.randn(1, 3, 33, 41)
    assert not torch.allclose(loaded.eval()(images).logits, model.eval()(images).logits, atol=1e-2)


def test_mmsegmentation_checkpoint(tmp_path: Path) -> None:
    model = random_model(**MMSEGMENTATION)
    nn.init.zeros_(model.auxiliary[0].bias)  # mmsegmentation has none
    path = tmp_path / "ccnet_r50-d8.pth"
    torch.save({"meta": {"epoch": 1}, "state_dict": mmsegmentation_names(model)}, path)
    loaded = CCNet(**OPTIONS, **MMSEGMENTATION)
    load_checkpoint(loaded, path)
    assert_same_outputs(loaded, model)


def test_converted_model_may_lack_the_auxiliary_head_and_have_a_projection(tmp_path: Path) -> None:
    model = random_model(**OFFICIAL)
    torch.save(official_names(model), tmp_path / "official.pth")
    loaded = CCNet(**OPTIONS, **OFFICIAL, auxiliary=False, category_channels=2)
    load_checkpoint(loaded, tmp_path / "official.pth", inplace_batch_norm=False)
    images = torch.randn(1, 3, 33, 41)
    torch.testing.assert_close(loaded.eval()(images).logits, model.eval()(images).logits)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda state: state.pop("head.conva.0.weight"), r"1 missing \(head.conva.0.weight\)"),
        (lambda state: state.update({"head.extra": torch.ones(1)}), r"1 unexpected \(head.extra\)"),
        (
            lambda state: state.update({"dsn.3.bias": torch.ones(9)}),
            r"1 of another shape \(auxiliary.4.bias is \[9\] in the file and \[4\] in the model\)",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if name.startswith("layer1")],
            r"missing \(backbone.body.layer1\S+, \S+, \S+ and \d+ more\)",
        ),
    ],
)
def test_checkpoint_that_does_not_fit_is_described_in_one_line(tmp_path: Path, spoil, text: str) -> None:
    state = official_names(random_model(**OFFICIAL))
    spoil(state)
    path = tmp_path / "official.pth"
    torch.save(state, path)
    loaded = CCNet(**OPTIONS, **OFFICIAL)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    with pytest.raises(CheckpointError, match=text) as caught:
        load_checkpoint(loaded, path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path} does not fit the model: ")
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


class Unsafe:
    pass


def test_files_that_are_no_checkpoints_are_named(tmp_path: Path) -> None:
    model = CCNet(**OPTIONS, **OFFICIAL)
    with pytest.raises(CheckpointError, match=r"absent.pth: no such checkpoint file"):
        load_checkpoint(model, tmp_path / "absent.pth")
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other.pth: no CCNet checkpoint"):
        load_checkpoint(model, tmp_path / "other.pth")
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match=r"empty.pth: holds no tensors"):
        load_checkpoint(model, tmp_path / "empty.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"broken.pth: not a readable checkpoint"):
        load_checkpoint(model, tmp_path / "broken.pth")
    torch.save({"state_dict": Unsafe()}, tmp_path / "unsafe.pth")  # loading it would run its code
    with pytest.raises(CheckpointError, match=r"unsafe.pth: not a readable checkpoint") as caught:
        load_checkpoint(model, tmp_path / "unsafe.pth")
    assert "\n" not in str(caught.value)
