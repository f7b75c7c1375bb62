"""The CCNet network: parameter counts, wiring, options, saving and loading."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gingham
from gingham.errors import CheckpointError
from gingham.methods.ccnet.network import CCNet, CrissCrossHead
from gingham.methods.ccnet.objective import segmentation_loss
from gingham.models import ModelError, create_model, list_models

SMALL = {"backbone": "small", "num_classes": 5, "output_stride": 4, "head_channels": 16}
SMALL |= {"auxiliary_channels": 16, "backbone_options": {"widths": [8, 16, 24]}}


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 48)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small(**options) -> CCNet:
    torch.manual_seed(0)
    model = CCNet(**{**SMALL, **options})
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    return model


def test_default_network_has_the_parameters_of_the_official_one() -> None:
    with torch.device("meta"):
        model = CCNet()
    assert model.head.cca.loops == 2
    assert count(model.head) == 23_934_100
    assert count(model.head.cca) == 328_321
    assert count(model.auxiliary) == 4_729_875


def test_outputs_are_at_the_resolution_of_the_features(images: Tensor) -> None:
    model = small()
    logits, auxiliary, features = model(images)
    assert logits.shape == auxiliary.shape == (2, 5, 8, 12)
    assert features.shape == (2, 16, 8, 12)
    assert model.eval()(images).auxiliary is None
    assert small(auxiliary=False)(images).auxiliary is None


def test_head_fuses_the_backbone_features_first() -> None:
    torch.manual_seed(0)
    head = CrissCrossHead(24, 5, channels=16).eval()
    nn.init.constant_(head.cca.gamma, 0.5)
    features = torch.randn(2, 24, 5, 7)
    logits, context = head(features)
    fused = torch.cat([features, head.convb(head.cca(head.conva(features)))], dim=1)
    torch.testing.assert_close(logits, head.bottleneck(fused))
    torch.testing.assert_close(context, head.cca(head.conva(features)))


@pytest.mark.parametrize(("activation", "kind"), [("leaky_relu", nn.LeakyReLU), ("relu", nn.ReLU)])
def test_activation_is_an_option(activation: str, kind: type) -> None:
    head = small(activation=activation).head
    activations = [layer for layer in head.modules() if isinstance(layer, (nn.LeakyReLU, nn.ReLU))]
    assert [type(layer) for layer in activations] == [kind] * 3
    assert all(layer.negative_slope == 0.01 for layer in activations if isinstance(layer, nn.LeakyReLU))


def test_loops_widen_the_view_of_a_pixel(images: Tensor) -> None:
    """Without attention the features at a pixel see its surroundings, with two loops the whole picture."""
    seen = []
    for loops in (0, 1, 2):
        model = small(loops=loops).eval()
        picture = torch.randn(1, 3, 96, 96, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(picture).features[0, :, 2, 2].sum(), picture)
        seen.append(int((gradient.abs().sum(dim=1) > 0).sum()))
    assert seen[0] <= 30**2
    assert seen[0] < seen[1] < seen[2]
    assert seen[2] > 0.99 * 96**2  # a few paths end in units that are off


def test_no_loops_leave_no_unused_weights(images: Tensor) -> None:
    model = small(loops=0)
    segmentation_loss(model(images), torch.zeros(2, 32, 48, dtype=torch.int64)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_weight_gets_a_gradient(images: Tensor) -> None:
    model = small(category_channels=4)
    output = model(images)
    assert output.features.shape == (2, 4, 8, 12)
    loss = segmentation_loss(output, torch.randint(0, 5, (2, 32, 48))) + output.features.square().mean()
    loss.backward()
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if "key_conv.bias" not in name)


def test_image_does_not_depend_on_its_batch(images: Tensor) -> None:
    model = small().eval()
    alone = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(model(images).logits, alone, rtol=1e-5, atol=1e-5)


def test_save_and_load_give_the_same_model(tmp_path: Path, images: Tensor) -> None:
    model = small(loops=1, shared=False, activation="relu").eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["activation"] == "relu"
    loaded = CCNet.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.head.cca.loops == 1
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_saved_model_does_not_ask_for_its_backbone_weights(tmp_path: Path, images: Tensor) -> None:
    weights = tmp_path / "backbone.pth"
    torch.save(small().backbone.body.state_dict(), weights)
    model = small(backbone_weights=str(weights)).eval()
    model.save_pretrained(tmp_path / "model")
    weights.unlink()
    assert torch.equal(CCNet.from_pretrained(tmp_path / "model")(images).logits, model(images).logits)


def test_loading_another_shape_is_refused_in_one_line(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"does not fit the model: .*head.bottleneck.4.weight is \[5, 16"
    ) as caught:
        CCNet.from_pretrained(tmp_path, num_classes=7)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config.json in this folder; save_pretrained writes one"):
        CCNet.from_pretrained(tmp_path)


def test_missing_folder_or_repository_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no/such/folder", "gingham-tests/no-such-repository"):
        with pytest.raises(
            CheckpointError, match=rf"{name}: neither a folder nor a repository at hand \(.+\)"
        ) as caught:
            CCNet.from_pretrained(name)
        assert "\n" not in str(caught.value)


def test_truncated_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a readable checkpoint") as caught:
        CCNet.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_models_are_made_by_name() -> None:
    assert list_models() == sorted(list_models())
    assert "ccnet" in list_models()
    assert isinstance(create_model("ccnet", **SMALL, loops=3), CCNet)
    assert gingham.create_model is create_model
    assert gingham.list_models is list_models


def test_wrong_names_and_options_list_the_valid_ones() -> None:
    with pytest.raises(ModelError, match=r"unknown model 'ccnett'; valid are .*ccnet"):
        create_model("ccnett")
    with pytest.raises(
        ModelError, match=r"ccnet has no option 'loop' \(did you mean loops\?\); valid are backbone, num_c"
    ):
        create_model("ccnet", loop=2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"head_channels": 4}, "channels must be at least reduction=8"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"activation": "gelu"}, "activation must be 'relu' or 'leaky_relu', got 'gelu'"),
        ({"loops": -1}, "loops must not be negative"),
    ],
)
def test_options_out_of_range_are_named(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CCNet(**{**SMALL, **options})


def test_channels_last_changes_no_result(images: Tensor) -> None:
    model = small()
    expected = model.eval()(images).logits
    laid_out = model.to(memory_format=torch.channels_last)
    result = laid_out(images.contiguous(memory_format=torch.channels_last)).logits
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_training_in_channels_last_and_compiled_follows_the_plain_one(images: Tensor) -> None:
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = small().train()
        step = model
        inputs = images
        if compiled:
            model.to(memory_format=torch.channels_last)
            inputs = images.contiguous(memory_format=torch.channels_last)
            step = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        history = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = step(inputs).logits.square().mean()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        assert history[-1] < history[0]
        losses.append(history)
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-5)
