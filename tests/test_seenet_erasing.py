"""SeeNet's zones and its conditionally reversed unit, against what the official layer gives and gets back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gingham.methods.seenet.erasing import background_mask, conditional_relu, tag_attention, zone_mask

X = torch.arange(1.0, 13.0).reshape(1, 3, 2, 2)
FIRST = torch.tensor([[10.0, 5.0], [0.2, -3.0]])


def maps(*present: Tensor) -> tuple[Tensor, Tensor]:
    """Class maps [1, 20, 2, 2] of which the first ones are given and tagged; all others are -5."""
    scores, tags = torch.full((1, 20, 2, 2), -5.0), torch.zeros(1, 20)
    for kind, values in enumerate(present):
        scores[0, kind], tags[0, kind] = values, 1
    return scores, tags


def unit(high: float, low: float, *present: Tensor, norm: str = "range", leaky: bool = False, x: Tensor = X) -> Tensor:
    attention = tag_attention(*maps(*present), norm=norm)  # type: ignore[arg-type]
    return conditional_relu(x, zone_mask(attention, high, low), leaky_backward=leaky)


@pytest.mark.parametrize(
    ("high", "low", "signs"),
    [(0.8, 0.0, [0, 1, 1, 1]), (0.8, 0.05, [0, 1, -1, -1]), (0.7, 0.05, [0, 1, -1, -1])],
)
def test_the_unit_gives_what_the_official_layer_gives(high: float, low: float, signs: list[int]) -> None:
    assert torch.equal(unit(high, low, FIRST).flatten(2), X.flatten(2) * torch.tensor(signs))


@pytest.mark.parametrize("present", [(-FIRST.abs(),), (), (torch.full((2, 2), 4.0),)], ids=["negative", "none", "flat"])
def test_without_any_attention_all_is_background(present: tuple[Tensor, ...]) -> None:
    assert torch.equal(unit(0.7, 0.05, *present), -X)
    assert torch.equal(unit(0.8, 0.0, *present), X)


def test_a_flat_map_is_all_attended_where_its_maximum_counts() -> None:
    assert torch.equal(unit(0.7, 0.05, torch.full((2, 2), 4.0), norm="max"), torch.zeros_like(X))


def test_any_of_two_classes_erases() -> None:
    second = torch.tensor([[0.0, 0.0], [0.0, 8.0]])
    assert torch.equal(unit(0.7, 0.05, FIRST, second).flatten(2), X.flatten(2) * torch.tensor([0, 1, -1, 0]))


def test_the_gradient_has_the_sign_of_the_zone_in_every_channel() -> None:
    x = X.clone().requires_grad_()
    unit(0.8, 0.05, FIRST, x=x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1.0, -1.0, -1.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2))


def test_the_official_layer_lets_gradients_through_at_erased_places() -> None:
    x = X.clone().requires_grad_()
    output = unit(0.8, 0.05, FIRST, leaky=True, x=x)
    assert torch.equal(output.detach(), unit(0.8, 0.05, FIRST))
    output.sum().backward()
    assert x.grad.flatten(2).tolist() == [[[0, 1, -1, -1], [1, 1, -1, -1], [1, 1, -1, -1]]]


def test_the_unit_has_first_and_second_derivatives() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.randint(-1, 2, (2, 4, 5), dtype=torch.int8)
    assert torch.autograd.gradcheck(conditional_relu, (x, mask))
    assert torch.autograd.gradgradcheck(conditional_relu, (x, mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_unit_keeps_the_type_of_its_features(dtype: torch.dtype) -> None:
    mask = zone_mask(tag_attention(*maps(FIRST)), 0.8, 0.05)
    assert torch.equal(conditional_relu(X.to(dtype), mask), conditional_relu(X, mask).to(dtype))


sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 7), st.integers(0, 2**16))


@given(sizes)
def test_zones_part_every_image_and_images_do_not_know_of_each_other(size: tuple[int, int, int, int, int]) -> None:
    batch, classes, rows, columns, seed = size
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, classes, rows, columns, generator=generator) * 3
    tags = torch.randint(2, (batch, classes), generator=generator)
    x = torch.randn(batch, 3, rows, columns, generator=generator)
    attention = tag_attention(scores, tags)
    mask = zone_mask(attention, 0.7, 0.05)
    assert attention.min() >= 0 and attention.max() <= 1
    assert sum(int((mask == value).sum()) for value in (-1, 0, 1)) == batch * rows * columns
    output = conditional_relu(x, mask)
    assert (output.abs() <= x.clamp(min=0)).all()
    alone = [
        conditional_relu(x[i : i + 1], zone_mask(tag_attention(scores[i : i + 1], tags[i : i + 1]), 0.7, 0.05))
        for i in range(batch)
    ]
    assert torch.equal(output, torch.cat(alone))
    # Classes that are not tagged have no say, whatever their logits.
    other = torch.where((tags > 0)[..., None, None], scores, 1e4 * torch.randn(scores.shape, generator=generator))
    assert torch.equal(tag_attention(other, tags), attention)


def test_scale_never_matters_and_an_offset_only_to_the_maximum() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 4, 5, 7, generator=generator) + 0.1
    tags = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]])
    for norm in ("range", "max"):
        mask = zone_mask(tag_attention(scores, tags, norm=norm), 0.7, 0.3)  # type: ignore[arg-type]
        scaled = zone_mask(tag_attention(37 * scores, tags, norm=norm), 0.7, 0.3)  # type: ignore[arg-type]
        moved = zone_mask(tag_attention(scores + 5, tags, norm=norm), 0.7, 0.3)  # type: ignore[arg-type]
        assert torch.equal(mask, scaled)
        assert torch.equal(mask, moved) == (norm == "range")


def test_thresholds_at_the_ends_leave_zones_out() -> None:
    attention = tag_attention(torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(1)), torch.ones(2, 3))
    assert (zone_mask(attention, 1.0, 0.3) != 0).all() and (zone_mask(attention, 0.7, 0.0) != -1).all()
    assert (zone_mask(attention, 2.0, -0.2) == 1).all()
    for value in (0, 1):
        zones = zone_mask(attention, 0.7, 0.3, background=value)  # type: ignore[arg-type]
        assert (zones[attention < 0.3] == value).all() and (zones != -1).all()


def test_the_background_branch_sees_what_is_below_its_threshold() -> None:
    attention = torch.tensor([[[0.0, 0.374, 0.375, 1.0]]])
    assert background_mask(attention, 0.375).tolist() == [[[1, 1, 0, 0]]]


def test_masks_carry_no_gradient() -> None:
    scores = torch.randn(1, 3, 4, 5, requires_grad=True)
    attention = tag_attention(scores, torch.ones(1, 3))
    assert not attention.requires_grad and not zone_mask(attention, 0.7, 0.05).requires_grad


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"tags must be \[B, C\].*\[1, 3\]"):
        tag_attention(torch.zeros(1, 4, 2, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="norm must be"):
        tag_attention(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4), norm="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"low at most high, got \(0.1, 0.7\)"):
        zone_mask(torch.zeros(1, 2, 2), 0.1, 0.7)
    with pytest.raises(ValueError, match="background must be -1, 0 or 1"):
        zone_mask(torch.zeros(1, 2, 2), 0.7, 0.1, background=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask must be \[B, h, w\].*\[1, 3, 2\]"):
        conditional_relu(torch.zeros(1, 4, 2, 3), torch.zeros(1, 3, 2))
