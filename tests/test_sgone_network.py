"""SG-One's network: its layers and sizes, how supports guide it, what it is compared with, weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gingham import create_model
from gingham.errors import CheckpointError
from gingham.methods.sgone.network import VGG16, SGOne
from gingham.nn.backbone import BackboneError

SMALL: dict[str, Any] = {
    "backbone": "small",
    "output_stride": 4,
    "guidance_channels": 12,
    "side_channels": 8,
    "backbone_options": {"widths": [8, 12, 16, 16]},
}


def small(**options: Any) -> SGOne:
    torch.manual_seed(0)
    return SGOne(**{**SMALL, **options}).eval()


def episode(batch: int = 1, shots: int = 1, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, supports and masks; the supports are larger than the queries, and wide where these are high."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, 3, 48, 32, generator=generator)
    support = torch.randn(batch, shots, 3, 40, 56, generator=generator)
    mask = torch.zeros(batch, shots, 1, 40, 56, dtype=torch.bool)
    for sample in range(batch):
        for shot in range(shots):
            mask[sample, shot, 0, 4 + 3 * sample : 20 + 2 * shot, 8 + 4 * shot : 30] = True
    return query, support, mask


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------------------------------ layers


def test_default_network_has_the_parameters_of_the_official_one() -> None:
    with torch.device("meta"):
        model = SGOne()
    assert count(model) == 18_992_194
    assert count(model.backbone) == 14_714_688
    assert count(model.guidance_layer) == 2_359_808
    assert [count(layer) for layer in (model.side3, model.side4, model.side5)] == [295_040, 737_408, 737_408]
    assert count(model.refine) == 147_584 and count(model.exit) == 258


@pytest.mark.parametrize(("legacy", "exit_size"), [(False, (41, 47)), (True, (43, 49))])
def test_sizes_of_a_query_of_321_x_375(legacy: bool, exit_size: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = SGOne(legacy_exit_padding=legacy)
        stages = model.stages(torch.empty(1, 3, 321, 375))
        assert [tuple(x.shape[1:]) for x in stages] == [(256, 41, 47), (512, 41, 47), (512, 41, 47)]
        assert model.guidance_layer(stages[-1]).shape == (1, 512, 41, 47)
        logits = model.segment(stages, torch.empty(1, 1, 41, 47))
    assert logits.shape == (1, 2, *exit_size)


@pytest.mark.parametrize(("pixels", "cells"), [(321, 41), (375, 47), (500, 63), (224, 28)])
def test_each_stride_halves_and_rounds_up(pixels: int, cells: int) -> None:
    with torch.device("meta"):
        assert VGG16()(torch.empty(1, 3, pixels, 32))[-1].shape[-2:] == (cells, 4)


def test_vgg_has_3x3_pools_and_no_dilation() -> None:
    with torch.device("meta"):
        layers = list(VGG16().modules())
    pools = [layer for layer in layers if isinstance(layer, nn.MaxPool2d)]
    assert [(pool.kernel_size, pool.stride, pool.padding) for pool in pools] == [(3, 2, 1)] * 3 + [(3, 1, 1)] * 2
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 13 and {layer.dilation for layer in convolutions} == {(1, 1)}
    assert not any(isinstance(layer, nn.BatchNorm2d | nn.Dropout) for layer in layers)


def test_features_that_are_compared_are_of_both_signs_and_new_layers_begin_as_in_the_official_code() -> None:
    model = small()
    for layer in (model.guidance_layer, model.side3, model.side4, model.side5):
        assert not layer.bias.any()
        fans = layer.weight.shape[0] * 9 + layer.weight.shape[1] * 9
        bound = (6 / fans) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound
    assert model.refine.bias.any() and model.exit.bias.any()
    features, _ = model.support(*episode()[1:])
    assert 0.2 < (features < 0).float().mean() < 0.8


def test_a_padded_exit_is_the_bias_alone_on_its_ring() -> None:
    model = small(legacy_exit_padding=True)
    logits = model(*episode()).logits
    assert logits.shape == (1, 2, 14, 10)
    ring = torch.cat([logits[0, :, 0], logits[0, :, -1], logits[0, :, :, 0], logits[0, :, :, -1]], dim=1)
    torch.testing.assert_close(ring, model.exit.bias[:, None].expand_as(ring))
    model.exit.padding = (0, 0)
    torch.testing.assert_close(logits[..., 1:-1, 1:-1], model(*episode()).logits)


# ------------------------------------------------------------------------------------------------ guidance


def test_the_similarity_is_that_of_the_golden_case() -> None:
    model = SGOne(**SMALL)
    features = ((torch.arange(18, dtype=torch.float64) - 8) / 4).reshape(1, 1, 3, 2, 3)
    mask = torch.zeros(1, 1, 1, 8, 12, dtype=torch.float64)
    mask[..., 1:5, 2:9] = 1
    query = torch.arange(18, dtype=torch.float64).sin().reshape(1, 3, 2, 3)
    found = model.similarity(query, features, mask)
    expected = [[-0.581502, -0.314577, -0.022887], [0.408349, 0.393224, 0.056270]]
    torch.testing.assert_close(found[0, 0], torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    other = SGOne(**SMALL, resize="mask").similarity(query, features, mask)
    assert (found - other).abs().max() > 1e-3


def test_the_similarity_of_an_image_with_its_own_object_is_higher_inside() -> None:
    model = small()
    image = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(3)) * 0.2
    image[..., 8:32, 16:48] += torch.tensor([2.0, -1.5, 1.0])[:, None, None]
    mask = torch.zeros(1, 1, 1, 48, 64)
    mask[..., 8:32, 16:48] = 1
    similarity = model(image, image[:, None], mask).similarity[0, 0]
    inside = torch.zeros(12, 16, dtype=torch.bool)
    inside[2:8, 4:12] = True
    assert similarity[inside].mean() > similarity[~inside].mean() + 0.05
    assert similarity.abs().max() <= 1 + 1e-6


def test_without_similarity_logits_do_not_depend_on_the_query() -> None:
    model = small()
    none = torch.zeros(1, 1, 12, 8)
    first, second = (model.segment(model.stages(episode(seed=seed)[0]), none) for seed in (1, 2))
    assert torch.equal(first, second)
    with_one = model.segment(model.stages(episode()[0]), none + 1)
    assert not torch.equal(first, with_one)


def test_the_similarity_multiplies_features_as_it_is() -> None:
    model = small()
    stages = model.stages(episode()[0])
    model.refine = nn.Identity()
    model.exit = nn.Identity()
    positive = model.segment(stages, torch.full((1, 1, 12, 8), 0.5))
    negative = model.segment(stages, torch.full((1, 1, 12, 8), -0.5))
    assert not (positive * negative).any() and positive.any() and negative.any()  # a negative one changes the sign
    torch.testing.assert_close(positive, model.segment(stages, torch.ones(1, 1, 12, 8)) / 2)


def test_query_and_support_do_not_change_places() -> None:
    model = small()
    query, support, mask = episode()
    swapped = model(support[:, 0], query[:, None], torch.ones(1, 1, 1, 48, 32)).similarity
    assert swapped.shape == (1, 1, 10, 14)
    assert model(query, support, mask).similarity.shape == (1, 1, 12, 8)
    other = model(query, support, torch.ones_like(mask)).similarity
    assert not torch.equal(model(query, support, mask).similarity, other)


def test_the_order_of_supports_does_not_matter_and_copies_are_one() -> None:
    model = small()
    query, support, mask = episode(batch=2, shots=3)
    found = model(query, support, mask).logits
    torch.testing.assert_close(model(query, support.flip(1), mask.flip(1)).logits, found)
    single = model(query, support[:, :1], mask[:, :1]).logits
    copies = model(query, support[:, [0, 0, 0]], mask[:, [0, 0, 0]]).logits
    torch.testing.assert_close(copies, single)
    assert (single - found).abs().max() > 1e-4


def test_vectors_are_averaged_as_they_are() -> None:
    model = small()
    features = torch.zeros(1, 2, 2, 1, 1)
    features[0, 0, 0], features[0, 1, 1] = 10.0, 1.0
    query = torch.eye(2).reshape(1, 2, 1, 2)  # along the first axis, and along the second
    found = model.similarity(query, features, torch.ones(1, 2, 1, 1, 1)).flatten()
    torch.testing.assert_close(found, torch.tensor([10.0, 1.0]) / 101**0.5)


def test_supports_of_several_sizes_come_as_a_list() -> None:
    model = small()
    query, support, mask = episode(batch=2, shots=2)
    together = model(query, support, mask).logits
    torch.testing.assert_close(model(query, list(support.unbind(1)), list(mask.unbind(1))).logits, together)
    other, other_mask = episode(batch=2, seed=5)[0], torch.ones(2, 1, 48, 32, dtype=torch.bool)
    several = model(query, [support[:, 0], other], [mask[:, 0], other_mask])
    turned = model(query, [other, support[:, 0]], [other_mask, mask[:, 0]])
    torch.testing.assert_close(several.logits, turned.logits)


def test_episodes_of_a_batch_do_not_touch_each_other() -> None:
    model = small()
    query, support, mask = episode(batch=3, shots=2)
    together = model(query, support, mask)
    for index in range(3):
        one = model(*(x[index, None] for x in (query, support, mask)))
        torch.testing.assert_close(one.logits[0], together.logits[index])
        torch.testing.assert_close(one.similarity[0], together.similarity[index])


def test_an_empty_mask_has_no_similarity() -> None:
    model = small().train()
    query, support, mask = episode()
    output = model(query, support, torch.zeros_like(mask))
    assert not output.similarity.any()
    output.logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_both_branches_learn_from_a_query() -> None:
    model = small().train()
    query, support, mask = episode(batch=2)
    support.requires_grad_()
    model(query, support, mask).logits.square().sum().backward()
    assert support.grad is not None and support.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


# ------------------------------------------------------------------------------------------------ other guidance


def test_other_guidance_looks_at_less() -> None:
    query, support, mask = episode()
    changed = torch.where(mask, support, torch.randn(support.shape))  # outside the mask only
    everything = torch.ones_like(mask)

    def reacts(guidance: str) -> tuple[bool, bool]:
        model = small(guidance=guidance)
        found = model(query, support, mask).logits
        to_outside = not torch.equal(found, model(query, changed, mask).logits)
        return to_outside, not torch.equal(found, model(query, support, everything).logits)

    assert reacts("none") == (False, False)
    assert reacts("global") == (True, False)
    assert reacts("blanked") == (False, True)
    assert reacts("masked") == (True, True)  # convolutions see the surroundings of the object
    alone = small(guidance="none").train()
    output = alone(query, support, mask)
    assert output.similarity.eq(1).all()
    output.logits.sum().backward()
    assert all(p.grad is not None for p in alone.parameters())  # several processes wait for every gradient
    full = small(guidance="global")(query, support, mask).logits
    torch.testing.assert_close(full, small()(query, support, everything).logits)
    assert small(guidance="blanked")(query, [support[:, 0]], [mask[:, 0]]).logits.shape == (1, 2, 12, 8)


def test_guidance_can_be_standardised() -> None:
    model = small(guidance_norm=True).train()
    _, support, mask = episode(batch=4)
    features, _ = model.support(support, mask)
    torch.testing.assert_close(features.mean(dim=(0, 1, 3, 4)), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.var(dim=(0, 1, 3, 4), correction=0), torch.ones(12), atol=1e-2, rtol=0)
    assert count(model) == count(small())


# ------------------------------------------------------------------------------------------------ backbones and weights


def test_any_timm_network_takes_the_place_of_vgg() -> None:
    query, support, mask = episode()
    for stride, size in ((8, (6, 4)), (32, (6, 4))):  # coarser stages are brought to the size of the first
        torch.manual_seed(0)
        options = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
        model = SGOne("resnet18", output_stride=stride, guidance_channels=8, side_channels=8, backbone_options=options)
        assert model.eval()(query, support, mask).logits.shape == (1, 2, *size)


def test_imagenet_weights_are_taken_by_their_order(tmp_path: Path) -> None:
    # The places of the convolutions in torchvision's list of layers; what is behind them is left where it is.
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    widths = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    state = {}
    for place, channels, width in zip(places, widths[:-1], widths[1:], strict=True):
        state[f"features.{place}.weight"] = torch.full((width, channels, 3, 3), place + 0.5)
        state[f"features.{place}.bias"] = torch.full((width,), float(place))
    torch.save({**state, "classifier.0.bias": torch.zeros(4096)}, tmp_path / "vgg16.pth")
    network = VGG16()
    network.load_weights(str(tmp_path / "vgg16.pth"))
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.bias[0].item() for layer in convolutions] == list(places)
    assert [layer.weight[-1, -1, 1, 2].item() for layer in convolutions] == [place + 0.5 for place in places]
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other.pth: no VGG-16"):
        network.load_weights(str(tmp_path / "other.pth"))
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        network.load_weights(str(tmp_path / "missing.pth"))
    with pytest.raises(CheckpointError, match="'vgg16' has no weights 'moon'"):
        network.load_weights("moon")


def test_options_that_vgg_does_not_have_are_named() -> None:
    with pytest.raises(BackboneError, match="'vgg16' has output_stride 8 and no options, got 16"):
        SGOne(output_stride=16)
    with pytest.raises(BackboneError, match="unknown backbone 'moon'"):
        SGOne("moon")


@pytest.mark.parametrize(
    "options", [{"guidance_channels": 0}, {"side_channels": 0}, {"guidance": "boxes"}, {"resize": "both"}], ids=str
)
def test_options_outside_their_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        small(**options)


def test_supports_that_do_not_fit_are_named() -> None:
    query, support, mask = episode(shots=2)
    model = small()
    with pytest.raises(ValueError, match=r"support must be \[B, K, 3, H, W\].*, got \[1, 3, 40, 56\]"):
        model(query, support[:, 0], mask)
    for images, masks in ((support, list(mask.unbind(1))), (list(support.unbind(1)), [mask[:, 0]])):
        with pytest.raises(ValueError, match="both tensors or both lists, of as many shots"):
            model(query, images, masks)
    with pytest.raises(ValueError, match="mask must be"):
        model(query, support, mask[:, :1])


def test_a_saved_model_gives_the_same_again(tmp_path: Path) -> None:
    model = create_model("sgone", **SMALL)
    model.save_pretrained(tmp_path / "saved")
    again = SGOne.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(*episode()).logits, model.eval()(*episode()).logits)


def test_bfloat16_is_close_to_float32() -> None:
    model = small()
    expected = model(*episode()).similarity
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*episode()).similarity
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
