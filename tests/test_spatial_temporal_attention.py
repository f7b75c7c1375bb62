"""Spatial-temporal attention against its definition in float64 and against golden numbers, in every room."""

from __future__ import annotations

import io
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gingham import array, info, reference
from gingham.nn import SpatialTemporalAttention, interframe_regularization
from gingham.ops import spatial_temporal_attention, spatial_temporal_attention_from_sums, spatial_temporal_sums
from oracles.conditions import kernels_of, run_python, threads
from oracles.layouts import LAYOUTS, channels_last, contiguous, every_other_column, sliced, transposed

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ENERGIES = ["sq", "l2", "agrl"]
NAMES = ("pooled", "scores", "map")  # that have gradients
Layout = Callable[[Tensor], Tensor]

operator = torch.ops.gingham.spatial_temporal_attention.default
backward_operator = torch.ops.gingham.spatial_temporal_attention_backward.default


def counted(*shape: int) -> Tensor:
    """The deterministic features of the specification, in float64."""
    return ((37 * torch.arange(math.prod(shape)) % 101).double() / 100).reshape(shape)


def clips(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", layout: Layout = contiguous, seed: int = 0
) -> Tensor:
    """Random features [B, T, C, H, W], of any sign."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(shape, generator=generator).to(device, dtype)
    if layout is contiguous:
        return features
    return layout(features.transpose(1, 2)).transpose(1, 2)  # layouts know of maps [B, C, *S]


def frames_within_channels(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)  # of [B, C, T, H, W]


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def upstream(features: Tensor, parts: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pooled, scores and map."""
    batch, length, channels, height, width = features.shape
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, 2 * channels), (batch, length, parts), (batch, length, height, width)
    kinds = features.dtype, sums_dtype(features.dtype), sums_dtype(features.dtype)
    return tuple(  # type: ignore[return-value]
        torch.randn(shape, generator=generator).to(features.device, kind)
        for shape, kind in zip(shapes, kinds, strict=True)
    )


def run(function: Callable[..., Any], features: Tensor, parts: int, grads: Any, **options: Any) -> dict[str, Tensor]:
    """Results and the gradient of the features, which may be a view of any kind. Gradients may be None."""
    leaf = features.detach().requires_grad_()
    pooled, scores, frames, attention = function(leaf, parts, return_map=True, **options)
    given = [(x, grad) for x, grad in zip((pooled, scores, attention), grads, strict=True) if grad is not None]
    (gradient,) = torch.autograd.grad([x for x, _ in given], leaf, [grad for _, grad in given])
    results = {"pooled": pooled, "scores": scores, "frames": frames, "map": attention}
    return {name: x.detach() for name, x in results.items()} | {"gradient": gradient}


def gradient_terms(
    features: Tensor,
    parts: int,
    grads: Any,
    energy: str = "sq",
    eps: float = 1e-12,
    detach_attention: bool = False,
) -> Tensor:
    """The size of the terms that make up the gradient of the features, of which much cancels: of a frame the largest.

    In the notation of the header: a score's gradient u, a share's v = (u - mean u) / part_total, and an energy's
    (v + r - mean) / total, where r is that of the map.
    """
    positions = features.size(3) * features.size(4)
    grad_pooled, grad_scores, grad_map = (torch.zeros(()) if grad is None else grad.abs() for grad in grads)
    sums, shares = reference.spatial_temporal_sums(features.abs().flatten(0, 1), parts, energy=energy, eps=eps)
    shares, sums = shares.unflatten(0, features.shape[:2]), sums.unflatten(0, features.shape[:2])
    both = (
        grad_pooled.reshape(len(features), 1, 1, 2, features.size(2))
        if grad_pooled.dim()
        else torch.zeros(1, 1, 1, 2, 1)
    )
    of_score = grad_scores + (0 if detach_attention else (both[..., 1, :] * sums).sum(dim=-1) / positions)
    of_share = 2 * (of_score / shares.sum(dim=1, keepdim=True).clamp(min=eps)).amax(dim=(1, 2))[:, None]  # [B, 1]
    of_map = of_share + (grad_map.amax(dim=(2, 3)) if grad_map.dim() else 0)
    norms = features.square().sum(dim=2, keepdim=True)
    totals = {
        "sq": norms.sum(dim=(2, 3, 4)),
        "l2": norms.sqrt().sum(dim=(2, 3, 4)),
        "agrl": norms.sum(dim=(2, 3, 4)).sqrt(),
    }[energy]
    slope = features.abs() if energy == "sq" else torch.where(norms > 0, features.abs() / norms.sqrt(), 0)
    through_scores = 4 * (of_map / totals.clamp(min=eps))[:, :, None, None, None] * slope
    direct = (both[..., 0, :] + both[..., 1, :])[:, 0, 0] / positions  # [B, C]
    return through_scores + direct[:, None, :, None, None]


def check(features: Tensor, parts: int, grads: Any = None, **options: Any) -> dict[str, Tensor]:
    """Runs the operator and compares each number with the definition in float64."""
    grads = upstream(features, parts) if grads is None else grads
    got = run(spatial_temporal_attention, features, parts, grads, **options)
    exact = features.detach().cpu().double()
    wide = [None if grad is None else grad.detach().cpu().double() for grad in grads]
    expected = run(reference.spatial_temporal_attention, exact, parts, wide, **options)
    terms = reference.spatial_temporal_attention(exact.abs(), parts, **options)[0]  # the scores know no sign
    assert torch.equal(got["frames"].cpu(), expected["frames"])
    # Rounding of n terms of one sign walks at random: 4 sqrt(n) epsilons of their sum are rarely passed.
    dtype, channels, positions = features.dtype, features.size(2), features.size(3) * features.size(4)
    walk = 4 * math.sqrt(channels + positions + features.size(1)) * torch.finfo(sums_dtype(dtype)).eps
    eps = torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).smallest_normal * eps
    bounds = {
        "pooled": eps * expected["pooled"].abs() + walk * terms + smallest,
        "scores": walk * expected["scores"] + 1e-30,
        "map": walk * expected["map"] + 1e-30,
        "gradient": eps * expected["gradient"].abs() + walk * gradient_terms(exact, parts, wide, **options) + smallest,
    }
    for name, bound in bounds.items():
        error = (got[name].cpu().double() - expected[name]).abs()
        assert got[name].shape == expected[name].shape
        assert got[name].dtype == (dtype if name in ("pooled", "gradient") else sums_dtype(dtype))
        assert bool((error <= bound).all()), f"{name}: {float((error / bound).nan_to_num(math.inf).max()):.2f} bounds"
    return got


# ------------------------------------------------------------------------------------------------ golden numbers

