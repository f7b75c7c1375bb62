"""STA's network: sizes and parameters of the paper, what its attention changes, clips out of known frames."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gingham
from gingham.methods.sta.network import STA
from gingham.nn.backbone import BackboneError

SMALL: dict[str, Any] = {
    "backbone": "small",
    "num_persons": 6,
    "output_stride": 4,
    "embedding_channels": 8,
    "backbone_options": {"widths": [8, 12]},
}
ATTENTION = ("both", "sum", "none")


def small(**options: Any) -> STA:
    torch.manual_seed(0)
    return STA(**{**SMALL, **options}).eval()


def frames(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, 3, 32, 16, generator=torch.Generator().manual_seed(seed))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize(("persons", "total"), [(625, 28_345_009), (702, 28_423_934)])
def test_parameters_are_those_of_the_paper(persons: int, total: int) -> None:
    with torch.device("meta"):
        model = STA(num_persons=persons)
    assert count(model.backbone) == 23_508_032
    assert count(model.embedding) == 4_196_352
    assert count(model.classifier) == 1025 * persons
    assert count(model) == total and count(model.head) == 0


def test_a_frame_of_256_x_128_has_16_x_8_features_without_dilation() -> None:
    with torch.device("meta"):
        model = STA().eval()
        assert model.maps(torch.empty(1, 3, 256, 128)).shape == (1, 2048, 16, 8)
    last = [module for module in model.backbone.body["layer4"].modules() if isinstance(module, nn.Conv2d)]
    assert {(layer.stride, layer.dilation) for layer in last} == {((1, 1), (1, 1))}
    first = model.backbone.body["layer3"][0]
    assert first.conv1.stride == (1, 1) and first.conv2.stride == (2, 2) and first.downsample[0].stride == (2, 2)


def test_new_layers_begin_as_agrls() -> None:
    model = small(embedding_channels=64, num_persons=50)
    linear, norm, relu = model.embedding
    for layer in (linear, model.classifier):
        assert 0.009 < layer.weight.std() < 0.011
    assert linear.bias is None and not model.classifier.bias.any()
    assert norm.weight.eq(1).all() and not norm.bias.any() and isinstance(relu, nn.ReLU)


@pytest.mark.parametrize(("neck", "norms", "negative"), [("relu", 1, False), ("bn", 1, True), ("linear", 0, True)])
def test_the_neck_is_what_it_is_called(neck: str, norms: int, negative: bool) -> None:
    model = small(neck=neck).train()
    features = model(frames(4, 2)).features
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in model.embedding) == norms
    assert bool((features < 0).any()) == negative
    if neck == "bn":
        torch.testing.assert_close(features.mean(dim=0), torch.zeros(8), atol=1e-5, rtol=0)


def test_all_variants_have_one_state() -> None:
    states = [small(attention=attention).state_dict() for attention in ATTENTION]
    for other in states[1:]:
        assert [(name, value.shape) for name, value in other.items()] == [
            (name, value.shape) for name, value in states[0].items()
        ]
        assert all(torch.equal(value, states[0][name]) for name, value in other.items())


# ------------------------------------------------------------------------------------------------ attention


def test_a_clips_vector_is_made_of_the_best_frames_and_of_all_by_their_scores() -> None:
    clips = frames(2, 3)
    pooled: dict[str, Tensor] = {}
    for attention in ATTENTION:
        model = small(attention=attention)
        model.embedding = nn.Identity()
        model.classifier = nn.Identity()
        output = model(clips)
        pooled[attention] = output.features
        maps = model.maps(clips.flatten(0, 1)).unflatten(0, (2, 3))
    squares = maps.square().sum(dim=2)
    shares = squares.unflatten(2, (4, -1)).sum(dim=(3, 4)) / squares.sum(dim=(2, 3))[..., None]
    scores = shares / shares.sum(dim=1, keepdim=True)  # [B, T, K]
    bands = maps.unflatten(3, (4, -1)).sum(dim=(4, 5)).transpose(2, 3) / maps[0, 0, 0].numel()  # [B, T, K, C]
    best = torch.stack([bands[b, scores[b, :, k].argmax(), k] for b in range(2) for k in range(4)])
    weighted = (scores[..., None] * bands).sum(dim=(1, 2))
    torch.testing.assert_close(pooled["both"], torch.cat([best.unflatten(0, (2, 4)).sum(dim=1), weighted], dim=1))
    torch.testing.assert_close(pooled["sum"], torch.cat([weighted, weighted], dim=1))
    mean = maps.mean(dim=(1, 3, 4))
    torch.testing.assert_close(pooled["none"], torch.cat([mean, mean], dim=1))
    assert (weighted - mean).abs().max() > 1e-3


def test_one_part_is_an_average_of_frames() -> None:
    clips = frames(2, 3)
    weighted, mean = (small(parts=1, attention=attention)(clips) for attention in ("sum", "none"))
    torch.testing.assert_close(weighted.features, mean.features)
    torch.testing.assert_close(weighted.scores, mean.scores)
    assert (small(parts=4, attention="sum")(clips).features - mean.features).abs().max() > 1e-4


def test_a_clip_may_have_any_length_and_its_order_does_not_matter() -> None:
    model = small()
    for length in (1, 2, 7):
        clips = frames(2, length)
        output = model(clips)
        assert output.features.shape == (2, 8) and output.logits.shape == (2, 6)
        assert output.scores.shape == (2, length, 4) and output.attention.shape == (2, length, 8, 4)
        torch.testing.assert_close(model(clips.flip(1)).features, output.features)
        torch.testing.assert_close(model(clips.flip(1)).scores, output.scores.flip(1))
        torch.testing.assert_close(output.scores.sum(dim=1), torch.ones(2, 4))
    one = model(frames(2, 1))
    assert torch.equal(one.scores, torch.ones(2, 1, 4))


def test_copies_of_a_frame_are_one_frame() -> None:
    model = small()
    one = frames(2, 1)
    copies = model(one.expand(-1, 5, -1, -1, -1))
    torch.testing.assert_close(copies.scores, torch.full((2, 5, 4), 0.2))
    torch.testing.assert_close(copies.features, model(one).features)


def test_a_hidden_part_loses_its_score() -> None:
    model = small()
    for layer in model.backbone.modules():  # nothing to see gives no features
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.zero_()
            layer.bias.data.zero_()
    clips = frames(1, 1).repeat(1, 3, 1, 1, 1)
    clips[:, 1, :, 16:] = 0
    scores = model(clips).scores[0]
    assert (scores[1, 2:] < 0.6 * scores[0, 2:]).all()
    assert (scores[1, :2] > 1.3 * scores[0, :2]).all()


@pytest.mark.parametrize("attention", ATTENTION)
def test_clips_of_known_frames_are_not_computed_again(attention: str) -> None:
    model = small(attention=attention)
    known = frames(6)
    indices = torch.tensor([[0, 2, 5], [1, 1, 4]])
    with torch.no_grad():
        features, scores = model.embed(model.regions(known), indices)
        expected = model(known[indices])
    torch.testing.assert_close(features, expected.features)
    torch.testing.assert_close(scores, expected.scores)
    model, known = model.bfloat16(), known.bfloat16()
    with torch.no_grad():
        features, _ = model.embed(model.regions(known), indices)
        torch.testing.assert_close(features, model(known[indices]).features)


@pytest.mark.parametrize("attention", ATTENTION)
def test_everything_learns(attention: str) -> None:
    model = small(attention=attention).train()
    output = model(frames(4, 3))
    (output.features.square().sum() + output.logits.square().sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_scores_can_be_taken_for_constants() -> None:
    gradients = []
    for detach in (False, True):
        model = small(detach_attention=detach)
        clips = frames(2, 3).requires_grad_()
        model(clips).features.sum().backward()
        gradients.append(clips.grad)
    assert gradients[0].any() and gradients[1].any() and not torch.allclose(*gradients)


def test_bands_follow_the_energy_that_is_asked_for() -> None:
    scores = [small(energy=energy)(frames(2, 3)).scores for energy in ("sq", "l2", "agrl")]
    assert not torch.allclose(scores[0], scores[1], atol=1e-4)
    assert not torch.allclose(scores[1], scores[2], atol=1e-6)


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv2_050"])
def test_any_timm_network_will_do(backbone: str) -> None:
    torch.manual_seed(0)
    options = {"channels": [8, 8, 8, 8]} if backbone == "resnet18" else None
    model = STA(backbone, num_persons=3, embedding_channels=8, backbone_options=options).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 2, 3, 64, 32))
    assert output.attention is not None and output.attention.shape == (1, 2, 4, 2)


def test_a_model_is_saved_and_comes_back(tmp_path: Path) -> None:
    made = gingham.create_model("sta", **SMALL).eval()
    made.save_pretrained(tmp_path)
    again = STA.from_pretrained(tmp_path)
    assert torch.equal(made(frames(2, 3)).features, again(frames(2, 3)).features)


@pytest.mark.parametrize(
    "options",
    [
        {"num_persons": 0},
        {"embedding_channels": 0},
        {"attention": "all"},
        {"neck": "giraffe"},
        {"parts": 0},
        {"energy": "max"},
    ],
    ids=str,
)
def test_options_outside_their_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        small(**options)


def test_what_does_not_fit_is_named() -> None:
    for attention in ATTENTION:
        model = small(attention=attention)
        for shape in ((2,), (2, 0)):
            with pytest.raises(ValueError, match=r"clips must be \[B, T, 3, H, W\] with T >= 1, got \[2, "):
                model(frames(*shape))
            with pytest.raises(ValueError, match=r"clips must be \[B, T\] with T >= 1, got \[2"):
                model.embed(model.regions(frames(3)), torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="parts must be 1 to the 8 rows"):
        small(parts=9)(frames(1, 2))
    with pytest.raises(BackboneError, match="unknown backbone 'moon'"):
        small(backbone="moon", backbone_options=None)
