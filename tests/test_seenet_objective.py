"""SeeNet's losses, its fused attention and its seed labels, against the specification's numbers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gingham.methods.seenet.attention import attend, scaled_to_maximum
from gingham.methods.seenet.network import SeeNet, SeeNetOutput
from gingham.methods.seenet.objective import branch_losses, tag_loss
from gingham.methods.seenet.seeds import SeedRule, confident_labels, harmonic_labels, harmonic_mean

TAGS = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])


# ------------------------------------------------------------------------------------------------ losses


def test_all_logits_zero_cost_log_two_a_branch() -> None:
    maps = torch.zeros(2, 20, 3, 5)
    terms = branch_losses(SeeNetOutput(maps, maps, maps, None), torch.ones(2, 20))
    assert [round(float(term), 4) for term in terms] == [0.6931] * 3
    assert float(sum(terms)) == pytest.approx(2.0794, abs=1e-4)


def test_the_gradient_is_the_same_at_every_place_of_a_map() -> None:
    maps = torch.randn(2, 4, 3, 5, dtype=torch.float64).requires_grad_()
    tag_loss(maps, TAGS).backward()
    expected = (torch.sigmoid(maps.detach().float().mean((-2, -1))) - TAGS) / (4 * 3 * 5 * 2)
    torch.testing.assert_close(maps.grad.float(), expected[..., None, None].expand(2, 4, 3, 5))


def test_the_background_shall_have_no_class() -> None:
    maps = torch.randn(2, 4, 3, 5)
    terms = branch_losses(SeeNetOutput(maps, maps, maps, None), TAGS)
    torch.testing.assert_close(terms.background, F.softplus(maps.mean((-2, -1))).mean())
    assert terms.attended == terms.potential != terms.background
    alone = branch_losses(SeeNetOutput(maps, None, None, None), TAGS)
    assert alone.attended == terms.attended and alone.potential == alone.background == 0


def test_the_loss_names_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"tags must be \[B, C\].*\[2, 4\]"):
        tag_loss(torch.zeros(2, 5, 3, 3), TAGS)


# ------------------------------------------------------------------------------------------------ attention


def network(**options: Any) -> SeeNet:
    torch.manual_seed(0)
    small = {"backbone": "small", "num_classes": 4, "output_stride": 4, "head_channels": 8, "head_std": None}
    return SeeNet(**small | {"backbone_options": {"widths": [8, 8]}} | options).eval()  # type: ignore[arg-type]


class Maps(nn.Module):
    """A network that has the given maps for whatever picture."""

    def __init__(self, attended: Tensor, potential: Tensor | None = None) -> None:
        super().__init__()
        self.maps = SeeNetOutput(attended, potential, None, None)

    def forward(self, images: Tensor, tags: Tensor) -> SeeNetOutput:
        return self.maps


def test_attention_is_largest_at_one_and_nothing_where_nothing_is_positive() -> None:
    images = torch.randn(2, 3, 40, 56)
    maps = attend(network(), images, TAGS, size=48).maps
    assert maps.shape == (2, 4, 40, 56) and maps.min() >= 0 and maps.max() <= 1
    assert not maps[TAGS == 0].any()
    top = maps[TAGS > 0].amax((-2, -1))
    assert ((top - 1).abs() < 1e-6).all()
    dark = attend(Maps(-torch.ones(1, 4, 3, 3)), images[:1], TAGS[:1]).maps
    assert not dark.any() and not dark.isnan().any()


def test_a_mirrored_picture_has_mirrored_attention() -> None:
    images = torch.randn(2, 3, 40, 56)
    maps = attend(network(), images, TAGS, size=48).maps
    mirrored = attend(network(), images.flip(-1), TAGS, size=48).maps
    torch.testing.assert_close(mirrored.flip(-1), maps, atol=1e-4, rtol=0)
    alone = attend(network(), images, TAGS, size=48, flip=False).maps
    assert not torch.allclose(attend(network(), images.flip(-1), TAGS, size=48, flip=False).maps.flip(-1), alone)
    assert (maps >= alone - 1e-6).all()


def test_fused_attention_is_never_below_its_parts() -> None:
    made, images = network(), torch.randn(2, 3, 40, 56)
    fused = attend(made, images, TAGS, size=None).maps
    output, turned = made(images, TAGS), made(images.flip(-1), TAGS)
    parts = [
        scaled_to_maximum(F.interpolate(maps, (40, 56), mode="bicubic"))
        for maps in (output.attended, output.potential, turned.attended, turned.potential)
    ]
    parts[2:] = [part.flip(-1) for part in parts[2:]]
    expected = torch.stack(parts).amax(0) * TAGS[..., None, None]
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=0)


def test_maps_are_resized_before_they_are_clipped() -> None:
    raw = torch.tensor([[-4.0, 1.0, 4.0, -2.0, 3.0]]).expand(4, 5)[None, None]
    found = attend(Maps(raw), torch.zeros(1, 3, 8, 20), torch.ones(1, 1), flip=False).maps
    large = F.interpolate(raw, (8, 20), mode="bicubic")
    torch.testing.assert_close(found, scaled_to_maximum(large))
    clipped_first = scaled_to_maximum(F.interpolate(raw.clamp(min=0), (8, 20), mode="bicubic"))
    assert not torch.allclose(found, clipped_first, atol=1e-2)


def test_zones_of_one_class_differ_only_where_there_are_several() -> None:
    made = network(test_thresholds=(0.5, 0.1))
    made.potential[-1].bias.data += 5  # so that its maps are positive
    images = torch.randn(2, 3, 40, 56)
    together = attend(made, images, TAGS, size=None, flip=False).maps
    one_by_one = attend(made, images, TAGS, size=None, flip=False, per_class=True).maps
    torch.testing.assert_close(together[1], one_by_one[1])  # one tag
    assert (together[0] - one_by_one[0]).abs().max() > 1e-4  # two


def test_logits_are_those_of_the_first_branch() -> None:
    made, images = network(), torch.randn(2, 3, 40, 56)
    torch.testing.assert_close(attend(made, images, TAGS, size=None).logits, made(images).attended.mean((-2, -1)))


def test_pictures_without_tags_have_no_attention() -> None:
    for per_class in (False, True):
        found = attend(network(), torch.randn(2, 3, 40, 56), torch.zeros(2, 4), size=32, per_class=per_class)
        assert found.maps.shape == (2, 4, 40, 56) and not found.maps.any()
    with pytest.raises(ValueError, match=r"tags must be \[B, C\]"):
        attend(network(), torch.zeros(2, 3, 8, 8), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="size must be 1 pixel or more, got 0"):
        attend(network(), torch.zeros(2, 3, 8, 8), TAGS, size=0)


# ------------------------------------------------------------------------------------------------ seeds


def blob(rows: int = 20, columns: int = 30) -> tuple[Tensor, Tensor]:
    """A batch of two classes' attention [2, 4, H, W] and saliency [2, H, W] around the same places."""
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(2, 4, rows, columns, generator=generator)
    return attention, torch.rand(2, rows, columns, generator=generator)