GOLDEN_SCORES = {
    "sq": [[0.294456346, 0.379213309], [0.381099090, 0.276963437], [0.324444564, 0.343823254]],
    "l2": [[0.308723813, 0.359554222], [0.355914023, 0.309274118], [0.335362164, 0.331171660]],
    "agrl": [[0.307513635, 0.358759023], [0.368548027, 0.320801773], [0.323938338, 0.320439204]],
}
GOLDEN_POOLED = {
    "sq": [0.59375, 0.52375, 0.493185587, 0.495327335],
    "l2": [0.59375, 0.52375, 0.487729754, 0.495751993],
    "agrl": [0.59375, 0.52375, 0.488090915, 0.497415735],
}


@pytest.mark.parametrize("function", [spatial_temporal_attention, reference.spatial_temporal_attention])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("energy", ENERGIES)
def test_each_energy_gives_its_golden_numbers(
    energy: str, dtype: torch.dtype, tolerance: float, function: Callable[..., Any]
) -> None:
    pooled, scores, frames = function(counted(1, 3, 2, 4, 2).to(dtype), 2, energy=energy)
    torch.testing.assert_close(scores[0], torch.tensor(GOLDEN_SCORES[energy], dtype=dtype), rtol=0, atol=tolerance)
    torch.testing.assert_close(pooled[0], torch.tensor(GOLDEN_POOLED[energy], dtype=dtype), rtol=0, atol=tolerance)
    assert frames.tolist() == [[1, 0]]
    assert frames.dtype == torch.int64


def test_distances_between_maps_are_golden() -> None:
    def distances(energy: str) -> list[float]:
        attention = spatial_temporal_attention(counted(1, 3, 2, 4, 2), 2, energy=energy, return_map=True)[3]
        pairs = ((0, 1), (0, 2), (1, 2))
        return [interframe_regularization(attention[:, list(pair)]).item() for pair in pairs]

    assert distances("sq") == pytest.approx([0.385434933, 0.485652283, 0.175741931], abs=1e-8)
    assert distances("l2")[0] == pytest.approx(0.251595650, abs=1e-8)


def test_the_gradient_of_a_distance_between_maps_is_golden() -> None:
    features = counted(1, 3, 2, 4, 2).requires_grad_()
    attention = spatial_temporal_attention(features, 2, return_map=True)[3]
    (gradient,) = torch.autograd.grad(interframe_regularization(attention[:, :2]), features)
    assert gradient.sum().item() == pytest.approx(-0.392922901, abs=1e-8)
    assert gradient.abs().sum().item() == pytest.approx(1.587017269, abs=1e-8)
    assert gradient[0, 0, 0, 0].tolist() == pytest.approx([0, -0.018682918], abs=1e-8)
    assert not gradient[0, 2].any()


