"""torch.ops.gingham.criss_cross_attention and the function on top of it, against masked full attention in float64."""

from __future__ import annotations

import io
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from gingham import info, reference
from gingham.array import criss_cross_attention as array_attention
from gingham.ops import criss_cross_attention
from oracles.conditions import kernels_of, run_python, threads
from oracles.dense_attention import (
    Quantity,
    crosses,
    dense_attention,
    dense_attention_and_gradients,
    dense_weights,
)
from oracles.layouts import (
    LAYOUTS,
    channels_last,
    contiguous,
    every_other_column,
    expanded_batch,
    sliced,
    transposed,
)

# How far a result may be from the exact one: `storage` epsilons of its dtype, relative to the sum of its absolute
# terms, and `sums` epsilons of the dtype of the sums, relative to that sum times the position's largest logit.
# Elementwise: nothing is averaged away.
#                  storage  sums
BOUNDS = {
    torch.float64: (4.0, 4.0),
    torch.float32: (4.0, 4.0),
    torch.float16: (3.0, 4.0),
    torch.bfloat16: (3.0, 4.0),
}
# Tensor cores cut their sums off instead of rounding them.
CUDA_BOUNDS = BOUNDS | {torch.float32: (6.0, 4.0)}
DTYPES = list(BOUNDS)
NAMES = ("output", "grad_query", "grad_key", "grad_value")

operator = torch.ops.gingham.criss_cross_attention.default
backward_operator = torch.ops.gingham.criss_cross_attention_backward.default
cuda = pytest.param("cuda", marks=pytest.mark.cuda)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_within_bounds(name: str, got: Tensor, expected: Quantity, dtype: torch.dtype) -> None:
    storage, sums = (CUDA_BOUNDS if got.is_cuda else BOUNDS)[dtype]
    bound = storage * torch.finfo(dtype).eps * expected.size
    bound = bound + sums * torch.finfo(sums_dtype(dtype)).eps * expected.logit_size
    bound = bound + 4 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps + torch.finfo(dtype).tiny * 2**-10
    error = (got.detach().cpu().double() - expected.exact).abs()
    assert got.shape == expected.exact.shape
    assert got.dtype == dtype
    assert bool((error <= bound).all()), (
        f"{name}: {float((error / bound).nan_to_num(math.inf).max()):.2f} times the bound"
    )


def run(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Output and gradients of query, key and value, which may be views of any kind."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output = criss_cross_attention(*leaves, scale=scale)
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output)


def check(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, scale: float = 1.0) -> tuple[Tensor, ...]:
    got = run(query, key, value, grad_output, scale)
    expected = dense_attention_and_gradients(query, key, value, grad_output, scale)
    for name, result, exact in zip(NAMES, got, expected, strict=True):
        assert_within_bounds(name, result, exact, value.dtype)
    return got