@pytest.mark.parametrize("make", [confident_labels, harmonic_labels])
def test_labels_are_of_tagged_classes(make: Any) -> None:
    attention, saliency = blob()
    for given in (saliency, None):
        labels = make(attention, TAGS, given)
        assert labels.shape == (2, 20, 30) and labels.dtype == torch.int64
        assert set(labels[0].unique().tolist()) <= {0, 1, 4, 255} and set(labels[1].unique().tolist()) <= {0, 2, 255}
        alone = make(attention[1:], TAGS[1:], None if given is None else given[1:])
        assert torch.equal(alone[0], labels[1])


def test_salient_pixels_without_attention_are_left_open() -> None:
    rule = SeedRule(least_share=0.0)  # so that nothing but the saliency leaves them open
    given = torch.zeros(1, 1, 8, 9), torch.ones(1, 1), torch.full((1, 8, 9), 0.5)
    assert (confident_labels(*given, rule=rule) == 255).all()
    assert (confident_labels(*given, rule=replace(rule, salient=0.6)) == 0).all()


def test_an_image_without_confident_objects_says_nothing() -> None:
    nothing = torch.zeros(1, 1, 8, 9), torch.ones(1, 1), torch.zeros(1, 8, 9)
    assert (confident_labels(*nothing) == 255).all()
    assert (confident_labels(*nothing, rule=SeedRule(least_share=0.0)) == 0).all()