def test_the_gradient_of_the_pooled_features_is_golden() -> None:
    features = counted(1, 3, 2, 4, 2).requires_grad_()
    loss = (spatial_temporal_attention(features, 2)[0] * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum()
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.item() == pytest.approx(5.102116100, abs=1e-8)
    assert gradient.sum().item() == pytest.approx(9.998420000, abs=1e-8)
    assert gradient[0, 0, 0, 0].tolist() == pytest.approx([0.110421130, 0.087861529], abs=1e-8)


def test_bands_share_no_row_where_parts_do_not_divide_the_rows() -> None:
    pooled, scores, _ = spatial_temporal_attention(counted(1, 2, 2, 7, 2), 3)
    golden = [[0.410719506, 0.480595715, 0.571222620], [0.589280494, 0.519404285, 0.428777380]]
    torch.testing.assert_close(scores[0], torch.tensor(golden, dtype=torch.float64), rtol=0, atol=1e-8)
    golden = [0.533571429, 0.519285714, 0.487942589, 0.503287353]
    torch.testing.assert_close(pooled[0], torch.tensor(golden, dtype=torch.float64), rtol=0, atol=1e-8)


def test_a_dead_frame_is_ignored() -> None:
    features = counted(1, 3, 2, 4, 2)
    features[:, 1] = 0
    features.requires_grad_()
    pooled, scores, _ = spatial_temporal_attention(features, 2)
    golden = [[0.475773005, 0.524473213], [0, 0], [0.524226995, 0.475526787]]
    torch.testing.assert_close(scores[0].detach(), torch.tensor(golden, dtype=torch.float64), rtol=0, atol=1e-8)
    (gradient,) = torch.autograd.grad(pooled.sum() + scores.square().sum(), features)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_clips_without_any_energy_give_zeros_and_no_gradient_through_the_scores(
    dtype: torch.dtype, energy: str
) -> None:
    features = torch.zeros(2, 3, 5, 4, 2, dtype=dtype)
    got = check(features, 2, energy=energy)
    assert not got["scores"].any()
    assert not got["pooled"].any()
    assert not got["map"].any()
    grads = (None, *upstream(features, 2)[1:])
    assert not check(features, 2, grads, energy=energy)["gradient"].any()


def test_an_occluded_part_loses_its_score_and_the_visible_one_gains_it() -> None:
    features = counted(1, 1, 2, 4, 2).repeat(1, 4, 1, 1, 1)
    features[:, 1, :, 2:] = 0
    _, scores, frames = spatial_temporal_attention(features, 2)
    other = [0.196414660, 1 / 3]
    golden = torch.tensor([other, [0.410756019, 0], other, other], dtype=torch.float64)
    torch.testing.assert_close(scores[0], golden, rtol=0, atol=1e-8)
    assert frames.tolist() == [[1, 0]]


# ------------------------------------------------------------------------------------------------ behaviour


@pytest.mark.parametrize("energy", ENERGIES)
def test_one_frame_has_all_the_score(energy: str) -> None:
    features = clips(2, 1, 6, 5, 3, dtype=torch.float64)
    pooled, scores, frames = spatial_temporal_attention(features, 3, energy=energy)
    torch.testing.assert_close(scores, torch.ones_like(scores))
    torch.testing.assert_close(pooled, features[:, 0].mean(dim=(2, 3)).repeat(1, 2))
    assert not frames.any()


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_frames_share_the_score_and_the_first_is_chosen(dtype: torch.dtype, energy: str) -> None:
    features = clips(2, 1, 37, 7, 3, dtype=dtype).expand(-1, 5, -1, -1, -1)
    pooled, scores, frames = spatial_temporal_attention(features, 3, energy=energy)
    torch.testing.assert_close(scores, torch.full_like(scores, 0.2), rtol=1e-6, atol=0)
    mean = features[:, 0].double().mean(dim=(2, 3)).repeat(1, 2)
    torch.testing.assert_close(pooled.double(), mean, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
    assert not frames.any()


def test_one_part_makes_an_average_of_the_literal_formula_but_not_of_agrls() -> None:
    features = counted(1, 3, 2, 4, 2)
    scores = spatial_temporal_attention(features, 1)[1]
    torch.testing.assert_close(scores, torch.full_like(scores, 1 / 3))
    scores = spatial_temporal_attention(features, 1, energy="agrl")[1].flatten()
    assert scores.tolist() == pytest.approx([0.332, 0.345, 0.322], abs=1e-3)


@pytest.mark.parametrize("energy", ["sq", "l2"])
def test_scores_of_a_part_sum_to_one_and_so_does_a_frames_map(energy: str) -> None:
    _, scores, _, attention = spatial_temporal_attention(clips(3, 5, 9, 7, 4), 3, energy=energy, return_map=True)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(3, 3))
    torch.testing.assert_close(attention.sum(dim=(2, 3)), torch.ones(3, 5))


def test_agrls_map_has_a_norm_of_one() -> None:
    attention = spatial_temporal_attention(clips(3, 5, 9, 7, 4), 3, energy="agrl", return_map=True)[3]
    torch.testing.assert_close(attention.square().sum(dim=(2, 3)), torch.ones(3, 5))


@pytest.mark.parametrize("energy", ENERGIES)
def test_the_scale_of_a_frame_changes_no_score(energy: str) -> None:
    features = clips(2, 3, 8, 6, 4, dtype=torch.float64)
    scaled = features * torch.tensor([0.01, 1.0, 300.0], dtype=torch.float64)[:, None, None, None]
    before, after = (spatial_temporal_attention(x, 3, energy=energy) for x in (features, scaled))
    torch.testing.assert_close(after[1], before[1])
    assert not torch.allclose(after[0], before[0])


@pytest.mark.parametrize("energy", ENERGIES)
def test_the_gradient_of_scores_is_orthogonal_to_each_frame(energy: str) -> None:
    features = clips(2, 3, 8, 6, 4, dtype=torch.float64).requires_grad_()
    _, scores, _, attention = spatial_temporal_attention(features, 3, energy=energy, return_map=True)
    _, grad_scores, grad_map = upstream(features, 3)
    (gradient,) = torch.autograd.grad((scores, attention), features, (grad_scores, grad_map))
    along = (features * gradient).sum(dim=(2, 3, 4))
    assert float(along.detach().abs().max()) < 1e-14 * float(gradient.abs().sum())


def test_frames_channels_columns_and_rows_may_be_permuted() -> None:
    features = clips(2, 4, 6, 6, 5, dtype=torch.float64)
    pooled, scores, frames = spatial_temporal_attention(features, 3)
    order = torch.tensor([2, 0, 3, 1])
    permuted = spatial_temporal_attention(features[:, order], 3)
    torch.testing.assert_close(permuted[0], pooled)
    torch.testing.assert_close(permuted[1], scores[:, order])
    assert torch.equal(order[permuted[2]], frames)
    torch.testing.assert_close(spatial_temporal_attention(features.flip(2), 3)[1], scores)
    for got, expected in zip(spatial_temporal_attention(features.flip(4), 3), (pooled, scores, frames), strict=True):
        torch.testing.assert_close(got, expected)
    flipped = spatial_temporal_attention(features.flip(3), 3)
    torch.testing.assert_close(flipped[1], scores.flip(2))
    torch.testing.assert_close(flipped[0], pooled)
    assert not torch.allclose(spatial_temporal_attention(features.transpose(3, 4), 3)[1], scores)


def test_half_precision_of_size_200_stays_finite() -> None:
    features = torch.full((1, 4, 2048, 16, 8), 200.0, dtype=torch.float16).requires_grad_()
    pooled, scores, _, attention = spatial_temporal_attention(features, 4, return_map=True)
    torch.testing.assert_close(scores, torch.full_like(scores, 0.25))
    torch.testing.assert_close(attention, torch.full_like(attention, 1 / 128))
    assert bool((pooled == 200).all())
    (gradient,) = torch.autograd.grad(pooled.sum(), features)
    assert bool(gradient.isfinite().all())


def test_detaching_leaves_pooled_its_direct_gradient_and_scores_theirs() -> None:
    features = clips(2, 3, 5, 6, 4, dtype=torch.float64)
    grad_pooled, grad_scores, grad_map = upstream(features, 3)
    for grads in ((grad_pooled, None, None), (grad_pooled, grad_scores, None), (grad_pooled, grad_scores, grad_map)):
        detached = check(features, 3, grads, detach_attention=True)["gradient"]
        attached = check(features, 3, grads)["gradient"]
        assert not torch.allclose(detached, attached)
    for grads in ((None, grad_scores, None), (None, None, grad_map)):
        detached = check(features, 3, grads, detach_attention=True)["gradient"]
        assert torch.equal(detached, check(features, 3, grads)["gradient"])


@pytest.mark.parametrize(
    "attend", [spatial_temporal_attention_from_sums, reference.spatial_temporal_attention_from_sums]
)
@pytest.mark.parametrize(
    ("energies", "frame"),
    [
        ([1.0, math.nan, 2.0, 2.0], 2),
        ([3.0, math.nan, 2.0, 3.0], 0),
        ([1.0, 2.0, 1.0, math.nan], 1),
        ([math.nan, 1.0, 2.0, 3.0], 0),
        ([math.nan, math.nan, math.nan, math.nan], 0),
        ([1.0, math.nan, math.inf, math.inf], 2),
    ],
)
def test_what_is_not_a_number_is_chosen_only_where_it_comes_first(
    attend: Callable[..., Any], energies: list[float], frame: int
) -> None:
    sums = torch.arange(4.0).reshape(1, 4, 1, 1)
    pooled, _, frames = attend(sums, torch.tensor(energies)[None, :, None], 1)
    assert frames.item() == frame
    assert pooled[0, 0] == frame


def test_what_is_not_a_number_spoils_its_own_clip_only() -> None:
    features = clips(3, 2, 5, 4, 3)
    features[1, 0, 2, 1, 1] = math.nan
    got = run(spatial_temporal_attention, features, 2, upstream(features, 2))
    assert bool(got["scores"][1].isnan().all())
    assert bool(got["pooled"][1, 5:].isnan().all())
    assert bool(((got["frames"] >= 0) & (got["frames"] < 2)).all())
    for name in (*NAMES, "gradient"):
        assert bool(got[name][[0, 2]].isfinite().all())


# ------------------------------------------------------------------------------------------------ sizes and layouts

SIZES = [
    ((2, 3, 33, 16, 8), 4),
    ((1, 4, 300, 7, 7), 3),
    ((2, 2, 130, 24, 8), 6),
    ((3, 1, 17, 5, 3), 5),
    ((1, 9, 4, 2, 33), 2),
    ((2, 2, 600, 3, 2), 1),
    ((1, 300, 3, 4, 1), 4),
    ((1, 2, 5, 40, 50), 7),
]


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize(("size", "parts"), SIZES)
def test_agrees_with_the_definition(
    size: tuple[int, ...], parts: int, layout: Layout, dtype: torch.dtype, energy: str
) -> None:
    check(clips(*size, dtype=dtype, layout=layout), parts, energy=energy)


@pytest.mark.parametrize("layout", [*LAYOUTS, frames_within_channels])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_changes_neither_result_nor_argument(layout: Layout, dtype: torch.dtype) -> None:
    features = clips(2, 3, 21, 7, 5, dtype=dtype, layout=layout)
    before = features.clone()
    got = check(features, 3)
    assert torch.equal(features, before)
    same = check(features.contiguous(), 3)
    for name, result in got.items():
        torch.testing.assert_close(result, same[name], rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("column_stride", [1, 5])
def test_a_single_column_may_have_any_stride(column_stride: int) -> None:
    memory = torch.randn(2 * 3 * 7 * 4 * 5, generator=torch.Generator().manual_seed(0))
    check(memory.as_strided((2, 3, 7, 4, 1), (420, 140, 20, 5, column_stride)), 2)
    check(memory.as_strided((2, 3, 7, 4, 1), (84, 28, 4, 1, column_stride)), 2)


def test_the_gradient_has_the_memory_order_of_the_features() -> None:
    for layout in (contiguous, channels_last):
        features = clips(2, 3, 5, 4, 6, layout=layout)
        assert run(spatial_temporal_attention, features, 2, upstream(features, 2))["gradient"].stride() == (
            features.stride()
        )


@given(data=st.data())
@settings(max_examples=150)
def test_agrees_with_the_definition_whatever_the_arguments(data: st.DataObject) -> None:
    small = st.integers(1, 4)
    height = data.draw(st.integers(1, 19))
    size = (data.draw(small), data.draw(small), data.draw(st.integers(1, 40)), height, data.draw(st.integers(1, 19)))
    dtype = data.draw(st.sampled_from(DTYPES))
    features = clips(
        *size,
        dtype=dtype,
        layout=data.draw(st.sampled_from([*LAYOUTS, frames_within_channels])),
        seed=data.draw(st.integers(0, 99)),
    )
    parts = data.draw(st.integers(1, height))
    grads = [grad if data.draw(st.booleans()) else None for grad in upstream(features, parts)]
    grads = grads if any(grad is not None for grad in grads) else upstream(features, parts)
    if size[3] * size[4] == 1:
        grads = [grads[0] if grads[0] is not None else upstream(features, parts)[0], None, None]  # the others are zero
    check(
        features, parts, grads, energy=data.draw(st.sampled_from(ENERGIES)), detach_attention=data.draw(st.booleans())
    )


@pytest.mark.parametrize("size", [(0, 3, 5, 4, 2), (2, 3, 0, 4, 2)])
def test_no_clips_and_no_channels(size: tuple[int, ...]) -> None:
    got = check(clips(*size), 2)
    assert got["pooled"].shape == (size[0], 2 * size[2])
    assert not got["scores"].any()
    with torch.no_grad():
        assert [x.shape for x in spatial_temporal_attention(clips(*size), 2)] == [
            (size[0], 2 * size[2]),
            (size[0], 3, 2),
            (size[0], 2),
        ]


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(3, 4, 300, 16, 8), (1, 2, 2048, 7, 7)])
def test_the_number_of_threads_changes_no_bit(size: tuple[int, ...], dtype: torch.dtype, layout: Layout) -> None:
    features = clips(*size, dtype=dtype, layout=layout)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(spatial_temporal_attention, features, 3, upstream(features, 3)))
    for other in results[1:]:
        assert all(torch.equal(other[name], result) for name, result in results[0].items())


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_clip_in_a_batch_is_the_clip_alone(dtype: torch.dtype, layout: Layout) -> None:
    features = clips(5, 3, 150, 7, 5, dtype=dtype, layout=layout)
    grads = upstream(features, 3)
    batch = run(spatial_temporal_attention, features, 3, grads)
    alone = run(spatial_temporal_attention, features[3:4], 3, [grad[3:4] for grad in grads])
    assert all(torch.equal(alone[name], result[3:4]) for name, result in batch.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_unrecorded_results_are_the_recorded_ones(dtype: torch.dtype) -> None:
    features = clips(2, 3, 50, 7, 5, dtype=dtype)
    with torch.no_grad():
        unrecorded = spatial_temporal_attention(features, 3, energy="l2")
        with_map = spatial_temporal_attention(features, 3, energy="l2", return_map=True)
    recorded = spatial_temporal_attention(features.clone().requires_grad_(), 3, energy="l2", return_map=True)
    assert len(unrecorded) == 3
    assert not any(x.requires_grad for x in (*unrecorded, *with_map))
    assert [x.requires_grad for x in recorded] == [True, True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(unrecorded, recorded[:3], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(with_map, recorded, strict=True))


# ------------------------------------------------------------------------------------------------ two steps


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_two_steps_give_the_same_bits(layout: Layout, dtype: torch.dtype, energy: str) -> None:
    frames = layout(clips(7, 1, 150, 7, 5, dtype=dtype)[:, 0])
    sums, energies = spatial_temporal_sums(frames, 3, energy=energy)
    assert sums.dtype == energies.dtype == sums_dtype(dtype)
    chosen = torch.tensor([[0, 3, 5], [6, 6, 1]])
    pooled, *others = spatial_temporal_attention_from_sums(sums[chosen], energies[chosen], 35)
    direct_pooled, *direct = spatial_temporal_attention(frames[chosen], 3, energy=energy)
    assert torch.equal(pooled.to(dtype), direct_pooled)
    assert all(torch.equal(a, b) for a, b in zip(others, direct, strict=True))


@pytest.mark.parametrize("energy", ENERGIES)
def test_gradients_of_the_two_steps_are_those_of_the_one(energy: str) -> None:
    features = clips(2, 3, 20, 7, 5, dtype=torch.float64).requires_grad_()
    sums, energies = spatial_temporal_sums(features.flatten(0, 1), 3, energy=energy)
    stepwise = spatial_temporal_attention_from_sums(sums.unflatten(0, (2, 3)), energies.unflatten(0, (2, 3)), 35)
    direct = spatial_temporal_attention(features, 3, energy=energy)
    grads = upstream(features, 3)[:2]
    (got,) = torch.autograd.grad(stepwise[:2], features, grads)
    (expected,) = torch.autograd.grad(direct[:2], features, grads)
    torch.testing.assert_close(got, expected)


def test_sums_and_energies_are_those_of_the_definition() -> None:
    frames = clips(4, 1, 20, 7, 5, dtype=torch.float64)[:, 0]
    for energy in ENERGIES:
        got = spatial_temporal_sums(frames, 3, energy=energy)
        expected = reference.spatial_temporal_sums(frames, 3, energy=energy)
        again = reference.spatial_temporal_attention_from_sums(*(x[None] for x in expected), 35)
        for a, b in zip(
            (*got, *spatial_temporal_attention_from_sums(*(x[None] for x in got), 35)),
            (*expected, *again),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ PyTorch


def differentiable(features: Tensor, parts: int = 2, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    pooled, scores, _, attention = spatial_temporal_attention(features, parts, return_map=True, **options)
    return pooled, scores, attention


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("detach", [False, True])
def test_gradcheck_and_gradgradcheck(detach: bool, energy: str) -> None:
    features = clips(2, 3, 2, 3, 2, dtype=torch.float64).requires_grad_()

    def function(features: Tensor) -> tuple[Tensor, ...]:
        results = differentiable(features, energy=energy, detach_attention=detach)
        return results[1:] if detach else results  # finite differences see what is detached

    assert torch.autograd.gradcheck(function, features)
    assert torch.autograd.gradgradcheck(function, features)


def test_gradcheck_and_gradgradcheck_of_the_two_steps() -> None:
    frames = clips(3, 1, 2, 3, 2, dtype=torch.float64)[:, 0].requires_grad_()
    for energy in ENERGIES:
        assert torch.autograd.gradcheck(lambda x, e=energy: spatial_temporal_sums(x, 2, energy=e), frames)
        assert torch.autograd.gradgradcheck(lambda x, e=energy: spatial_temporal_sums(x, 2, energy=e), frames)
    sums, energies = (x.detach()[None].requires_grad_() for x in spatial_temporal_sums(frames, 2))

    def from_sums(*x: Tensor) -> tuple[Tensor, Tensor]:
        return spatial_temporal_attention_from_sums(*x, 6)[:2]

    assert torch.autograd.gradcheck(from_sums, (sums, energies))
    assert torch.autograd.gradgradcheck(from_sums, (sums, energies))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last, every_other_column])
def test_opcheck(layout: Layout, dtype: torch.dtype) -> None:
    features = clips(2, 3, 5, 4, 3, dtype=dtype, layout=layout)
    options = (2, 1, 1e-12, False)
    results = operator(features, *options)
    torch.library.opcheck(backward_operator, (*upstream(features, 2), features, *results[1:], *options))
    shapes_only = ("test_schema", "test_faketensor")
    raw = torch.ops.gingham._spatial_temporal_attention.default
    torch.library.opcheck(raw, (features, *options), test_utils=shapes_only)
    unrecorded = torch.ops.gingham._spatial_temporal_attention_unrecorded.default
    torch.library.opcheck(unrecorded, (features, *options[:3]), test_utils=shapes_only)
    torch.library.opcheck(operator, (features.detach().requires_grad_(), *options))


def test_opcheck_of_the_two_steps() -> None:
    frames = clips(6, 1, 5, 4, 3)[:, 0].requires_grad_()
    torch.library.opcheck(torch.ops.gingham.spatial_temporal_sums.default, (frames, 2, 0, 1e-12))
    sums, energies = (x.detach().unflatten(0, (2, 3)).requires_grad_() for x in spatial_temporal_sums(frames, 2))
    from_sums = torch.ops.gingham.spatial_temporal_attention_from_sums.default
    torch.library.opcheck(from_sums, (sums, energies, 12, 1e-12))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_the_eager_path_is_the_registered_formula(layout: Layout) -> None:
    features = clips(2, 3, 5, 4, 3, layout=layout)
    grads = upstream(features, 2)
    eager = run(spatial_temporal_attention, features, 2, grads)
    leaf = features.detach().requires_grad_()
    pooled, scores, frames, attention, *_ = operator(leaf, 2, 0, 1e-12, False)
    (gradient,) = torch.autograd.grad((pooled, scores, attention), leaf, grads)
    formula = {"pooled": pooled, "scores": scores, "frames": frames, "map": attention, "gradient": gradient}
    assert all(torch.equal(eager[name], result) for name, result in formula.items())
    assert gradient.stride() == eager["gradient"].stride()


def test_autocast_changes_nothing() -> None:
    features = clips(2, 3, 5, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        got = spatial_temporal_attention(features.clone().requires_grad_(), 2)
        low = spatial_temporal_attention(features.bfloat16(), 2)
        public = operator(features, 2, 0, 1e-12, False)
    assert [x.dtype for x in got] == [torch.float32, torch.float32, torch.int64]
    assert [x.dtype for x in low] == [torch.bfloat16, torch.float32, torch.int64]
    expected = spatial_temporal_attention(features, 2)
    for i in range(3):
        assert torch.equal(got[i], expected[i])
        assert torch.equal(public[i], expected[i])


def test_vmap_and_func_grad() -> None:
    features = clips(6, 3, 5, 4, 3)
    batched = features.unflatten(0, (2, 3))
    direct = spatial_temporal_attention(features, 2, return_map=True)
    mapped = torch.vmap(lambda x: spatial_temporal_attention(x, 2, return_map=True), in_dims=1, out_dims=1)(batched)
    for got, expected in zip(mapped, direct, strict=True):
        torch.testing.assert_close(got.flatten(0, 1), expected)

    def loss(features: Tensor) -> Tensor:
        return sum(x.square().sum() for x in differentiable(features))  # type: ignore[return-value]

    leaf = features.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(features), expected)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(batched).flatten(0, 1), expected)

    def penalty(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.func.grad(lambda x: torch.func.grad(function)(x).square().sum())

    def defined(features: Tensor) -> Tensor:
        pooled, scores, _, attention = reference.spatial_temporal_attention(features, 2, return_map=True)
        return pooled.square().sum() + scores.square().sum() + attention.square().sum()

    exact = features.double()
    torch.testing.assert_close(penalty(loss)(exact), penalty(defined)(exact))


def _head(features: Tensor) -> tuple[Tensor, Tensor]:
    pooled, scores, frames, attention = spatial_temporal_attention(features, 2, energy="l2", return_map=True)
    return pooled.relu() + frames.sum(), scores.square().sum() + interframe_regularization(attention, "all")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_is_one_graph_with_dynamic_shapes(backend: str) -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if backend == "inductor" and not compiler:
        pytest.skip("inductor needs a C++ compiler on PATH")
    torch.compiler.reset()
    compiled = torch.compile(_head, backend=backend, fullgraph=True, dynamic=True)
    for size in ((2, 3, 5, 4, 3), (3, 2, 7, 9, 4), (5, 4, 6, 3, 8)):
        results = []
        for function in (compiled, _head):
            leaf = clips(*size).requires_grad_()
            pooled, loss = function(leaf)
            results.append((pooled, loss, *torch.autograd.grad(pooled.sum() + loss, leaf)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


def test_compiled_two_steps_are_the_eager_ones() -> None:
    def stepwise(frames: Tensor) -> tuple[Tensor, ...]:
        sums, energies = spatial_temporal_sums(frames, 2)
        return spatial_temporal_attention_from_sums(sums[None], energies[None], frames.size(2) * frames.size(3))

    torch.compiler.reset()
    compiled = torch.compile(stepwise, backend="aot_eager", fullgraph=True)
    frames = clips(4, 1, 5, 4, 3)[:, 0]
    assert all(torch.equal(a, b) for a, b in zip(compiled(frames), stepwise(frames), strict=True))


def test_compile_says_what_is_wrong_with_an_argument() -> None:
    torch.compiler.reset()
    with pytest.raises(ValueError, match="parts must be 1 to the 4 rows of features, got 5"):
        torch.compile(spatial_temporal_attention, backend="eager")(clips(2, 3, 5, 4, 3), 5)


class _Head(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = SpatialTemporalAttention(2)

    def forward(self, features: Tensor) -> Tensor:
        return self.attention(features)[0]  # type: ignore[no-any-return]


def test_export_with_dynamic_shapes() -> None:
    names = ("batch", "frames", "height", "width")
    smallest = {"height": 2}
    dynamic = {
        axis: torch.export.Dim(name, min=smallest.get(name, 1), max=64)
        for axis, name in zip((0, 1, 3, 4), names, strict=True)
    }
    exported = torch.export.export(_Head(), (clips(2, 3, 5, 4, 3),), dynamic_shapes={"features": dynamic})
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in ((2, 3, 5, 4, 3), (3, 2, 5, 7, 6), (1, 5, 5, 2, 9)):
        torch.testing.assert_close(loaded(clips(*size)), _Head()(clips(*size)))


def test_meta_tensors_have_the_shapes_and_no_data() -> None:
    pooled, scores, frames, attention = spatial_temporal_attention(clips(2, 3, 5, 4, 6).to("meta"), 2, return_map=True)
    assert pooled.is_meta
    assert [x.shape for x in (pooled, scores, frames, attention)] == [(2, 10), (2, 3, 2), (2, 2), (2, 3, 4, 6)]
    assert [x.shape for x in spatial_temporal_attention(clips(2, 3, 5, 4, 6).to("meta"), 2)] == [
        (2, 10),
        (2, 3, 2),
        (2, 2),
    ]


# ------------------------------------------------------------------------------------------------ regularisation


def test_the_regularisation_is_symmetric_bounded_and_safe() -> None:
    attention = spatial_temporal_attention(clips(4, 2, 8, 6, 4), 3, return_map=True)[3]
    value = interframe_regularization(attention)
    torch.testing.assert_close(interframe_regularization(attention.flip(1)), value)
    assert 0 < float(value) <= math.sqrt(2)
    one_hot = torch.zeros(1, 2, 3, 3)
    one_hot[0, 0, 0, 1] = one_hot[0, 1, 2, 2] = 1
    assert interframe_regularization(one_hot).item() == pytest.approx(math.sqrt(2))
    equal = torch.rand(2, 1, 3, 3).repeat(1, 3, 1, 1).requires_grad_()
    for pairs in ("one", "all"):
        value = interframe_regularization(equal, pairs)
        (gradient,) = torch.autograd.grad(value, equal)
        assert value.item() == 0
        assert not gradient.any()


def test_the_regularisation_of_all_pairs_is_their_mean_and_of_one_pair_is_drawn() -> None:
    attention = torch.rand(1, 4, 3, 2, dtype=torch.float64)
    norms = {(i, j): (attention[0, i] - attention[0, j]).norm().item() for i in range(4) for j in range(i + 1, 4)}
    assert interframe_regularization(attention, "all").item() == pytest.approx(sum(norms.values()) / 6)
    generator = torch.Generator().manual_seed(0)
    drawn = {round(interframe_regularization(attention, "one", generator).item(), 9) for _ in range(200)}
    assert drawn == {round(norm, 9) for norm in norms.values()}
    first, again = (
        interframe_regularization(attention, generator=torch.Generator().manual_seed(5)).item() for _ in range(2)
    )
    assert first == again


@pytest.mark.parametrize("shape", [(3, 1, 4, 2), (0, 3, 4, 2)])
@pytest.mark.parametrize("pairs", ["one", "all"])
def test_no_pair_gives_no_regularisation(pairs: Any, shape: tuple[int, ...]) -> None:
    attention = torch.rand(shape).requires_grad_()
    value = interframe_regularization(attention, pairs)
    value.backward()
    assert value.item() == 0
    assert not attention.grad.any()


def test_wrong_arguments_of_the_regularisation() -> None:
    with pytest.raises(ValueError, match=r"attention_map must be \[B, T, H, W\], got shape \[2, 3\]"):
        interframe_regularization(torch.ones(2, 3))
    with pytest.raises(ValueError, match='pairs must be "one" or "all", got \'two\''):
        interframe_regularization(torch.ones(2, 3, 4, 5), "two")  # type: ignore[arg-type]


def test_the_module_is_the_function_without_parameters() -> None:
    features = clips(2, 3, 5, 6, 4)
    module = SpatialTemporalAttention(3, energy="agrl", return_map=True)
    assert not module.state_dict()
    for got, expected in zip(
        module(features), spatial_temporal_attention(features, 3, energy="agrl", return_map=True), strict=True
    ):
        assert torch.equal(got, expected)
    assert len(SpatialTemporalAttention()(features)) == 3
    shown = "parts=3, energy='agrl', eps=1e-12, detach_attention=False, return_map=True"
    assert repr(module) == f"SpatialTemporalAttention({shown})"
    for wrong in ({"parts": 0}, {"energy": "l1"}, {"eps": 0.0}, {"eps": math.inf}):
        with pytest.raises(ValueError, match=f"SpatialTemporalAttention: {next(iter(wrong))} must be"):
            SpatialTemporalAttention(**wrong)


# ------------------------------------------------------------------------------------------------ arrays

ARRAY_DTYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
}


def as_array(tensor: Tensor) -> Any:
    """The tensor's memory as an array, whose strides it keeps."""
    dtype = ARRAY_DTYPES[tensor.dtype]
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(dtype)


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced, transposed, every_other_column])
def test_arrays_give_the_same_bits(layout: Layout, dtype: torch.dtype, energy: str) -> None:
    features = clips(2, 3, 37, 7, 5, dtype=dtype, layout=layout)
    expected = spatial_temporal_attention(features, 3, energy=energy, return_map=True)
    for count in (1, 3):
        got = array.spatial_temporal_attention(as_array(features), 3, energy=energy, return_map=True, threads=count)
        for result, tensor in zip(got, expected, strict=True):
            np.testing.assert_array_equal(result.astype(np.float64), tensor.double().numpy())
    assert got[0].dtype == ARRAY_DTYPES[dtype]
    sums, energies = array.spatial_temporal_sums(as_array(features[0]), 3, energy=energy)
    pooled, scores, frames = array.spatial_temporal_attention_from_sums(sums[None], energies[None], 35)
    np.testing.assert_array_equal(scores, got[1][:1])
    np.testing.assert_array_equal(frames, got[2][:1])
    np.testing.assert_array_equal(pooled.astype(got[0].dtype), got[0][:1])


def test_arrays_without_clips_or_channels() -> None:
    for shape in ((0, 3, 5, 4, 2), (2, 3, 0, 4, 2)):
        pooled, scores, frames = array.spatial_temporal_attention(np.ones(shape, dtype=np.float32), 2)
        assert pooled.shape == (shape[0], 2 * shape[2])
        assert scores.shape == (shape[0], 3, 2)
        assert not scores.any()
        assert not frames.any()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ([[[1.0]]], {}, TypeError, "features must be a NumPy or CuPy array, got list"),
        (np.ones((2, 3, 5, 4, 2), dtype=int), {}, TypeError, "features must be float32.*got int64"),
        (np.ones((3, 5, 4, 2)), {}, ValueError, r"features must be \[B, T, C, H, W\], got shape"),
        (np.ones((2, 0, 5, 4, 2)), {}, ValueError, "features must have at least one frame, row and column"),
        (np.ones((2, 3, 5, 4, 2)), {"parts": 5}, ValueError, "parts must be 1 to the 4 rows of features, got 5"),
        (np.ones((2, 3, 5, 4, 2)), {"parts": 2.0}, TypeError, "parts must be a whole number, got float"),
        (np.ones((2, 3, 5, 4, 2)), {"energy": "l1"}, ValueError, "energy must be .*got 'l1'"),
        (np.ones((2, 3, 5, 4, 2)), {"energy": 1}, TypeError, "energy must be a string, got int"),
        (np.ones((2, 3, 5, 4, 2)), {"eps": math.inf}, ValueError, "eps must be finite and positive, got inf"),
        (np.ones((2, 3, 5, 4, 2)), {"eps": 0.0}, ValueError, "eps must be finite and positive, got 0.0"),
        (np.ones((2, 3, 5, 4, 2), "f"), {"eps": 1e-50}, ValueError, "eps must be at least 1.17.*e-38, .*got 1e-50"),
        (np.ones((2, 3, 5, 4, 2)), {"threads": 0}, ValueError, "threads must be a positive whole number"),
    ],
)
def test_wrong_arguments_of_arrays(
    arguments: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"spatial_temporal_attention: {message}"):
        array.spatial_temporal_attention(arguments, **{"parts": 2} | options)