def maps(
    *size: int,
    batch: int = 2,
    key_channels: int = 5,
    value_channels: int = 7,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> list[Tensor]:
    """Query, key, value and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    channels = (key_channels, key_channels, value_channels, value_channels)
    return [torch.randn(batch, c, *size, generator=generator).to(device, dtype) for c in channels]


# ------------------------------------------------------------------------------------------------ golden values


def test_uniform_attention_gives_the_golden_values() -> None:
    value = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]).reshape(1, 1, 2, 3)
    none = torch.zeros(1, 2, 2, 3)
    golden = torch.tensor([[1.5, 2.75, 4.0], [6.0, 7.25, 8.5]]).reshape(1, 1, 2, 3)
    torch.testing.assert_close(criss_cross_attention(none, none, value) + value, golden)

    golden = torch.tensor([[5.0625, 6.625, 8.1875], [11.8125, 13.375, 14.9375]]).reshape(1, 1, 2, 3)
    once = criss_cross_attention(none, none, value) + value
    torch.testing.assert_close(criss_cross_attention(none, none, once) + once, golden)


@pytest.mark.parametrize(("size", "positions"), [((5, 6), 10), ((4, 5, 6), 13), ((1, 6), 6), ((1, 1, 1), 1)])
def test_pixel_counts_itself_once(size: tuple[int, ...], positions: int) -> None:
    assert int(crosses(size).sum(dim=-1).unique()) == positions
    none = torch.zeros(1, 3, *size, dtype=torch.float64)
    itself = torch.eye(math.prod(size), dtype=torch.float64).reshape(1, math.prod(size), *size)
    weights = criss_cross_attention(none, none, itself)  # [1, p, *u]: what u gives to p
    torch.testing.assert_close(weights.flatten(2)[0].T, crosses(size).double() / positions)


@pytest.mark.parametrize("size", [(5, 6), (3, 4, 5)])
def test_weights_of_a_position_sum_to_one_and_stay_on_its_cross(size: tuple[int, ...]) -> None:
    query, key, _, _ = maps(*size, batch=1, dtype=torch.float64)
    itself = torch.eye(math.prod(size), dtype=torch.float64).reshape(1, math.prod(size), *size)
    weights = criss_cross_attention(query, key, itself).flatten(2)[0].T
    torch.testing.assert_close(weights, dense_weights(query, key)[0])
    assert bool((weights[~crosses(size)] == 0).all())
    assert bool((weights[crosses(size)] > 0).all())
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(math.prod(size), dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_second_result_is_the_log_sum_exp_in_float64(dtype: torch.dtype) -> None:
    query, key, value, _ = maps(4, 7, dtype=dtype)
    _, lse = operator(query, key, value, 0.7)
    logits = 0.7 * torch.einsum("bcu,bcp->bup", query.double().flatten(2), key.double().flatten(2))
    exact = logits.masked_fill(~crosses((4, 7)), -math.inf).logsumexp(dim=-1).reshape(2, 4, 7)
    assert lse.dtype == torch.float64
    torch.testing.assert_close(lse, exact, rtol=1e-5, atol=1e-5)


def test_the_written_out_gradients_of_the_oracle_are_those_of_autograd() -> None:
    query, key, value, grad = maps(3, 4, 5, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    gradients = torch.autograd.grad(dense_attention(*leaves, scale=0.3), leaves, grad)
    written_out = dense_attention_and_gradients(query, key, value, grad, 0.3)[1:]
    for by_autograd, by_hand in zip(gradients, written_out, strict=True):
        torch.testing.assert_close(by_autograd, by_hand.exact)


@pytest.mark.parametrize("size", [(3, 4, 5), (5, 6), (1, 7), (7, 1), (1, 1), (1, 4, 5), (4, 5, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_agrees_with_the_oracle(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    query, key, value, grad = maps(*size, dtype=dtype)
    expected = dense_attention_and_gradients(query, key, value, grad, 0.4).output
    assert_within_bounds("reference", reference.criss_cross_attention(query, key, value, scale=0.4), expected, dtype)


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size",
    [
        (5, 6),
        (1, 7),
        (7, 1),
        (1, 1),
        (2, 2),
        (9, 3),
        (31, 33),
        (33, 31),
        (16, 17),
        (4, 5, 6),
        (1, 5, 6),
        (4, 1, 6),
        (4, 5, 1),
        (6, 1, 1),
        (1, 1, 1),
        (7, 2, 33),
    ],
)
def test_agrees_with_dense_attention(size: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*maps(*size, dtype=dtype), scale=0.8)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [((97, 31), torch.float32), ((31, 97), torch.bfloat16), ((33, 2, 33), torch.float16)]
    + [(size, dtype) for size in ((1, 257), (257, 1)) for dtype in DTYPES],
)
def test_agrees_with_dense_attention_on_long_lines(size: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*maps(*size, batch=1, key_channels=13, value_channels=19, dtype=dtype), scale=0.3)


def test_agrees_with_the_reference_on_the_map_of_the_paper() -> None:
    query, key, value, grad = maps(97, 97, batch=1, key_channels=64, value_channels=65)
    got = run(query, key, value, grad, 0.125)
    leaves = [x.double().requires_grad_() for x in (query, key, value)]
    output = reference.criss_cross_attention(*leaves, scale=0.125)
    for result, exact in zip(got, (output, *torch.autograd.grad(output, leaves, grad.double())), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("key_channels", "value_channels"), [(1, 1), (3, 2), (8, 64), (17, 9), (24, 25), (129, 3), (2, 130), (64, 512)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_channels(key_channels: int, value_channels: int, dtype: torch.dtype) -> None:
    arguments = maps(6, 11, key_channels=key_channels, value_channels=value_channels, dtype=dtype)
    check(*arguments, scale=0.2)
    check(*(x.contiguous(memory_format=torch.channels_last) for x in arguments), scale=0.2)


@pytest.mark.parametrize(
    ("batch", "value_channels", "size"), [(9000, 1, (4, 6)), (1, 66_000, (2, 3)), (66_000, 1, (1, 2))]
)
def test_more_maps_than_a_grid_axis_holds(batch: int, value_channels: int, size: tuple[int, ...]) -> None:
    check(*maps(*size, batch=batch, key_channels=1, value_channels=value_channels))


def test_no_value_channels() -> None:
    output, *grads = run(*maps(4, 5, value_channels=0))
    assert output.shape == (2, 0, 4, 5)
    assert all(bool((grad == 0).all()) for grad in grads)
    assert [grad.shape[1] for grad in grads] == [5, 5, 0]


@pytest.mark.parametrize("size", [(4, 5), (0, 5), (4, 0), (3, 4, 5), (0, 4, 5), (3, 0, 0)])
def test_empty_maps(size: tuple[int, ...]) -> None:
    batch = 0 if all(size) else 2
    results = run(*maps(*size, batch=batch))
    assert [result.shape for result in results] == [(batch, c, *size) for c in (7, 5, 5, 7)]


def test_one_pixel_gives_its_value_and_no_gradient_to_query_and_key() -> None:
    query, key, value, grad = maps(1, 1)
    output, grad_query, grad_key, grad_value = run(query, key, value, grad)
    torch.testing.assert_close(output, value, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad_value, grad, rtol=1e-6, atol=0)
    assert float(grad_query.abs().max()) < 1e-5
    assert float(grad_key.abs().max()) < 1e-5


def test_a_single_row_or_column_is_ordinary_attention() -> None:
    for size in ((1, 9), (9, 1)):
        query, key, value, _ = maps(*size)
        plain = torch.nn.functional.scaled_dot_product_attention(
            *(x.flatten(2).transpose(1, 2) for x in (query, key, value)), scale=1.0
        )
        output = criss_cross_attention(query, key, value)
        torch.testing.assert_close(output.flatten(2).transpose(1, 2), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_three_dimensions_with_one_axis_of_size_one_are_two(axis: int) -> None:
    flat = maps(5, 6)
    deep = [x.unsqueeze(axis) for x in flat]
    for in_3d, in_2d in zip(run(*deep, 0.6), run(*flat, 0.6), strict=True):
        torch.testing.assert_close(in_3d.squeeze(axis), in_2d, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ behaviour


def test_constant_values_stay_constant() -> None:
    query, key, _, _ = maps(5, 6, batch=1)
    torch.testing.assert_close(
        criss_cross_attention(query, key, torch.full((1, 3, 5, 6), 2.5)), torch.full((1, 3, 5, 6), 2.5)
    )


@pytest.mark.parametrize("axes", [(2, 3), (2, 4), (3, 4)])
def test_transposed_maps_give_transposed_results(axes: tuple[int, int]) -> None:
    arguments = maps(3, 5, 6, dtype=torch.float64)
    turned = [x.transpose(*axes).contiguous() for x in arguments]
    for plain, of_turned in zip(run(*arguments), run(*turned), strict=True):
        torch.testing.assert_close(of_turned, plain.transpose(*axes))


@pytest.mark.parametrize("axis", [2, 3])
def test_rows_and_columns_may_be_permuted(axis: int) -> None:
    arguments = maps(7, 6, dtype=torch.float64)
    order = torch.randperm(arguments[0].size(axis), generator=torch.Generator().manual_seed(1))
    for plain, permuted in zip(run(*arguments), run(*(x.index_select(axis, order) for x in arguments)), strict=True):
        torch.testing.assert_close(permuted, plain.index_select(axis, order))


@pytest.mark.parametrize(("size", "reach"), [((5, 6), (10, 30, 30)), ((4, 5, 6), (13, 60, 120))])
def test_each_application_widens_the_receptive_field(size: tuple[int, ...], reach: tuple[int, ...]) -> None:
    features = torch.randn(
        1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    x = features
    for expected in reach:
        x = x + criss_cross_attention(x, x, x)
        corner = x[(0, slice(None), *(extent // 2 for extent in size))].sum()
        (gradient,) = torch.autograd.grad(corner, features, retain_graph=True)
        assert int((gradient.abs().sum(dim=1) > 0).sum()) == expected


def test_scale_multiplies_the_logits_and_nothing_else_does() -> None:
    query, key, value, _ = maps(5, 6, dtype=torch.float64)
    scaled = criss_cross_attention(query, key, value, scale=9.0)
    torch.testing.assert_close(scaled, criss_cross_attention(3 * query, 3 * key, value))
    assert not torch.allclose(scaled, criss_cross_attention(query, key, value))
    torch.testing.assert_close(
        criss_cross_attention(query, key, value, scale=0.0), criss_cross_attention(0 * query, key, value)
    )
    torch.testing.assert_close(
        criss_cross_attention(query, key, value, scale=-1.0), criss_cross_attention(-query, key, value)
    )


@pytest.mark.parametrize("size", [(5, 6), (11, 19)])
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-60, -1e-60])
def test_a_scale_of_nothing_gives_the_mean_of_the_cross(scale: float, size: tuple[int, int]) -> None:
    query, key, value, grad = maps(*size)
    for got, even in zip(run(query, key, value, grad, scale), run(0 * query, 0 * key, value, grad), strict=True):
        torch.testing.assert_close(got, even)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_beyond_the_range_of_half_precision(dtype: torch.dtype) -> None:
    query, key, value, grad = maps(5, 6, key_channels=64, dtype=dtype)
    query, key = (60 * x.sign() for x in (query, key))
    results = check(query, key, value, grad)
    assert all(bool(result.isfinite().all()) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [60.0, 1000.0])
def test_large_equal_logits_weigh_the_cross_evenly(dtype: torch.dtype, magnitude: float) -> None:
    _, _, value, grad = maps(5, 18, dtype=dtype)
    constant = torch.full((2, 64, 5, 18), magnitude, dtype=dtype)
    large = run(constant, constant, value, grad)
    even = dense_attention_and_gradients(0 * constant, 0 * constant, value, grad)
    # Of float64 the log-sum-exp keeps what one float64 has room for.
    tolerance = 1e-7 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    for got, wanted in ((large[0], even[0]), (large[3], even[3])):
        torch.testing.assert_close(got.double(), wanted.exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(601, 2), (2, 601), (290, 3), (2, 1, 301), (305, 2), (2, 305)])
def test_lines_that_are_taken_in_segments(size: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    tensors = maps(*size, batch=1, dtype=dtype)
    if layout == "channels_last":
        tensors = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in tensors]
    check(*tensors)


@pytest.mark.parametrize("size", [(99, 184), (67, 160), (100, 132)])
def test_scratch_of_two_threads_is_enough(size: tuple[int, int]) -> None:  # these fill it with panels of odd lengths
    query, key, value, grad = maps(*size, batch=1, value_channels=16, dtype=torch.bfloat16)
    with threads(2):
        got = run(query, key, value, grad)
    with threads(1):
        assert all(torch.equal(a, b) for a, b in zip(got, run(query, key, value, grad), strict=True))
    leaves = [x.double().requires_grad_() for x in (query, key, value)]
    output = reference.criss_cross_attention(*leaves)
    exact = (output.detach(), *torch.autograd.grad(output, leaves, grad.double()))
    for result, expected in zip(got, exact, strict=True):
        assert float((result.double() - expected).abs().max() / expected.abs().max()) < 0.02


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak of memory")
def test_memory_does_not_grow_with_the_square_of_a_line() -> None:
    def kilobytes(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    tensors = maps(4096, 8, batch=1, key_channels=2, value_channels=2)  # 256 MB of logits in a column
    with threads(1):
        run(*(x[:, :, :8] for x in tensors))
        Path("/proc/self/clear_refs").write_text("5")
        before = kilobytes("VmRSS")
        run(*tensors)
        assert kilobytes("VmHWM") - before < 32 * 1024


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_or_column_may_have_infinitely_small_logits_only(dtype: torch.dtype, transposed: bool) -> None:
    _, _, value, grad = maps(5, 18, dtype=dtype)
    query, key = torch.ones(2, 1, 5, 18, dtype=dtype), torch.zeros(2, 1, 5, 18, dtype=dtype)
    key[:, :, 2] = -math.inf
    tensors = [x.mT if transposed else x for x in (query, key, value, grad)]
    output, _, _, grad_value = run(*tensors)
    exact = reference.criss_cross_attention(*(x.double() for x in tensors[:3]))
    assert bool(exact.isfinite().all())
    torch.testing.assert_close(output.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    assert bool(grad_value.isfinite().all())


@pytest.mark.parametrize("size", [(3, 4), (11, 19)])
def test_a_cross_of_infinitely_small_logits_is_nan(size: tuple[int, int]) -> None:
    query, key, value, _ = maps(*size)
    assert bool(criss_cross_attention(query.abs() + 1, 0 * key - math.inf, value).isnan().all())


@pytest.mark.parametrize("size", [(3, 4), (11, 19)])
def test_a_scale_of_nothing_does_not_hide_what_is_not_a_number(size: tuple[int, int]) -> None:
    query, key, value, _ = maps(*size)
    query[0, 0, 0, 0] = math.nan
    assert bool(criss_cross_attention(query, key, value, scale=0.0)[0, :, 0, 0].isnan().all())


def test_large_logits_pick_one_position() -> None:
    query, key, value, _ = maps(5, 6, dtype=torch.float64)
    weights = dense_weights(query, key)
    chosen = value.flatten(2).gather(2, weights.argmax(dim=-1, keepdim=True).transpose(1, 2).expand(2, 7, 30))
    torch.testing.assert_close(criss_cross_attention(query, key, value, scale=1e6).flatten(2), chosen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(4))
def test_a_pixel_that_is_not_a_number_spoils_what_depends_on_it_and_no_later_call(
    which: int, dtype: torch.dtype
) -> None:
    clean = maps(9, 17, batch=1, dtype=dtype)
    before = run(*clean)
    spoilt = [x.clone() for x in clean]
    spoilt[which][0, 2, 3, 4] = math.nan
    got = run(*spoilt)
    leaves = [x.clone().requires_grad_() for x in spoilt[:3]]
    output = reference.criss_cross_attention(*leaves)
    expected = (output, *torch.autograd.grad(output, leaves, spoilt[3]))
    for name, result, exact in zip(NAMES, got, expected, strict=True):
        assert torch.equal(result.isnan(), exact.isnan()), name
    assert all(torch.equal(a, b) for a, b in zip(before, run(*clean), strict=True))  # scratch memory is used again


# ------------------------------------------------------------------------------------------------ any layout


@settings(max_examples=400)
@given(data=st.data())
def test_agrees_with_dense_attention_whatever_the_arguments(data: st.DataObject) -> None:
    extents = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 20])
    size = data.draw(st.lists(extents, min_size=2, max_size=3).filter(lambda s: math.prod(s) <= 400), label="size")
    arguments = maps(
        *size,
        batch=data.draw(st.integers(1, 3), label="batch"),
        key_channels=data.draw(st.integers(1, 27), label="key channels"),
        value_channels=data.draw(st.integers(1, 27), label="value channels"),
        dtype=data.draw(st.sampled_from(DTYPES), label="dtype"),
        seed=data.draw(st.integers(0, 1000), label="seed"),
    )
    layouts = [data.draw(st.sampled_from(LAYOUTS), label=name) for name in ("query", "key", "value", "grad output")]
    scale = data.draw(st.sampled_from([1.0, 0.25, 0.0, -0.7, 1.9]), label="scale")
    with threads(data.draw(st.sampled_from([1, 2]), label="threads")):
        check(*(layout(x) for layout, x in zip(layouts, arguments, strict=True)), scale=scale)


@pytest.mark.parametrize("size", [(5, 6), (3, 5, 6)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_neither_result_nor_arguments(layout: Callable[[Tensor], Tensor], size: tuple[int, ...]) -> None:
    arguments = [layout(x) for x in maps(*size)]
    before = [x.clone(memory_format=torch.contiguous_format) for x in arguments]
    got = run(*arguments)
    for name, result, plain in zip(NAMES, got, run(*before), strict=True):
        torch.testing.assert_close(result, plain, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for x, copy in zip(arguments, before, strict=True):
        assert torch.equal(x, copy)


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_offsets_past_two_to_the_31(layout: Callable[[Tensor], Tensor], axis: int) -> None:
    innermost = 3 if layout is contiguous else 1
    if axis == innermost:
        pytest.skip("a step of this axis is copied, not read in place")
    arguments = [layout(x) for x in maps(4, 5, batch=2, key_channels=2, value_channels=3, dtype=torch.bfloat16)]
    far = []
    for x in arguments:
        strides = list(x.stride())
        strides[axis] = 2**31 // (x.shape[axis] - 1) + 64
        last = sum((extent - 1) * stride for extent, stride in zip(x.shape, strides, strict=True))
        assert last > 2**31
        far.append(x.new_empty(last + 1).as_strided(x.shape, strides).copy_(x))  # only the pages written become real
    for got, near in zip(run(*far), run(*arguments), strict=True):
        assert torch.equal(got, near)


def test_negated_views() -> None:
    query, key, value, grad = maps(5, 6)
    negated = [torch.complex(torch.zeros_like(x), -x).conj().imag for x in (query, key, value, grad)]
    assert all(x.is_neg() for x in negated)
    for got, plain in zip(run(*negated), run(query, key, value, grad), strict=True):
        torch.testing.assert_close(got, plain)


def test_results_have_the_memory_format_of_value() -> None:
    query, key, value, grad = maps(5, 6)
    for result in run(query, key, value.contiguous(memory_format=torch.channels_last), grad):
        assert result.is_contiguous(memory_format=torch.channels_last)
    for result in run(query.contiguous(memory_format=torch.channels_last), key, value, grad):
        assert result.is_contiguous()
    query, key, value, grad = maps(3, 5, 6)
    for result in run(query, key, value.contiguous(memory_format=torch.channels_last_3d), grad):
        assert result.is_contiguous(memory_format=torch.channels_last_3d)


# ------------------------------------------------------------------------------------------------ bit for bit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_the_number_of_threads_changes_no_bit(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    for size in ((33, 31), (3, 9, 17)):
        arguments = [layout(x) for x in maps(*size, batch=3, dtype=dtype)]
        results = []
        for count in (1, 2, 3, 7):
            with threads(count):
                results.append(run(*arguments))
        for others in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize(("batch", "size"), [(3, (9, 14)), (17, (4, 33)), (5, (3, 4, 9))])
def test_a_sample_in_a_batch_is_the_sample_alone(
    batch: int, size: tuple[int, ...], layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    arguments = [layout(x) for x in maps(*size, batch=batch, dtype=dtype)]
    together = run(*arguments)
    for sample in range(batch):
        alone = run(*(x[sample : sample + 1] for x in arguments))
        assert all(torch.equal(a, b[sample : sample + 1]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_repeated_calls_agree_bit_for_bit(device: str) -> None:
    arguments = maps(33, 31, batch=3, device=device)
    first = run(*arguments)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(*arguments), strict=True))


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_deterministic_algorithms_may_be_asked_for(device: str) -> None:
    arguments = maps(9, 14, device=device)
    free = run(*arguments)
    torch.use_deterministic_algorithms(True)
    try:
        results = [run(*arguments) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    for a, b in zip(results[0], free, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ PyTorch's machinery


@pytest.mark.parametrize("size", [(3, 4), (2, 3, 4)])
def test_gradcheck_and_gradgradcheck(size: tuple[int, ...]) -> None:
    leaves = [
        x.requires_grad_() for x in maps(*size, batch=1, key_channels=2, value_channels=3, dtype=torch.float64)[:3]
    ]

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return criss_cross_attention(query, key, value, scale=0.3)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last, every_other_column])
@pytest.mark.parametrize("size", [(3, 4), (2, 3, 4)])
def test_opcheck(size: tuple[int, ...], layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    query, key, value, grad = (layout(x) for x in maps(*size, dtype=dtype))
    output, lse = operator(query, key, value, 0.5)
    torch.library.opcheck(backward_operator, (grad, query, key, value, output, lse, 0.5))
    raw = torch.ops.gingham._criss_cross_attention.default
    torch.library.opcheck(raw, (query, key, value, 0.5), test_utils=("test_schema", "test_faketensor"))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(operator, (*leaves, 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_the_eager_path_is_the_registered_formula(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    query, key, value, grad = (layout(x) for x in maps(5, 6, dtype=dtype))
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output, _ = operator(*leaves, 0.5)
    registered = (output, *torch.autograd.grad(output, leaves, grad))
    for eager, formula in zip(run(query, key, value, grad, 0.5), registered, strict=True):
        assert torch.equal(eager, formula)
        assert eager.stride() == formula.stride()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_argument_alone_may_require_grad(which: int) -> None:
    query, key, value, grad = maps(4, 5)
    everything = run(query, key, value, grad)
    arguments = [query, key, value]
    arguments[which] = arguments[which].clone().requires_grad_()
    criss_cross_attention(*arguments).backward(grad)
    assert torch.equal(arguments[which].grad, everything[1 + which])


def test_an_expanded_gradient_of_the_output() -> None:
    query, key, value, grad = maps(4, 5)
    for by_sum, by_ones in zip(
        run(query, key, value, torch.ones(()).expand_as(grad)),
        run(query, key, value, torch.ones_like(grad)),
        strict=True,
    ):
        torch.testing.assert_close(by_sum, by_ones)


def test_no_graph_without_gradients() -> None:
    leaves = [x.requires_grad_() for x in maps(4, 5)[:3]]
    with torch.no_grad():
        assert not criss_cross_attention(*leaves).requires_grad
    with torch.inference_mode():
        assert criss_cross_attention(*leaves).is_inference()
    assert criss_cross_attention(*leaves).requires_grad


def test_arguments_changed_before_backward_are_noticed() -> None:
    query, key, value, grad = maps(4, 5)
    value = value.requires_grad_()
    output = criss_cross_attention(query, key, value)
    query.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", cuda])
def test_autocast_casts_the_arguments(device: str, dtype: torch.dtype) -> None:
    query, key, value, grad = maps(5, 6, device=device)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    low = run(query.to(dtype), key.to(dtype), value.to(dtype), grad.to(dtype))
    for call in (criss_cross_attention, lambda *x: operator(*x, 1.0)[0]):
        with torch.autocast(device, dtype):
            output = call(*leaves)
        assert output.dtype == dtype
        grads = torch.autograd.grad(output, leaves, grad.to(dtype))
        for got, expected in zip((output, *grads), low, strict=True):
            assert torch.equal(got.to(dtype), expected)
        assert all(x.dtype == torch.float32 for x in grads)


def test_autocast_takes_mixed_dtypes_and_leaves_float64_alone() -> None:
    query, key, value, _ = maps(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert criss_cross_attention(query, key.bfloat16(), value).dtype == torch.bfloat16
        assert criss_cross_attention(query.double(), key.double(), value.double()).dtype == torch.float64


def test_vmap() -> None:
    query, key, value, _ = maps(4, 5, batch=6)
    queries, values = query.unflatten(0, (3, 2)), value.unflatten(0, (3, 2)).movedim(0, 2)
    mapped = torch.vmap(criss_cross_attention, in_dims=(0, None, 2))(queries, key[:2], values)
    for i in range(3):
        torch.testing.assert_close(mapped[i], criss_cross_attention(queries[i], key[:2], values[:, :, i]))


def test_func_grad_and_vmap_over_it() -> None:
    query, key, value, grad = maps(4, 5, batch=6)

    def loss(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
        return (criss_cross_attention(query, key, value, scale=0.5) * weight).sum()

    expected = run(query, key, value, grad, 0.5)[1:]
    for got, exact in zip(torch.func.grad(loss, argnums=(0, 1, 2))(query, key, value, grad), expected, strict=True):
        torch.testing.assert_close(got, exact)
    batched = [x.unflatten(0, (3, 2)) for x in (query, key, value, grad)]
    for got, exact in zip(torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*batched), expected, strict=True):
        torch.testing.assert_close(got.flatten(0, 1), exact)


def test_jacobian_of_the_values_is_the_attention_matrix() -> None:
    query, key, value, _ = maps(3, 4, batch=1, value_channels=1, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda v: criss_cross_attention(query, key, v))(value)
    torch.testing.assert_close(jacobian.reshape(12, 12), dense_weights(query, key)[0])


def test_func_second_derivatives_and_vmap_over_them() -> None:
    query, key, value, grad = maps(3, 4, batch=4, dtype=torch.float64)

    def penalty(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def of_gradients(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
            gradients = torch.func.grad(lambda *x: (function(*x, scale=0.5) * weight).sum(), argnums=(0, 1, 2))
            return torch.stack([x.square().sum() for x in gradients(query, key, value)]).sum()

        return torch.func.grad(of_gradients, argnums=(0, 1, 2, 3))

    expected = penalty(reference.criss_cross_attention)(query, key, value, grad)
    for got, exact in zip(penalty(criss_cross_attention)(query, key, value, grad), expected, strict=True):
        torch.testing.assert_close(got, exact)
    batched = [x.unflatten(0, (2, 2)) for x in (query, key, value, grad)]
    for got, exact in zip(torch.vmap(penalty(criss_cross_attention))(*batched), expected, strict=True):
        torch.testing.assert_close(got.flatten(0, 1), exact)


def _block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return value + 0.5 * criss_cross_attention(query, key, value, scale=0.5).relu()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_is_one_graph_with_dynamic_shapes(backend: str) -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if backend == "inductor" and not compiler:
        pytest.skip("inductor needs a C++ compiler on PATH")
    torch.compiler.reset()
    compiled = torch.compile(_block, backend=backend, fullgraph=True, dynamic=True)
    for batch, size in ((2, (4, 5)), (3, (7, 6)), (5, (3, 9))):
        query, key, value, grad = maps(*size, batch=batch)
        got, expected = [], []
        for function, results in ((compiled, got), (_block, expected)):
            leaves = [x.clone().requires_grad_() for x in (query, key, value)]
            output = function(*leaves)
            results += [output, *torch.autograd.grad(output, leaves, grad)]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", [contiguous, channels_last, every_other_column])
@pytest.mark.parametrize("size", [(4, 5), (3, 4, 5)])
def test_compiled_results_are_the_eager_ones_in_any_layout(
    size: tuple[int, ...], layout: Callable[[Tensor], Tensor]
) -> None:
    torch.compiler.reset()
    compiled = torch.compile(criss_cross_attention, backend="aot_eager", fullgraph=True)
    query, key, value, grad = (layout(x) for x in maps(*size))
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output = compiled(*leaves, scale=0.5)
    results = (output, *torch.autograd.grad(output, leaves, grad))
    for got, eager in zip(results, run(query, key, value, grad, 0.5), strict=True):
        assert torch.equal(got, eager)
    assert output.stride() == run(query, key, value, grad, 0.5)[0].stride()


def test_compile_says_what_is_wrong_with_an_argument() -> None:
    torch.compiler.reset()
    query, key, value, _ = maps(4, 5)
    with pytest.raises(ValueError, match=r"criss_cross_attention: key must be \[2, 5, 4, 5\]"):
        torch.compile(criss_cross_attention, backend="eager")(query, key[:, :3], value)


def test_compile_under_autocast() -> None:
    torch.compiler.reset()
    compiled = torch.compile(_block, backend="aot_eager", fullgraph=True)
    query, key, value, _ = maps(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(query, key, value), _block(query, key, value))


class _Block(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _block(query, key, value)


@pytest.mark.parametrize("frames", [(), (3,)])
def test_export_with_dynamic_batch_height_and_width(frames: tuple[int, ...]) -> None:
    names = ("batch", "frames", "height", "width") if frames else ("batch", "height", "width")
    axes = (0, *range(2, len(names) + 1))
    dynamic = {axis: torch.export.Dim(name, min=1, max=64) for axis, name in zip(axes, names, strict=True)}
    exported = torch.export.export(
        _Block(), tuple(maps(*frames, 4, 5)[:3]), dynamic_shapes={"query": dynamic, "key": dynamic, "value": dynamic}
    )
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch_size, size in ((2, (4, 5)), (3, (7, 6)), (1, (9, 2))):
        arguments = maps(*(extent + 1 for extent in frames), *size, batch=batch_size)[:3]
        torch.testing.assert_close(loaded(*arguments), _block(*arguments))


# ------------------------------------------------------------------------------------------------ other processes


MEMORY = """
import resource, torch
from gingham.array import criss_cross_attention as array_attention
from gingham.ops import criss_cross_attention
torch.set_num_threads(2)
def step(query, key, value):
    leaves = [x.requires_grad_() for x in (query, key, value)]
    output = criss_cross_attention(*leaves)
    return torch.autograd.grad(output, leaves, torch.ones_like(output))
step(*torch.randn(3, 1, 8, 97, 9))
arguments = torch.randn(3, 16, 8, 97, 97).unbind()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
results = step(*arguments)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer keeps freed memory")
def test_no_attention_weights_are_stored() -> None:
    finished = run_python(MEMORY)
    assert finished.returncode == 0, finished.stderr
    one_map = 16 * 8 * 97 * 97 * 4 / 2**20
    maps_of_a_step = 6 * one_map  # output, its gradient, three gradients, log-sum-exp and delta (a quarter together)
    weights = 16 * 193 * 97 * 97 * 4 / 2**20  # 111 MB
    assert int(finished.stdout) < maps_of_a_step + 0.1 * weights


INSTRUCTION_SET = """
import sys, torch
from gingham.array import criss_cross_attention as array_attention
from gingham.ops import criss_cross_attention
results = []
for arguments in torch.load(sys.argv[1]):
    leaves = [x.requires_grad_() for x in arguments[:3]]
    output = criss_cross_attention(*leaves, scale=0.5)
    results.append([output.detach(), *torch.autograd.grad(output, leaves, arguments[3])])
torch.save(results, sys.argv[2])
"""


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_agrees_with_dense_attention(name: str, tmp_path: Path) -> None:
    if name not in info()["instruction sets available"].split(", "):
        pytest.skip("this machine does not have it")
    cases = [
        [layout(x) for x in maps(*size, key_channels=9, value_channels=21, dtype=dtype)]
        # The long lines are cut in two, the lone column in the shorter half: with 16, 8 and 4 lanes.
        for size in ((9, 33), (1, 5), (3, 4, 17), (305, 2), (2, 297), (2, 301))
        for dtype in kernels_of(name, DTYPES)
        for layout in (contiguous, channels_last)
    ]
    torch.save(cases, tmp_path / "arguments.pt")
    finished = run_python(
        INSTRUCTION_SET, str(tmp_path / "arguments.pt"), str(tmp_path / "results.pt"), GINGHAM_CPU=name
    )
    assert finished.returncode == 0, finished.stderr
    for arguments, results in zip(cases, torch.load(tmp_path / "results.pt"), strict=True):
        expected = dense_attention_and_gradients(*arguments, 0.5)
        for which, result, exact in zip(NAMES, results, expected, strict=True):
            assert_within_bounds(which, result, exact, arguments[0].dtype)


def test_an_unknown_instruction_set_is_an_error_that_names_the_known() -> None:
    script = "import torch; from gingham.ops import criss_cross_attention as f; f(*torch.randn(3, 1, 2, 3, 4))"
    finished = run_python(script, GINGHAM_CPU="mmx")
    assert finished.returncode == 1
    last = finished.stderr.strip().splitlines()[-1]
    assert "GINGHAM_CPU=mmx: unknown instruction set; expected one of baseline, avx2, avx512" in finished.stderr, last


# ------------------------------------------------------------------------------------------------ errors


def _wrong(**changes: object) -> dict[str, object]:
    query, key, value, _ = maps(4, 5)
    return {"query": query, "key": key, "value": value, "scale": 1.0} | changes


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": None}, TypeError, "query must be a tensor, got NoneType"),
        ({"value": [1.0]}, TypeError, "value must be a tensor, got list"),
        (
            {"query": torch.ones(2, 5, 4, 5, dtype=torch.int64)},
            TypeError,
            r"query must be float32.*got int64 \[2, 5, 4, 5\]",
        ),
        (
            {"key": torch.ones(2, 5, 4, 5, dtype=torch.float64)},
            TypeError,
            "key must have the dtype of query, got float64",
        ),
        ({"value": torch.ones(2, 7, 4, 5).half()}, TypeError, "value must have the dtype of query, got float16"),
        (
            {"query": torch.ones(2, 5, 4)},
            ValueError,
            r"query must be \[B, Ck, H, W\] or \[B, Ck, T, H, W\], got .*\[2, 5, 4\]",
        ),
        ({"query": torch.ones(2, 5, 1, 1, 4, 5)}, ValueError, r"query must be \[B, Ck, H, W\] or"),
        (
            {"query": torch.ones(2, 0, 4, 5), "key": torch.ones(2, 0, 4, 5)},
            ValueError,
            "query must have at least one channel",
        ),
        (
            {"key": torch.ones(2, 6, 4, 5)},
            ValueError,
            r"key must be \[2, 5, 4, 5\] to match query.*got .*\[2, 6, 4, 5\]",
        ),
        ({"key": torch.ones(2, 5, 5, 4)}, ValueError, r"key must be \[2, 5, 4, 5\]"),
        ({"value": torch.ones(2, 7, 5, 4)}, ValueError, r"value must be \[2, Cv, 4, 5\]"),
        ({"value": torch.ones(1, 7, 4, 5)}, ValueError, r"value must be \[2, Cv, 4, 5\]"),
        ({"value": torch.ones(2, 7, 1, 4, 5)}, ValueError, r"value must be \[2, Cv, 4, 5\]"),
        (
            {"key": torch.ones(2, 5, 4, 5, device="meta")},
            ValueError,
            "key must be on the device of query, got .* on meta",
        ),
        (
            {"value": torch.ones(2, 7, 4, 5).to_sparse()},
            TypeError,
            r"value must be a dense tensor, got sparse_coo float32 \[2, 7, 4, 5\]",
        ),
        (
            {"query": torch.ones(2, 5, 4, 5, dtype=torch.complex64)},
            TypeError,
            "query must be float32.*got complex64",
        ),
        ({"query": torch.tensor(1.0)}, ValueError, r"query must be \[B, Ck, H, W\] or .*got float32 \[\]"),
        ({"scale": torch.tensor(1.0)}, TypeError, r"scale must be a number, got float32 \[\]"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"scale": None}, TypeError, "scale must be a number, got NoneType"),
    ],
)
def test_wrong_arguments(changes: dict[str, object], error: type[Exception], message: str, requires_grad: bool) -> None:
    arguments = _wrong(**changes)
    if requires_grad:
        arguments = {
            name: x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in arguments.items()
        }
    with pytest.raises(error, match=f"criss_cross_attention: {message}"):
        criss_cross_attention(**arguments)