def test_pixels_that_two_are_sure_of_are_left_open() -> None:
    attention = torch.zeros(1, 2, 2, 4)
    attention[0, 0, 0], attention[0, 1, 0] = torch.tensor([1.0, 0.95, 0.0, 0.5]), torch.tensor([0.95, 0.0, 1.0, 0.0])
    saliency = torch.tensor([[[1.0, 0.05, 0.5, 0.9], [0.0] * 4]])
    found = confident_labels(attention, torch.ones(1, 2), saliency)
    # Both classes; background and a class; one class; one class, less sure; then the background that is not salient.
    assert found.tolist() == [[[255, 255, 2, 1], [0, 0, 0, 0]]]


def test_the_rule_is_that_of_the_public_script() -> None:
    attention, saliency = blob()
    expected = torch.stack([script_labels(*one) for one in zip(attention, TAGS, saliency, strict=True)])
    assert torch.equal(confident_labels(attention, TAGS, saliency), expected)
    assert len(expected.unique()) >= 4


def script_labels(attention: Tensor, tags: Tensor, saliency: Tensor) -> Tensor:
    """The rule pixel by pixel, as the specification words it."""
    result = torch.zeros(saliency.shape, dtype=torch.int64)
    kinds = tags.nonzero().flatten().tolist()
    scaled = {c: (attention[c] - attention[c].min()) / (attention[c].max() - attention[c].min() + 1e-8) for c in kinds}
    for place in torch.cartesian_prod(*(torch.arange(n) for n in saliency.shape)).tolist():
        y, x = place
        scores = {0: 1 - saliency[y, x].item()} | {c + 1: scaled[c][y, x].item() for c in kinds}
        scores = {c: 0.0 if s < 0.3 else s for c, s in scores.items()}
        label = max(scores, key=lambda c: scores[c])  # the first of equals
        if sum(s > 0.9 for s in scores.values()) > 1:
            label = 255
        attended = any(scaled[c][y, x] > 0.8 for c in kinds)
        if label == 0 and (attended or saliency[y, x] >= 32 / 255):
            label = 255
        result[y, x] = label
    if ((result > 0) & (result < 255)).float().mean() < 0.01:
        result[:] = 255
    return result


def test_the_harmonic_mean_lies_between_its_two() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 500, generator=generator)
    for weight in (0.5, 1.0, 3.0):
        mean = harmonic_mean(first, second, weight)
        assert (mean >= torch.minimum(first, second) - 1e-6).all()
        assert (mean <= torch.maximum(first, second) + 1e-6).all()
        torch.testing.assert_close(mean, (weight + 1) / (weight / first + 1 / second))
    torch.testing.assert_close(harmonic_mean(first, first), first)
    torch.testing.assert_close(harmonic_mean(first, second), harmonic_mean(second, first))
    assert not harmonic_mean(first, torch.zeros(500)).any() and not harmonic_mean(torch.zeros(500), first).any()


def test_seeds_name_what_does_not_fit() -> None:
    attention, saliency = blob()
    with pytest.raises(ValueError, match=r"saliency must be \[B, H, W\].*\[2, 30, 20\]"):
        confident_labels(attention, TAGS, saliency.mT)
    with pytest.raises(ValueError, match=r"tags must be \[B, C\]"):
        harmonic_labels(attention, TAGS[:, :2], saliency)
    with pytest.raises(ValueError, match="weight must be above 0, got 0"):
        harmonic_labels(attention, TAGS, saliency, weight=0)
    with pytest.raises(ValueError, match="sure must be between 0 and 1"):
        SeedRule(sure=1.5)