def test_wrong_sums_of_arrays() -> None:
    sums, energies = np.ones((2, 3, 4, 5), dtype=np.float32), np.ones((2, 3, 4), dtype=np.float32)
    call = array.spatial_temporal_attention_from_sums
    with pytest.raises(ValueError, match=r"energies must be \(2, 3, 4\) to match sums"):
        call(sums, energies[:1], 12)
    with pytest.raises(TypeError, match="energies must have the dtype of sums"):
        call(sums, energies.astype(np.float64), 12)
    with pytest.raises(TypeError, match="sums must be float32 or float64"):
        call(sums.astype(np.float16), energies, 12)
    with pytest.raises(ValueError, match="positions must be at least 1 and fit 64 bits, got 0"):
        call(sums, energies, 0)


# ------------------------------------------------------------------------------------------------ instruction sets

INSTRUCTION_SET = """
import sys, torch
from gingham.ops import spatial_temporal_attention
results = []
for features, parts, energy, *grads in torch.load(sys.argv[1]):
    leaf = features.requires_grad_()
    pooled, scores, frames, attention = spatial_temporal_attention(leaf, parts, energy=energy, return_map=True)
    (gradient,) = torch.autograd.grad((pooled, scores, attention), leaf, grads)
    results.append([x.detach() for x in (pooled, scores, attention, gradient)])
torch.save(results, sys.argv[2])
"""


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_agrees_with_the_definition(name: str, tmp_path: Path) -> None:
    if name not in info()["instruction sets available"].split(", "):
        pytest.skip("this machine does not have it")
    cases = [
        (clips(*size, dtype=dtype, layout=layout), parts, energy)
        for (size, parts), energy in zip(SIZES[:6], ENERGIES * 2, strict=True)
        for dtype in kernels_of(name, DTYPES)
        for layout in (contiguous, channels_last)
    ]
    torch.save([(*case, *upstream(*case[:2])) for case in cases], tmp_path / "arguments.pt")
    finished = run_python(
        INSTRUCTION_SET, str(tmp_path / "arguments.pt"), str(tmp_path / "results.pt"), GINGHAM_CPU=name
    )
    assert finished.returncode == 0, finished.stderr
    for (features, parts, energy), results in zip(cases, torch.load(tmp_path / "results.pt"), strict=True):
        expected = check(features, parts, energy=energy)  # which compares this process's instruction set
        eps = torch.finfo(features.dtype).eps
        for which, result in zip((*NAMES, "gradient"), results, strict=True):
            tolerance = 4 * eps if which in ("pooled", "gradient") else 1e-5
            largest = float(expected[which].abs().max())
            torch.testing.assert_close(result, expected[which], rtol=tolerance, atol=max(4e-6, eps) * largest)


