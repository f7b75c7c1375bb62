"""torch.ops.gingham.masked_average_pool and the function on top of it, against the written out form in float64."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gingham import info, reference
from gingham.array import masked_average_pool as array_pool
from gingham.nn import MaskedAveragePool
from gingham.ops import masked_average_pool
from oracles.conditions import kernels_of, run_python, threads
from oracles.layouts import (
    LAYOUTS,
    batch_innermost,
    channels_last,
    contiguous,
    every_other_column,
    expanded_batch,
    expanded_columns,
    sliced,
    transposed,
)
from oracles.masked_supports import Quantity, pooled_and_gradients

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
MASKS = [*DTYPES, torch.bool, torch.uint8]
RESIZES = ["features", "mask"]
NAMES = ("pooled", "grad_features", "grad_mask")
MASK_LAYOUTS = [
    contiguous,
    channels_last,
    transposed,
    batch_innermost,
    expanded_batch,
    expanded_columns,
]  # of whole numbers: no neighbours that are not a number

operator = torch.ops.gingham.masked_average_pool.default
backward_operator = torch.ops.gingham.masked_average_pool_backward.default
cuda = pytest.param("cuda", marks=pytest.mark.cuda)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def maps(
    size: tuple[int, int],
    mask_size: tuple[int, int],
    *,
    batch: int = 2,
    channels: int = 5,
    dtype: torch.dtype = torch.float32,
    mask_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, a mask and the gradient of the pooled vectors."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, channels, *size, generator=generator)
    mask = torch.rand(batch, 1, *mask_size, generator=generator)
    if not mask_dtype.is_floating_point:
        mask = (mask > 0.5) * (3 if mask_dtype == torch.uint8 else 1)
    grad = torch.randn(batch, channels, generator=generator)
    return features.to(device, dtype), mask.to(device, mask_dtype), grad.to(device, dtype)


def run(features: Tensor, mask: Tensor, grad: Tensor, resize: Any = "features") -> tuple[Tensor, ...]:
    """The pooled vectors and the gradients of the features and of a floating mask, which may be views of any kind."""
    leaves = [features.detach().requires_grad_()]
    leaves += [mask.detach().requires_grad_()] if mask.is_floating_point() else []
    pooled = masked_average_pool(leaves[0], leaves[1] if len(leaves) > 1 else mask, resize=resize)
    return pooled.detach(), *torch.autograd.grad(pooled, leaves, grad)


def assert_within_bounds(name: str, got: Tensor, expected: Quantity, sums: torch.dtype) -> None:
    error, bound = (got.detach().cpu().double() - expected.exact).abs(), expected.bound(got.dtype, sums)
    assert got.shape == expected.exact.shape
    assert bool((error <= bound).all()), (
        f"{name}: {float((error / bound).nan_to_num(math.inf).max()):.2f} times the bound"
    )


def check(features: Tensor, mask: Tensor, grad: Tensor, resize: str = "features") -> tuple[Tensor, ...]:
    got = run(features, mask, grad, resize)
    expected = pooled_and_gradients(features.cpu(), mask.cpu(), grad.cpu(), resize)
    assert got[0].dtype == got[1].dtype == features.dtype
    for name, result, exact in zip(NAMES, got, expected, strict=False):
        assert_within_bounds(name, result, exact, sums_dtype(features.dtype))
    return got


# ------------------------------------------------------------------------------------------------ golden values


def golden() -> tuple[Tensor, Tensor]:
    features = ((torch.arange(18, dtype=torch.float64) - 8) / 4).reshape(1, 3, 2, 3)
    mask = torch.zeros(1, 1, 8, 12, dtype=torch.bool)
    mask[..., 1:5, 2:9] = True
    return features, mask


def test_the_weights_and_the_vector_of_the_specification() -> None:
    features, mask = golden()
    pooled, weights, total = operator(features, mask)
    assert weights.tolist() == [[[5.75, 11.140625, 3.234375], [2.25, 4.359375, 1.265625]]]
    assert total.tolist() == [28.0]
    assert pooled.tolist() == [[-1.5703125, -0.0703125, 1.4296875]]
    other = masked_average_pool(features, mask, resize="mask")
    assert float((other - pooled).abs().max()) > 0.01


def test_the_definition_agrees_with_the_written_out_form() -> None:
    for resize in RESIZES:
        for size, mask_size in (((5, 7), (13, 11)), ((6, 5), (2, 3))):
            features, mask, grad = maps(size, mask_size, dtype=torch.float64, mask_dtype=torch.float64)
            leaves = [features.requires_grad_(), mask.requires_grad_()]
            pooled = reference.masked_average_pool(*leaves, resize=resize)
            results = pooled, *torch.autograd.grad(pooled, leaves, grad)
            for result, exact in zip(
                results, pooled_and_gradients(features.detach(), mask.detach(), grad, resize), strict=True
            ):
                torch.testing.assert_close(result, exact.exact)


# ------------------------------------------------------------------------------------------------ sizes and types


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "mask_size"),
    [
        ((5, 7), (13, 11)),
        ((4, 6), (4, 6)),
        ((1, 9), (4, 30)),
        ((9, 1), (3, 1)),
        ((1, 1), (1, 1)),
        ((1, 1), (40, 50)),
        ((6, 5), (2, 3)),
        ((17, 33), (1, 2)),
        ((47, 63), (375, 500)),
        ((16, 16), (128, 128)),
        ((33, 4), (35, 70)),
    ],
    ids=str,
)
def test_agrees_with_the_written_out_form(
    size: tuple[int, int], mask_size: tuple[int, int], dtype: torch.dtype, resize: str
) -> None:
    for layout in (contiguous, channels_last):
        for mask_dtype in (torch.float32, torch.bool):
            features, mask, grad = maps(size, mask_size, dtype=dtype, mask_dtype=mask_dtype)
            check(layout(features), mask, grad, resize)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("mask_dtype", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_any_dtype(dtype: torch.dtype, mask_dtype: torch.dtype, resize: str) -> None:
    results = check(*maps((6, 9), (23, 37), dtype=dtype, mask_dtype=mask_dtype), resize)
    if mask_dtype.is_floating_point:
        assert results[2].dtype == mask_dtype


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 9, 31, 64, 130])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_any_number_of_channels(layout: Callable[[Tensor], Tensor], channels: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        features, mask, grad = maps((9, 11), (20, 30), channels=channels, dtype=dtype)
        check(layout(features), mask, grad)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize(
    ("batch", "channels", "size", "mask_size"),
    [
        (0, 3, (4, 5), (6, 7)),
        (2, 0, (4, 5), (6, 7)),
        (2, 3, (0, 5), (6, 7)),
        (2, 3, (4, 5), (0, 7)),
        (2, 3, (4, 5), (6, 0)),
    ],
)
def test_empty_maps(batch: int, channels: int, size: tuple[int, int], mask_size: tuple[int, int], resize: str) -> None:
    features, mask, grad = maps(size, mask_size, batch=batch, channels=channels)
    pooled, grad_features, grad_mask = run(features, mask, grad, resize)
    assert pooled.shape == (batch, channels)
    assert grad_features.shape == features.shape
    assert grad_mask.shape == mask.shape
    assert not any(bool(x.any()) for x in (pooled, grad_features, grad_mask))


def test_features_in_half_precision_beyond_its_range_are_summed_in_float32() -> None:
    features = torch.full((1, 3, 40, 40), 6e4, dtype=torch.float16)
    pooled = masked_average_pool(features, torch.full((1, 1, 80, 80), 200, dtype=torch.uint8))
    assert bool((pooled == 6e4).all())


# ------------------------------------------------------------------------------------------------ behaviour


@pytest.mark.parametrize(("size", "mask_size"), [((41, 47), (321, 375)), ((63, 47), (500, 375)), ((9, 7), (31, 20))])
def test_the_cheap_form_is_the_mean_of_the_upsampled_features(
    size: tuple[int, int], mask_size: tuple[int, int]
) -> None:
    features, mask, _ = maps(size, mask_size, channels=2, dtype=torch.float64, mask_dtype=torch.float64)
    upsampled = F.interpolate(features, mask_size, mode="bilinear", align_corners=False)
    expected = (upsampled * mask).sum(dim=(2, 3)) / mask.sum(dim=(2, 3))
    torch.testing.assert_close(masked_average_pool(features, mask), expected, rtol=0, atol=1e-12)
    low = masked_average_pool(features.float(), mask.float())
    torch.testing.assert_close(low.double(), expected, rtol=0, atol=1e-6)


def test_weights_are_not_negative_and_sum_to_the_mask() -> None:
    for size, mask_size in (((9, 7), (31, 20)), ((9, 7), (4, 50)), ((3, 3), (3, 3))):
        features, mask, _ = maps(size, mask_size)
        _, weights, total = operator(features, mask)
        assert bool((weights >= 0).all())
        torch.testing.assert_close(weights.sum(dim=(1, 2)), mask.sum(dim=(1, 2, 3)))
        torch.testing.assert_close(total, mask.sum(dim=(1, 2, 3)))


@pytest.mark.parametrize("resize", RESIZES)
def test_a_full_mask_gives_the_global_average_at_whole_ratios(resize: str) -> None:
    features, _, _ = maps((5, 7), (1, 1), dtype=torch.float64)
    for ratio in (1, 8):
        mask = torch.ones(2, 1, 5 * ratio, 7 * ratio, dtype=torch.bool)
        torch.testing.assert_close(
            masked_average_pool(features, mask, resize=resize), features.mean(dim=(2, 3)), rtol=0, atol=1e-15
        )
    odd = masked_average_pool(features, torch.ones(2, 1, 31, 45))
    assert 0 < float((odd - features.mean(dim=(2, 3))).abs().max()) < 0.05


def test_a_single_pixel_gives_the_bilinear_sample_there() -> None:
    features, _, _ = maps((4, 6), (1, 1), dtype=torch.float64)
    upsampled = F.interpolate(features, (13, 11), mode="bilinear", align_corners=False)
    for y, x in ((0, 0), (6, 3), (12, 10), (1, 9)):
        mask = torch.zeros(2, 1, 13, 11, dtype=torch.uint8)
        mask[:, :, y, x] = 1
        torch.testing.assert_close(masked_average_pool(features, mask), upsampled[:, :, y, x], rtol=0, atol=1e-14)


@pytest.mark.parametrize("resize", RESIZES)
def test_constant_features_stay_constant(resize: str) -> None:
    for mask_size in ((13, 11), (2, 3), (1, 1)):
        _, mask, _ = maps((4, 6), mask_size)
        pooled = masked_average_pool(torch.full((2, 3, 4, 6), 2.5), mask, resize=resize)
        torch.testing.assert_close(pooled, torch.full((2, 3), 2.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("resize", RESIZES)
def test_scaling_the_mask_changes_nothing(resize: str) -> None:
    features, mask, _ = maps((4, 6), (13, 11))
    pooled = masked_average_pool(features, mask, resize=resize)
    assert torch.equal(masked_average_pool(features, 4 * mask, resize=resize), pooled)
    torch.testing.assert_close(masked_average_pool(features, 0.3 * mask, resize=resize), pooled)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_a_mask_that_sums_to_zero_gives_zeros_and_no_gradient(layout: Callable[[Tensor], Tensor], resize: str) -> None:
    features, mask, grad = maps((4, 6), (8, 12))
    mask[0] = 0
    results = run(layout(features), mask, grad, resize)
    assert all(not bool(x[0].any()) for x in results)
    assert all(bool(x[1].any()) for x in results)
    assert all(bool(x.isfinite().all()) for x in results)
    mask[0, 0, 3, 4], mask[0, 0, 3, 5] = 1, -1
    assert not bool(run(layout(features), mask, grad)[0][0].any())


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_what_lies_more_than_a_cell_beyond_the_mask_does_not_count(layout: Callable[[Tensor], Tensor]) -> None:
    features, _, _ = maps((8, 10), (1, 1))
    mask = torch.zeros(2, 1, 64, 80, dtype=torch.bool)
    mask[:, :, 24:40, 32:56] = True  # cells 3 and 4 of the rows and 4 to 6 of the columns
    touched = torch.zeros(8, 10, dtype=torch.bool)
    touched[2:6, 3:8] = True
    pooled = masked_average_pool(layout(features), mask)
    assert torch.equal(masked_average_pool(layout(features + 1e6 * ~touched), mask), pooled)
    assert not torch.equal(masked_average_pool(layout(features + touched), mask), pooled)
    far = features.clone()
    far[:, :, :2], far[:, :, 6:] = math.nan, math.inf
    if layout is channels_last:  # which reads no pixel without a weight
        assert torch.equal(masked_average_pool(layout(far), mask), pooled)


def test_what_is_not_a_number_under_the_mask_spoils_its_channel() -> None:
    features, mask, _ = maps((4, 6), (13, 11))
    features[0, 2, 1, 3] = math.nan
    assert masked_average_pool(features, mask).isnan().tolist() == [[i == 2 for i in range(5)], [False] * 5]


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", [masked_average_pool, reference.masked_average_pool])
def test_a_mask_without_elements_gives_zeros_whatever_the_features_are(
    pool: Callable[..., Tensor], dtype: torch.dtype, resize: str
) -> None:
    features = torch.full((2, 3, 4, 5), math.inf, dtype=dtype)
    features[1] = torch.finfo(dtype).max  # whose sum has no place in float16
    mask = torch.ones(2, 1, 0, 3, dtype=dtype).requires_grad_()
    pooled = pool(features.requires_grad_(), mask, resize=resize)
    assert torch.equal(pooled, torch.zeros(2, 3, dtype=dtype))
    gradient, of_mask = torch.autograd.grad(pooled.sum(), (features, mask))
    assert torch.equal(gradient, torch.zeros_like(features))
    assert of_mask.shape == mask.shape


def test_moving_features_and_mask_together_changes_nothing() -> None:
    features, _, _ = maps((9, 9), (1, 1), dtype=torch.float64)
    mask = torch.zeros(2, 1, 72, 72, dtype=torch.bool)
    mask[:, :, 20:35, 24:41] = True
    moved = masked_average_pool(features.roll((1, 2), (2, 3)), mask.roll((8, 16), (2, 3)))
    torch.testing.assert_close(moved, masked_average_pool(features, mask), rtol=0, atol=1e-14)


def test_the_gradient_of_the_features_sums_to_that_of_the_vector_and_is_zero_without_weight() -> None:
    features, mask, grad = maps((4, 6), (13, 11), dtype=torch.float64)
    mask[..., :6, :] = 0
    _, grad_features, grad_mask = run(features, mask, grad)
    _, weights, _ = operator(features, mask)
    torch.testing.assert_close(grad_features.sum(dim=(2, 3)), grad)
    assert not bool(grad_features[(weights == 0)[:, None].expand_as(features)].any())
    assert bool((weights == 0).any())
    # A mask scaled gives the same vector.
    assert float((grad_mask * mask).sum(dim=(1, 2, 3)).abs().max()) < 1e-7


def test_transposed_maps_give_the_same_vector() -> None:
    features, mask, _ = maps((4, 6), (13, 11), dtype=torch.float64)
    pooled = masked_average_pool(features, mask)
    torch.testing.assert_close(masked_average_pool(features.mT, mask.mT), pooled)
    assert not torch.allclose(masked_average_pool(features.mT.contiguous().reshape(2, 5, 4, 6), mask), pooled)


# ------------------------------------------------------------------------------------------------ any layout


@settings(max_examples=300)
@given(data=st.data())
def test_agrees_with_the_written_out_form_whatever_the_arguments(data: st.DataObject) -> None:
    extents = st.sampled_from([1, 2, 3, 5, 8, 9, 16, 17, 20])
    draw = data.draw
    size = draw(st.tuples(extents, extents), label="size")
    mask_size = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)), label="mask size")
    features, mask, grad = maps(
        size,
        mask_size,
        batch=draw(st.integers(1, 3), label="batch"),
        channels=draw(st.integers(1, 27), label="channels"),
        dtype=draw(st.sampled_from(DTYPES), label="dtype"),
        mask_dtype=draw(st.sampled_from(MASKS), label="mask dtype"),
        seed=draw(st.integers(0, 1000), label="seed"),
    )
    features = draw(st.sampled_from(LAYOUTS), label="features")(features)
    mask = draw(st.sampled_from(MASK_LAYOUTS if mask.dtype in (torch.bool, torch.uint8) else LAYOUTS), label="mask")(
        mask
    )
    grad = draw(st.sampled_from([contiguous, lambda x: x.T.contiguous().T, expanded_columns]), label="grad")(grad)
    with threads(draw(st.sampled_from([1, 2]), label="threads")):
        check(features, mask, grad, draw(st.sampled_from(RESIZES), label="resize"))


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_neither_result_nor_arguments(layout: Callable[[Tensor], Tensor], resize: str) -> None:
    features, mask, grad = maps((5, 6), (17, 13))
    arguments = layout(features), layout(mask), grad
    before = [x.clone(memory_format=torch.contiguous_format) for x in arguments]
    for result, plain in zip(run(*arguments, resize), run(*before, resize), strict=True):
        torch.testing.assert_close(result, plain, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(x, copy) for x, copy in zip(arguments, before, strict=True))


@pytest.mark.parametrize("resize", RESIZES)
def test_a_lone_column_may_have_any_stride(resize: str) -> None:
    features, mask, grad = maps((3, 1), (5, 4), channels=2)
    apart = features.movedim(0, -1).contiguous().movedim(-1, 0)
    assert apart.stride(3) != 1 and apart.stride(1) != 1
    check(apart, mask, grad, resize)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_gradients_have_the_memory_format_of_the_features(layout: Callable[[Tensor], Tensor]) -> None:
    features, mask, grad = maps((5, 6), (17, 13))
    assert run(layout(features), mask, grad)[1].stride() == layout(features).stride()


# ------------------------------------------------------------------------------------------------ bit for bit


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced])
def test_the_number_of_threads_changes_no_bit(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, resize: str
) -> None:
    features, mask, grad = maps((33, 31), (90, 70), channels=37, dtype=dtype)
    results = []
    for count in (1, 2, 3, 7):
        with threads(count):
            results.append(run(layout(features), mask, grad, resize))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("device", ["cpu", cuda])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_a_sample_in_a_batch_is_the_sample_alone(layout: Callable[[Tensor], Tensor], device: str) -> None:
    features, mask, grad = maps((9, 14), (40, 50), batch=5, device=device)
    together = run(layout(features), mask, grad)
    for i in range(5):
        alone = run(layout(features)[i : i + 1], mask[i : i + 1], grad[i : i + 1])
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_repeated_and_deterministic_calls_agree_bit_for_bit(device: str) -> None:
    arguments = maps((33, 31), (90, 70), device=device)
    first = run(*arguments)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(*arguments), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------------------------ PyTorch's machinery


@pytest.mark.parametrize("resize", RESIZES)
def test_gradcheck_and_gradgradcheck(resize: str) -> None:
    features, mask, _ = maps((3, 4), (7, 6), channels=2, dtype=torch.float64, mask_dtype=torch.float64)
    function = partial(masked_average_pool, resize=resize)
    leaves = features.requires_grad_(), mask.requires_grad_()
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(lambda x: function(x, mask.detach() > 0.5), leaves[:1])


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last, every_other_column])
def test_opcheck(layout: Callable[[Tensor], Tensor], dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    features, mask, grad = maps((3, 4), (7, 6), dtype=dtype, mask_dtype=mask_dtype)
    features = layout(features)
    _, weights, total = operator(features, mask)
    for wanted in (0, 1, *((2, 3) if mask_dtype.is_floating_point else ())):
        torch.library.opcheck(backward_operator, (grad, features, mask, weights, total, False, wanted))
    raw = torch.ops.gingham._masked_average_pool.default
    torch.library.opcheck(raw, (features, mask, True), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(operator, (features.requires_grad_(), mask, False))
    if mask_dtype.is_floating_point:
        torch.library.opcheck(operator, (features, mask.requires_grad_(), True))


def test_either_argument_alone_may_require_grad() -> None:
    features, mask, grad = maps((4, 5), (9, 8))
    _, *expected = run(features, mask, grad)
    for which in (0, 1):
        arguments = [features, mask]
        arguments[which] = arguments[which].clone().requires_grad_()
        masked_average_pool(*arguments).backward(grad)
        assert torch.equal(arguments[which].grad, expected[which])


def test_no_graph_without_gradients() -> None:
    features, mask, _ = maps((4, 5), (9, 8))
    features.requires_grad_()
    with torch.no_grad():
        assert not masked_average_pool(features, mask).requires_grad
    assert masked_average_pool(features, mask).requires_grad
    assert not masked_average_pool(features.detach(), mask).requires_grad


def test_autocast_leaves_dtypes_alone() -> None:
    features, mask, _ = maps((4, 5), (9, 8))
    with torch.autocast("cpu", torch.bfloat16):
        for x in (features, features.bfloat16(), features.double()):
            for call in (masked_average_pool, lambda *arguments: operator(*arguments)[0]):
                assert call(x, mask).dtype == x.dtype


def test_vmap_and_func_grad() -> None:
    features, mask, grad = maps((4, 5), (9, 8), batch=6)
    stacked = features.unflatten(0, (3, 2)), mask.unflatten(0, (3, 2)).movedim(0, 2)
    mapped = torch.vmap(masked_average_pool, in_dims=(0, 2))(*stacked)
    torch.testing.assert_close(mapped.flatten(0, 1), masked_average_pool(features, mask))
    shared = torch.vmap(masked_average_pool, in_dims=(0, None))(stacked[0], mask[:2] > 0.5)
    for i in range(3):
        torch.testing.assert_close(shared[i], masked_average_pool(stacked[0][i], mask[:2] > 0.5))

    def loss(features: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        return (masked_average_pool(features, mask) * weight).sum()

    expected = run(features, mask, grad)[1:]
    for got, exact in zip(torch.func.grad(loss, argnums=(0, 1))(features, mask, grad), expected, strict=True):
        torch.testing.assert_close(got, exact)
    batched = [x.unflatten(0, (3, 2)) for x in (features, mask, grad)]
    for got, exact in zip(torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(*batched), expected, strict=True):
        torch.testing.assert_close(got.flatten(0, 1), exact)
    only_features = torch.vmap(torch.func.grad(loss))(*batched)
    torch.testing.assert_close(only_features.flatten(0, 1), expected[0])


@pytest.mark.parametrize("which", [0, 1])
def test_second_derivatives_pass_where_the_first_is_of_one_argument_alone(which: int) -> None:
    features, mask, weight = maps((4, 5), (9, 8), batch=4, dtype=torch.float64, mask_dtype=torch.float64)

    def of_gradient(function: Callable[..., Tensor]) -> Callable[..., Any]:
        def penalty(features: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
            first = torch.func.grad(lambda *x: (function(*x).square() * weight).sum(), argnums=which)
            return first(features, mask).square().sum()

        return torch.func.grad(penalty, argnums=(0, 1, 2))

    expected = of_gradient(reference.masked_average_pool)(features, mask, weight)
    assert all(float(x.abs().max()) > 1e-6 for x in expected)
    for got, exact in zip(of_gradient(masked_average_pool)(features, mask, weight), expected, strict=True):
        torch.testing.assert_close(got, exact)
    batched = [x.unflatten(0, (2, 2)) for x in (features, mask, weight)]
    for got, exact in zip(torch.vmap(of_gradient(masked_average_pool))(*batched), expected, strict=True):
        torch.testing.assert_close(got.flatten(0, 1), exact)


def _block(features: Tensor, mask: Tensor) -> Tensor:
    return 0.5 * masked_average_pool(features, mask).relu() + masked_average_pool(features, mask, resize="mask")


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool])
def test_compile_is_one_graph_with_dynamic_shapes(mask_dtype: torch.dtype) -> None:
    torch.compiler.reset()
    compiled = torch.compile(_block, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, size, mask_size in ((2, (4, 5), (9, 8)), (3, (7, 6), (3, 5)), (5, (3, 9), (20, 30))):
        features, mask, grad = maps(size, mask_size, batch=batch, mask_dtype=mask_dtype)
        results = []
        for function in (compiled, _block):
            leaf = features.clone().requires_grad_()
            output = function(leaf, mask)
            results.append((output, *torch.autograd.grad(output, leaf, grad)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


class _Block(torch.nn.Module):
    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        return _block(features, mask)


def test_export_with_dynamic_shapes() -> None:
    dims = {name: torch.export.Dim(name, min=1, max=64) for name in ("batch", "h", "w", "mh", "mw")}
    exported = torch.export.export(
        _Block(),
        maps((4, 5), (9, 8))[:2],
        dynamic_shapes={
            "features": {0: dims["batch"], 2: dims["h"], 3: dims["w"]},
            "mask": {0: dims["batch"], 2: dims["mh"], 3: dims["mw"]},
        },
    )
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch, size, mask_size in ((2, (4, 5), (9, 8)), (3, (7, 6), (3, 5)), (1, (9, 2), (20, 30))):
        arguments = maps(size, mask_size, batch=batch)[:2]
        torch.testing.assert_close(loaded(*arguments), _block(*arguments))


def test_meta_tensors_have_the_shapes_and_no_data() -> None:
    features, mask, _ = (x.to("meta") for x in maps((4, 5), (9, 8)))
    pooled = masked_average_pool(features, mask)
    assert pooled.is_meta
    assert pooled.shape == (2, 5)


def test_the_module_is_the_function() -> None:
    features, mask, _ = maps((4, 5), (9, 8))
    for resize in RESIZES:
        module = MaskedAveragePool(resize=resize)
        assert torch.equal(module(features, mask), masked_average_pool(features, mask, resize=resize))
        assert resize in repr(module)
    with pytest.raises(ValueError, match="resize must be 'features' or 'mask', got 'both'"):
        MaskedAveragePool(resize="both")


# ------------------------------------------------------------------------------------------------ other processes

INSTRUCTION_SET = """
import sys, torch
import ml_dtypes, gingham.array
from gingham.ops import masked_average_pool
results = []
for features, mask, grad, resize in torch.load(sys.argv[1]):
    leaves = [x.requires_grad_() for x in (features, mask) if x.is_floating_point()]
    pooled = masked_average_pool(features, mask, resize=resize)
    results.append([pooled.detach(), *torch.autograd.grad(pooled, leaves, grad)])