def test_the_operator_itself_checks_its_arguments() -> None:
    query, key, value, grad = maps(4, 5)
    output, lse = operator(query, key, value, 1.0)
    with pytest.raises(RuntimeError, match="the same batch and spatial sizes"):
        torch.ops.gingham._criss_cross_attention(query, key, value[..., :3], 1.0)
    with pytest.raises(RuntimeError, match="lse must have the shape, dtype and device"):
        torch.ops.gingham._criss_cross_attention_backward(grad, query, key, value, output, lse[:1], 1.0)
    with pytest.raises(RuntimeError, match="grad_output must have the shape, dtype and device of value"):
        torch.ops.gingham._criss_cross_attention_backward(grad.double(), query, key, value, output, lse, 1.0)


def test_meta_tensors_pass_autocast_and_compile() -> None:
    query, key, value, _ = (x.to("meta") for x in maps(4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert criss_cross_attention(query, key, value).is_meta
    compiled = torch.compile(criss_cross_attention, fullgraph=True, backend="eager")
    assert compiled(query, key, value).shape == value.shape


def test_meta_tensors_have_the_shapes_and_no_data() -> None:
    query, key, value, _ = (x.to("meta") for x in maps(4, 5))
    output = criss_cross_attention(query, key, value)
    assert output.is_meta
    assert output.shape == value.shape


# ------------------------------------------------------------------------------------------------ CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced, every_other_column, transposed, expanded_batch])
@pytest.mark.parametrize("size", [(5, 6), (1, 7), (7, 1), (31, 33), (4, 5, 6), (33, 2, 3)])
def test_cuda_agrees_with_dense_attention(
    size: tuple[int, ...], layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    check(*(layout(x) for x in maps(*size, dtype=dtype, device="cuda")), scale=0.5)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("key_channels", "value_channels"), [(1, 1), (13, 19), (64, 65), (130, 3)])
def test_cuda_any_number_of_channels(key_channels: int, value_channels: int, dtype: torch.dtype) -> None:
    arguments = maps(
        33, 31, batch=1, key_channels=key_channels, value_channels=value_channels, dtype=dtype, device="cuda"
    )
    check(*arguments, scale=0.125)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_agrees_with_the_reference_on_the_map_of_the_paper(dtype: torch.dtype) -> None:
    query, key, value, grad = maps(97, 97, key_channels=64, value_channels=512, dtype=dtype, device="cuda")
    got = run(query, key, value, grad, 0.125)
    leaves = [x.double().requires_grad_() for x in (query, key, value)]
    output = reference.criss_cross_attention(*leaves, scale=0.125)
    for result, exact in zip(got, (output, *torch.autograd.grad(output, leaves, grad.double())), strict=True):
        error = (result.detach().double() - exact).norm() / exact.norm()
        assert float(error) < 8 * torch.finfo(dtype).eps


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("batch", "value_channels", "size"), [(9000, 1, (4, 6)), (1, 66_000, (2, 3)), (66_000, 1, (1, 2))]
)
def test_cuda_more_maps_than_a_grid_axis_holds(batch: int, value_channels: int, size: tuple[int, ...]) -> None:
    check(*maps(*size, batch=batch, key_channels=1, value_channels=value_channels, device="cuda"))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_runs_on_the_current_stream(dtype: torch.dtype) -> None:
    cold = maps(33, 31, dtype=dtype)
    expected = run(*(x.cuda() for x in cold))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # an operator on another stream would read what is not there yet
        arguments = [x.pin_memory().cuda(non_blocking=True) for x in cold]
        got = run(*arguments)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.cuda
def test_cuda_empty_maps() -> None:
    for batch, size, channels in ((0, (4, 5), 7), (2, (0, 5), 7), (2, (4, 5), 0)):
        output, *_ = run(*maps(*size, batch=batch, value_channels=channels, device="cuda"))
        assert output.shape == (batch, channels, *size)


@pytest.mark.cuda
def test_cuda_uses_tf32_only_where_torch_is_told_to() -> None:
    arguments = maps(33, 31, key_channels=64, value_channels=64, device="cuda")
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        exact = check(*arguments, scale=0.125)
        torch.backends.cuda.matmul.allow_tf32 = True
        for fast, result in zip(run(*arguments, 0.125), exact, strict=True):
            assert float((fast - result).norm() / result.norm()) < 2**-9
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.cuda
def test_cuda_and_cpu_arguments_do_not_mix() -> None:
    query, key, value, _ = maps(4, 5)
    with pytest.raises(ValueError, match=r"key must be on the device of query, got .* on cuda:0"):
        criss_cross_attention(query, key.cuda(), value)


@pytest.mark.cuda
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_cuda_opcheck_and_gradcheck(layout: Callable[[Tensor], Tensor]) -> None:
    pytest.importorskip("expecttest")
    query, key, value, _ = (layout(x) for x in maps(3, 4, dtype=torch.float64, device="cuda"))
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(torch.ops.gingham.criss_cross_attention.default, (*leaves, 0.5))
    torch.autograd.gradcheck(criss_cross_attention, leaves)
    torch.autograd.gradgradcheck(criss_cross_attention, leaves)


# ------------------------------------------------------------------------------------------------ TF32, without a GPU

MATMUL = torch.backends.cuda.matmul
TF32_SETTINGS: dict[str, tuple[Callable[[], None], bool]] = {
    "fp32_precision tf32": (lambda: setattr(MATMUL, "fp32_precision", "tf32"), True),
    "fp32_precision ieee": (lambda: setattr(MATMUL, "fp32_precision", "ieee"), False),
    "fp32_precision of all": (lambda: setattr(torch.backends, "fp32_precision", "tf32"), True),
    "allow_tf32": (lambda: setattr(MATMUL, "allow_tf32", True), True),
    "not allow_tf32": (lambda: setattr(MATMUL, "allow_tf32", False), False),
    "high": (lambda: torch.set_float32_matmul_precision("high"), True),
    "highest": (lambda: torch.set_float32_matmul_precision("highest"), False),
}


@pytest.fixture
def tf32_undecided() -> Iterator[None]:
    def reset() -> None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision = "none"
        MATMUL.fp32_precision = "none"

    reset()
    yield
    reset()


class _Calls(TorchDispatchMode):
    """The allow_tf32 of each call of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.allow_tf32: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.gingham._criss_cross_attention.default:
            self.allow_tf32.append(args[4:] == (True,))  # False is the default and is left out
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("tf32_undecided")
@pytest.mark.parametrize("setting", TF32_SETTINGS)
def test_tf32_is_used_for_float32_where_any_of_torchs_settings_allows_it(setting: str) -> None:
    decide, expected = TF32_SETTINGS[setting]
    decide()
    with FakeTensorMode(), _Calls() as calls:  # tensors on a GPU that need not be there
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = torch.empty(1, 4, 5, 6, dtype=dtype, device="cuda")
            criss_cross_attention(x, x, x)
    assert calls.allow_tf32 == [expected, False, False]


@pytest.mark.usefixtures("tf32_undecided")
def test_compiled_code_follows_torchs_setting_of_tf32() -> None:
    seen = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        seen.extend(node.args[4] for node in graph.graph.nodes if node.target is operator)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(criss_cross_attention, backend=backend, fullgraph=True)
    with FakeTensorMode(shape_env=ShapeEnv()):
        x = torch.empty(1, 4, 5, 6, device="cuda")
        for precision in ("ieee", "tf32", "ieee"):
            MATMUL.fp32_precision = precision
            assert compiled(x, x, x).shape == x.shape
    assert seen == [False, True]


# ------------------------------------------------------------------------------------------------ compiled transforms


def test_vmap_compiles_in_one_graph() -> None:
    def mapped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.vmap(torch.vmap(criss_cross_attention), in_dims=(0, None, 0))(query, key, value)

    query, key, value, _ = (x.unflatten(0, (2, 3, 2)) for x in maps(4, 5, batch=12))
    torch.compiler.reset()
    results = []
    for function in (mapped, torch.compile(mapped, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (query, key[0], value)]
        output = function(*leaves)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected)
    expected = criss_cross_attention(*(x.flatten(0, 2) for x in (query, key[:1].expand_as(key), value)))
    torch.testing.assert_close(results[1][0].flatten(0, 2), expected)


# ------------------------------------------------------------------------------------------------ kinds of numbers


@pytest.mark.parametrize("scale", [2, True, np.float32(0.5), np.float16(0.5), np.int64(2), Fraction(1, 2)])
def test_the_scale_may_be_any_real_number(scale: Any) -> None:
    query, key, value, grad = maps(4, 5)
    for got, expected in zip(
        run(query, key, value, grad, scale), run(query, key, value, grad, float(scale)), strict=True
    ):
        assert torch.equal(got, expected)
    arrays = [x.numpy() for x in (query, key, value)]
    assert np.array_equal(array_attention(*arrays, scale=scale), array_attention(*arrays, scale=float(scale)))


@pytest.mark.parametrize("scale", [10**400, Fraction(10**400)])
def test_a_scale_beyond_float64_is_refused(scale: Any) -> None:
    with pytest.raises(ValueError, match="criss_cross_attention: scale must be in the range of float64"):
        criss_cross_attention(*maps(4, 5)[:3], scale=scale)