# ------------------------------------------------------------------------------------------------ errors

FEATURES = torch.ones(2, 3, 5, 4, 6)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": None}, TypeError, "features must be a tensor, got NoneType"),
        ({"features": FEATURES.long()}, TypeError, r"features must be float32.*got int64 \[2, 3, 5, 4, 6\]"),
        ({"features": FEATURES.to_sparse()}, TypeError, "features must be a dense tensor, got sparse_coo"),
        ({"features": FEATURES[0]}, ValueError, r"features must be \[B, T, C, H, W\], got float32 \[3, 5, 4, 6\]"),
        ({"features": FEATURES[:, :0]}, ValueError, "features must have at least one frame, row and column"),
        ({"features": FEATURES[..., :0]}, ValueError, "features must have at least one frame, row and column"),
        ({"features": FEATURES[:, :, :, :0]}, ValueError, "features must have at least one frame, row and column"),
        ({"parts": 0}, ValueError, "parts must be 1 to the 4 rows of features, got 0"),
        ({"parts": 5}, ValueError, "parts must be 1 to the 4 rows of features, got 5"),
        ({"parts": 2.0}, TypeError, "parts must be a whole number, got float"),
        ({"parts": torch.tensor(2)}, TypeError, r"parts must be a whole number, got int64 \[\]"),
        ({"energy": "l1"}, ValueError, 'energy must be "sq", "l2" or "agrl", got \'l1\''),
        ({"energy": 0}, TypeError, "energy must be a string, got int"),
        ({"energy": []}, TypeError, "energy must be a string, got list"),
        ({"eps": 0.0}, ValueError, "eps must be finite and positive, got 0.0"),
        ({"eps": 1e-50}, ValueError, "eps must be at least 1.1754943508222875e-38, .*got 1e-50"),
        ({"eps": math.nan}, ValueError, "eps must be finite and positive, got nan"),
        ({"eps": "1"}, TypeError, "eps must be a number, got str"),
        ({"detach_attention": 1}, TypeError, "detach_attention must be a bool, got int"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str, requires_grad: bool) -> None:
    arguments: dict[str, Any] = {"features": FEATURES, "parts": 2} | changes
    if requires_grad and isinstance(arguments["features"], Tensor) and arguments["features"].is_floating_point():
        arguments["features"] = arguments["features"].clone().requires_grad_()
    with pytest.raises(error, match=f"spatial_temporal_attention: {message}"):
        spatial_temporal_attention(**arguments)