torch.save(results, sys.argv[2])
"""


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_agrees_with_the_written_out_form(name: str, tmp_path: Path) -> None:
    if name not in info()["instruction sets available"].split(", "):
        pytest.skip("this machine does not have it")
    cases = [
        (layout(features), mask, grad, resize)
        for size, mask_size in (((9, 33), (40, 70)), ((5, 2), (2, 9)))
        for dtype in kernels_of(name, DTYPES)
        for mask_dtype in (torch.bool, torch.float16, torch.float64)
        for layout in (contiguous, channels_last, sliced)
        for resize in RESIZES
        for features, mask, grad in (maps(size, mask_size, channels=21, dtype=dtype, mask_dtype=mask_dtype),)
    ]
    torch.save(cases, tmp_path / "arguments.pt")
    finished = run_python(
        INSTRUCTION_SET, str(tmp_path / "arguments.pt"), str(tmp_path / "results.pt"), GINGHAM_CPU=name
    )
    assert finished.returncode == 0, finished.stderr
    for case, results in zip(cases, torch.load(tmp_path / "results.pt"), strict=True):
        for which, result, exact in zip(NAMES, results, pooled_and_gradients(*case), strict=False):
            assert_within_bounds(which, result, exact, sums_dtype(case[0].dtype))


# ------------------------------------------------------------------------------------------------ arrays


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("mask_dtype", [np.float32, np.float16, np.bool_, np.uint8])
def test_arrays_give_what_tensors_give(dtype: Any, mask_dtype: Any) -> None:
    features, mask, _ = maps((9, 7), (20, 30), dtype=getattr(torch, np.dtype(dtype).name))
    mask = mask > 0.5 if mask_dtype == np.bool_ else (200 * mask if mask_dtype == np.uint8 else mask)
    array, mask_array = features.double().numpy().astype(dtype), mask.numpy().astype(mask_dtype)
    for resize in RESIZES:
        expected = masked_average_pool(features, torch.from_numpy(mask_array), resize=resize).double().numpy()
        for view in (
            array,
            np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1),
            array[:, :, ::-1][:, :, ::-1],
        ):
            got = array_pool(view, mask_array, resize=resize, threads=2)
            assert got.dtype == dtype
            np.testing.assert_allclose(got.astype(np.float64), expected, atol=1e-2 if got.itemsize == 2 else 1e-6)
    out = np.empty((5, 2), dtype=dtype).T
    assert array_pool(array, mask_array, out=out) is out
    np.testing.assert_array_equal(out, array_pool(array, mask_array))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": [1.0]}, TypeError, "features must be a NumPy or CuPy array, got list"),
        ({"features": np.ones((2, 3, 4))}, ValueError, r"features must be \[B, C, h, w\], got shape \(2, 3, 4\)"),
        ({"mask": np.ones((2, 1, 4, 5), dtype=np.int32)}, TypeError, "mask must be float32, .* or uint8 .*got int32"),
        ({"mask": np.ones((2, 2, 4, 5))}, ValueError, r"mask must be \[2, 1, H, W\] to match features"),
        ({"resize": "both"}, ValueError, "resize must be 'features' or 'mask', got 'both'"),
        ({"threads": 0}, ValueError, "threads must be a positive whole number"),
        ({"out": np.ones((2, 3))}, TypeError, "out must have the dtype of features"),
        ({"out": np.ones((3, 2), dtype=np.float32)}, ValueError, r"out must have the shape \(2, 3\)"),
    ],
)
def test_wrong_arrays(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"features": np.ones((2, 3, 4, 5), np.float32), "mask": np.ones((2, 1, 4, 5), np.float32)} | changes
    with pytest.raises(error, match=f"masked_average_pool: {message}"):
        array_pool(**arguments)


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": None}, TypeError, "features must be a tensor, got NoneType"),
        ({"features": torch.ones(2, 3, 4, 5, dtype=torch.int64)}, TypeError, "features must be float32.*got int64"),
        ({"features": torch.ones(2, 3, 4)}, ValueError, r"features must be \[B, C, h, w\], got float32 \[2, 3, 4\]"),
        ({"mask": [1.0]}, TypeError, "mask must be a tensor, got list"),
        (
            {"mask": torch.ones(2, 1, 6, 7, dtype=torch.int32)},
            TypeError,
            "mask must be float32.*bool or uint8, got int32",
        ),
        ({"mask": torch.ones(2, 6, 7)}, ValueError, r"mask must be \[2, 1, H, W\] to match features \[2, 3, 4, 5\]"),
        ({"mask": torch.ones(2, 2, 6, 7)}, ValueError, r"mask must be \[2, 1, H, W\]"),
        ({"mask": torch.ones(1, 1, 6, 7)}, ValueError, r"mask must be \[2, 1, H, W\]"),
        ({"mask": torch.ones(2, 1, 6, 7, device="meta")}, ValueError, "mask must be on the device of features"),
        ({"mask": torch.ones(2, 1, 6, 7).to_sparse()}, TypeError, "mask must be a dense tensor, got sparse_coo"),
        ({"resize": "both"}, ValueError, "resize must be 'features' or 'mask', got 'both'"),
        ({"resize": None}, ValueError, "resize must be 'features' or 'mask', got None"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str, requires_grad: bool) -> None:
    arguments: dict[str, Any] = {"features": torch.ones(2, 3, 4, 5), "mask": torch.ones(2, 1, 6, 7)} | changes
    if requires_grad:
        arguments = {
            name: x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in arguments.items()
        }
    with pytest.raises(error, match=f"masked_average_pool: {message}"):
        masked_average_pool(**arguments)


def test_the_operator_itself_checks_its_arguments() -> None:
    features, mask, grad = maps((4, 5), (9, 8))
    _, weights, total = operator(features, mask)
    raw = torch.ops.gingham._masked_average_pool_backward.default
    with pytest.raises(RuntimeError, match=r"mask must be \[B, 1, H, W\]"):
        torch.ops.gingham._masked_average_pool(features, mask[:1])
    with pytest.raises(RuntimeError, match="weights must be what the forward returned"):
        raw(grad, features, mask, weights[:1], total, False, 3)
    with pytest.raises(RuntimeError, match=r"grad_pooled must be \[B, C\]"):
        raw(grad.double(), features, mask, weights, total, False, 3)
    with pytest.raises(RuntimeError, match="a mask of whole numbers has no gradient"):
        raw(grad, features, mask > 0.5, weights, total, False, 2)


# ------------------------------------------------------------------------------------------------ CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "mask_size"), [((5, 6), (17, 13)), ((1, 7), (3, 2)), ((47, 63), (375, 500))])
def test_cuda_agrees_with_the_written_out_form(
    size: tuple[int, int],
    mask_size: tuple[int, int],
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    resize: str,
) -> None:
    for mask_dtype in (torch.float32, torch.bool):
        features, mask, grad = maps(size, mask_size, dtype=dtype, mask_dtype=mask_dtype, device="cuda")
        check(layout(features), mask, grad, resize)


@pytest.mark.cuda
def test_cuda_opcheck_and_gradcheck() -> None:
    features, mask, _ = maps((3, 4), (7, 6), channels=2, dtype=torch.float64, mask_dtype=torch.float64, device="cuda")
    leaves = features.requires_grad_(), mask.requires_grad_()
    torch.library.opcheck(operator, (*leaves, False))
    torch.autograd.gradcheck(masked_average_pool, leaves)
    # The second derivative goes through the interpolation of PyTorch, whose backward adds in any order.
    torch.autograd.gradgradcheck(masked_average_pool, leaves, nondet_tol=1e-12)