def test_numbers_of_any_kind_will_do() -> None:
    expected = spatial_temporal_attention(FEATURES, 2, eps=1.0)
    for got in (
        spatial_temporal_attention(FEATURES, np.int64(2), eps=1),
        spatial_temporal_attention(FEATURES, 2, eps=1),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_smallest_eps_is_that_of_the_sums() -> None:
    nothing, least = torch.zeros(2, 3, 5, 4, 6), torch.finfo(torch.float32).tiny
    for features, eps in ((nothing, least), (nothing.half(), least), (nothing.double(), 1e-50)):
        assert not spatial_temporal_attention(features, 2, eps=eps)[1].any()
        assert not array.spatial_temporal_attention(features.numpy(), 2, eps=eps)[1].any()
    for features in (nothing, nothing.half()):
        with pytest.raises(ValueError, match="smallest normal number of float32"):
            spatial_temporal_attention(features, 2, eps=least / 2)
    with pytest.raises(ValueError, match="smallest normal number of float64"):
        spatial_temporal_attention(nothing.double(), 2, eps=1e-310)


def test_wrong_arguments_of_the_two_steps() -> None:
    with pytest.raises(ValueError, match=r"spatial_temporal_sums: eps must be at least 1.17.*e-38, .*got 1e-50"):
        spatial_temporal_sums(FEATURES[0], 2, eps=1e-50)
    with pytest.raises(ValueError, match=r"spatial_temporal_attention_from_sums: eps must be at least 1.17.*e-38"):
        spatial_temporal_attention_from_sums(torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4), 6, eps=1e-50)
    with pytest.raises(ValueError, match=r"spatial_temporal_sums: features must be \[N, C, H, W\]"):
        spatial_temporal_sums(FEATURES, 2)
    with pytest.raises(ValueError, match="spatial_temporal_sums: parts must be 1 to the 4 rows"):
        spatial_temporal_sums(FEATURES[0], 5)
    sums, energies = torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4)
    for wrong, error, message in (
        ((sums, energies[:1], 6), ValueError, r"energies must be \[2, 3, 4\] to match sums"),
        ((sums, energies.double(), 6), TypeError, "energies must have the dtype of sums"),
        ((sums.half(), energies, 6), TypeError, "sums must be float32 or float64, got float16"),
        ((sums[0], energies, 6), ValueError, r"sums must be \[B, T, K, C\]"),
        ((sums[:, :0], energies[:, :0], 6), ValueError, "at least one frame and part"),
        ((sums, energies, 0), ValueError, "positions must be at least 1 and fit 64 bits, got 0"),
        ((sums, energies, 6.0), TypeError, "positions must be a whole number, got float"),
        ((None, energies, 6), TypeError, "sums must be a tensor, got NoneType"),
    ):
        with pytest.raises(error, match=f"spatial_temporal_attention_from_sums: .*{message}"):
            spatial_temporal_attention_from_sums(*wrong)


def test_the_operators_themselves_check_their_arguments() -> None:
    ops = torch.ops.gingham
    results = operator(FEATURES, 2, 0, 1e-12, False)
    with pytest.raises(RuntimeError, match="parts must be 1 to the number of rows"):
        ops._spatial_temporal_attention(FEATURES, 5, 0, 1e-12, False)
    with pytest.raises(RuntimeError, match="energy must be 0, 1 or 2"):
        ops._spatial_temporal_attention(FEATURES, 2, 3, 1e-12, False)
    with pytest.raises(RuntimeError, match="backward must get what the forward returned"):
        ops._spatial_temporal_attention_backward(
            *upstream(FEATURES, 2), FEATURES, results[1][:1], *results[2:], 2, 0, 1e-12, False
        )


# ------------------------------------------------------------------------------------------------ CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced, every_other_column])
@pytest.mark.parametrize(("size", "parts"), [*SIZES, ((8, 4, 2048, 16, 8), 4)])
def test_cuda_agrees_with_the_definition(
    size: tuple[int, ...], parts: int, layout: Layout, dtype: torch.dtype, energy: str
) -> None:
    check(clips(*size, dtype=dtype, layout=layout, device="cuda"), parts, energy=energy)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_results_are_repeatable_and_those_of_the_clip_alone(dtype: torch.dtype) -> None:
    features = clips(5, 3, 150, 7, 5, dtype=dtype, device="cuda")
    grads = upstream(features, 3)
    first, again = (run(spatial_temporal_attention, features, 3, grads) for _ in range(2))
    alone = run(spatial_temporal_attention, features[3:4], 3, [grad[3:4] for grad in grads])
    for name, result in first.items():
        assert torch.equal(result, again[name])
        assert torch.equal(result[3:4], alone[name])


@pytest.mark.cuda
def test_cuda_two_steps_give_the_same_bits_and_no_clip_nothing() -> None:
    frames = clips(6, 1, 150, 7, 5, device="cuda")[:, 0]
    sums, energies = spatial_temporal_sums(frames, 3)
    got = spatial_temporal_attention_from_sums(sums.unflatten(0, (2, 3)), energies.unflatten(0, (2, 3)), 35)
    expected = spatial_temporal_attention(frames.unflatten(0, (2, 3)), 3)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    check(clips(0, 3, 5, 4, 2, device="cuda"), 2)
    check(clips(2, 3, 0, 4, 2, device="cuda"), 2)


@pytest.mark.cuda
def test_cuda_opcheck_and_gradcheck() -> None:
    features = clips(2, 3, 2, 3, 2, dtype=torch.float64, device="cuda").requires_grad_()
    torch.library.opcheck(operator, (features, 2, 0, 1e-12, False))
    assert torch.autograd.gradcheck(differentiable, features)
    assert torch.autograd.gradgradcheck(differentiable, features)


@pytest.mark.cuda
def test_cuda_runs_on_the_current_stream() -> None:
    cold = clips(4, 4, 256, 16, 8)
    expected = spatial_temporal_attention(cold.cuda())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # an operator on another stream would read what is not there yet
        got = spatial_temporal_attention(cold.pin_memory().cuda(non_blocking=True))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
