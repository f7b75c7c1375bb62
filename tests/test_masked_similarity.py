"""torch.ops.gingham.masked_similarity and the function on top of it, against the written out form in float64."""

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
from gingham.array import masked_similarity as array_similarity
from gingham.nn import MaskedSimilarity
from gingham.ops import cosine_similarity_map, masked_average_pool, masked_similarity
from oracles.conditions import kernels_of, run_python, threads
from oracles.layouts import LAYOUTS, channels_last, contiguous, every_other_column, sliced
from oracles.masked_supports import Quantity, similarity_and_gradients

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
RESIZES = ["features", "mask"]
NAMES = ("similarity", "grad_query", "grad_support", "grad_mask")

operator = torch.ops.gingham.masked_similarity.default
backward_operator = torch.ops.gingham.masked_similarity_backward.default
cuda = pytest.param("cuda", marks=pytest.mark.cuda)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def maps(
    size: tuple[int, int] = (5, 7),
    support_size: tuple[int, int] = (4, 6),
    mask_size: tuple[int, int] = (13, 11),
    *,
    batch: int = 2,
    shots: int = 3,
    channels: int = 5,
    dtype: torch.dtype = torch.float32,
    mask_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, support, mask and the gradient of the similarity."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, channels, *size, generator=generator)
    support = torch.randn(batch, shots, channels, *support_size, generator=generator)
    mask = torch.rand(batch, shots, 1, *mask_size, generator=generator)
    grad = torch.randn(batch, 1, *size, generator=generator)
    mask = mask.to(mask_dtype) if mask_dtype.is_floating_point else (mask > 0.5).to(mask_dtype)
    return query.to(device, dtype), support.to(device, dtype), mask.to(device), grad.to(device, dtype)


def of_shots(layout: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A layout of [B, C, h, w] for [B, K, C, h, w], whose shots lie apart."""
    return lambda x: layout(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def run(query: Tensor, support: Tensor, mask: Tensor, grad: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The similarity and the gradients of query, support and a floating mask, which may be views of any kind."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in (query, support, mask)]
    output = masked_similarity(*leaves, **options)
    return output.detach(), *torch.autograd.grad(output, [x for x in leaves if x.requires_grad], grad)


def assert_within_bounds(name: str, got: Tensor, expected: Quantity, sums: torch.dtype) -> None:
    error, bound = (got.detach().cpu().double() - expected.exact).abs(), expected.bound(got.dtype, sums)
    assert got.shape == expected.exact.shape
    assert bool((error <= bound).all()), (
        f"{name}: {float((error / bound).nan_to_num(math.inf).max()):.2f} times the bound"
    )


def check(query: Tensor, support: Tensor, mask: Tensor, grad: Tensor, resize: str = "features") -> tuple[Tensor, ...]:
    got = run(query, support, mask, grad, resize=resize)
    expected = similarity_and_gradients(*(x.cpu() for x in (query, support, mask, grad)), resize)
    assert all(x.dtype == query.dtype for x in got[:3])
    for name, result, exact in zip(NAMES, got, expected, strict=False):
        assert_within_bounds(name, result, exact, sums_dtype(query.dtype))
    return got


# ------------------------------------------------------------------------------------------------ golden values


def test_the_similarity_of_the_specification() -> None:
    support = ((torch.arange(18, dtype=torch.float64) - 8) / 4).reshape(1, 1, 3, 2, 3)
    mask = torch.zeros(1, 1, 1, 8, 12, dtype=torch.bool)
    mask[..., 1:5, 2:9] = True
    query = torch.arange(18, dtype=torch.float64).sin().reshape(1, 3, 2, 3)
    golden = torch.tensor([[-0.581502, -0.314577, -0.022887], [0.408349, 0.393224, 0.056270]], dtype=torch.float64)
    torch.testing.assert_close(masked_similarity(query, support, mask)[0, 0], golden, rtol=0, atol=5e-7)
    _, weights, totals, prototype, norms = operator(query, support, mask, None, False, 1e-8, False)
    assert weights.tolist() == [[[5.75, 11.140625, 3.234375, 2.25, 4.359375, 1.265625]]]
    assert totals.tolist() == [[28.0]]
    assert prototype.tolist() == [[-1.5703125, -0.0703125, 1.4296875]]
    torch.testing.assert_close(norms, query.norm(dim=1))


def test_the_definition_agrees_with_the_written_out_form() -> None:
    *tensors, grad = maps(dtype=torch.float64, mask_dtype=torch.float64)
    for resize in RESIZES:
        leaves = [x.requires_grad_() for x in tensors]
        output = reference.masked_similarity(*leaves, resize=resize)
        results = output, *torch.autograd.grad(output, leaves, grad)
        expected = similarity_and_gradients(*(x.detach() for x in leaves), grad, resize)
        for result, quantity in zip(results, expected, strict=True):
            torch.testing.assert_close(result, quantity.exact)


# ------------------------------------------------------------------------------------------------ sizes and types


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "support_size", "mask_size"),
    [
        ((5, 7), (4, 6), (13, 11)),
        ((1, 9), (7, 1), (3, 8)),
        ((9, 1), (1, 7), (30, 2)),
        ((1, 1), (1, 1), (1, 1)),
        ((3, 4), (5, 3), (2, 2)),
        ((33, 17), (16, 32), (64, 128)),
        ((47, 63), (47, 63), (375, 500)),
    ],
    ids=str,
)
def test_agrees_with_the_written_out_form(
    size: tuple[int, int], support_size: tuple[int, int], mask_size: tuple[int, int], dtype: torch.dtype, resize: str
) -> None:
    for layout in (contiguous, channels_last):
        for mask_dtype in (torch.float32, torch.bool):
            query, support, mask, grad = maps(
                size, support_size, mask_size, shots=2, dtype=dtype, mask_dtype=mask_dtype
            )
            check(layout(query), of_shots(layout)(support), mask, grad, resize)


@pytest.mark.parametrize("mask_dtype", [*DTYPES, torch.bool, torch.uint8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_any_dtype(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    results = check(*maps(dtype=dtype, mask_dtype=mask_dtype))
    assert len(results) == 3 or results[3].dtype == mask_dtype


@pytest.mark.parametrize("channels", [1, 2, 7, 8, 9, 31, 64, 130])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_any_number_of_channels_and_shots(layout: Callable[[Tensor], Tensor], channels: int) -> None:
    for dtype, shots in ((torch.float32, 1), (torch.bfloat16, 5)):
        query, support, mask, grad = maps(channels=channels, shots=shots, dtype=dtype)
        check(layout(query), of_shots(layout)(support), mask, grad)


@pytest.mark.parametrize(
    ("batch", "size", "support_size", "mask_size"),
    [
        (0, (5, 7), (4, 6), (8, 8)),
        (2, (0, 7), (4, 6), (8, 8)),
        (2, (5, 7), (0, 6), (8, 8)),
        (2, (5, 7), (4, 6), (8, 0)),
    ],
)
def test_empty_maps(
    batch: int, size: tuple[int, int], support_size: tuple[int, int], mask_size: tuple[int, int]
) -> None:
    for layout in (contiguous, channels_last):
        query, support, mask, grad = maps(size, support_size, mask_size, batch=batch)
        results = run(layout(query), of_shots(layout)(support) if batch else support, mask, grad)
        shapes = (batch, 1, *size), query.shape, support.shape, mask.shape
        assert [x.shape for x in results] == [torch.Size(shape) for shape in shapes]
        assert not any(bool(x.any()) for x in results)


# ------------------------------------------------------------------------------------------------ behaviour


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_cosine_with_the_mean_of_the_pooled_vectors(dtype: torch.dtype, resize: str) -> None:
    query, support, mask, _ = maps(dtype=dtype)
    pooled = [masked_average_pool(support[:, k], mask[:, k], resize=resize) for k in range(3)]
    prototype = torch.stack(pooled).mean(dim=0)
    expected = cosine_similarity_map(query, prototype[:, None])
    torch.testing.assert_close(masked_similarity(query, support, mask, resize=resize), expected)


def test_the_vectors_are_averaged_as_they_are() -> None:
    support = torch.zeros(1, 2, 2, 1, 1)
    support[0, 0, 0], support[0, 1, 1] = 10, 1
    similarity = masked_similarity(torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1), support, torch.ones(1, 2, 1, 3, 3))
    assert float(similarity) == pytest.approx(10 / math.hypot(10, 1))


@pytest.mark.parametrize("device", ["cpu", cuda])
@pytest.mark.parametrize("shots", [2, 3, 5])
def test_copies_of_a_support_count_as_one(shots: int, device: str) -> None:
    query, support, mask, grad = maps(shots=1, device=device)
    once = run(query, support, mask, grad)
    copies = run(query, support.expand(-1, shots, -1, -1, -1), mask.expand(-1, shots, -1, -1, -1), grad)
    assert torch.equal(copies[0], once[0])
    assert torch.equal(copies[1], once[1])
    torch.testing.assert_close(copies[2].sum(dim=1), once[2].sum(dim=1))


def test_the_order_of_the_supports_does_not_matter_but_their_role_does() -> None:
    query, support, mask, _ = maps(dtype=torch.float64)
    similarity = masked_similarity(query, support, mask)
    order = [2, 0, 1]
    torch.testing.assert_close(masked_similarity(query, support[:, order], mask[:, order]), similarity)
    assert not torch.allclose(masked_similarity(query, support, mask[:, order]), similarity)


def test_cosines_lie_between_minus_one_and_one_and_reach_them() -> None:
    _, support, mask, _ = maps(shots=1)
    vector = masked_average_pool(support[:, 0], mask[:, 0])
    across = torch.stack([vector[:, 1], -vector[:, 0], *(0 * vector[:, 2:]).unbind(1)], dim=1)
    query = torch.stack([vector, -3 * vector, 1e-3 * vector, across], dim=2)[:, :, None]
    similarity = masked_similarity(query, support, mask)
    torch.testing.assert_close(similarity, torch.tensor([1.0, -1.0, 1.0, 0.0]).expand(2, 1, 1, 4), rtol=0, atol=1e-6)
    assert float(masked_similarity(*maps()[:3]).abs().max()) <= 1 + 1e-6


def test_scaling_changes_nothing_but_signs() -> None:
    query, support, mask, _ = maps(dtype=torch.float64)
    similarity = masked_similarity(query, support, mask)
    torch.testing.assert_close(masked_similarity(7 * query, 0.2 * support, 3 * mask), similarity)
    torch.testing.assert_close(masked_similarity(-query, support, mask), -similarity)


def test_the_gradient_of_the_query_is_orthogonal_to_it() -> None:
    query, support, mask, grad = maps(dtype=torch.float64)
    _, grad_query, grad_support, _ = run(query, support, mask, grad)
    assert float((grad_query * query).sum(dim=1).abs().max()) < 1e-14
    vectors = torch.stack([masked_average_pool(support[:, k], mask[:, k]) for k in range(3)]).mean(dim=0)
    of_vector = grad_support.sum(dim=(1, 3, 4))
    assert float((of_vector * vectors).sum(dim=1).abs().max()) < 1e-13
    assert float(of_vector.abs().max()) > 1e-3


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_where_a_norm_vanishes_there_is_neither_similarity_nor_gradient(layout: Callable[[Tensor], Tensor]) -> None:
    query, support, mask, grad = maps()
    query[0, :, 2, 3] = 0
    similarity, grad_query, *_ = run(layout(query), of_shots(layout)(support), mask, grad)
    assert float(similarity[0, 0, 2, 3]) == 0
    assert not bool(grad_query[0, :, 2, 3].any())
    mask[1] = 0  # no support of the second image has a mask
    results = run(layout(query), of_shots(layout)(support), mask, grad)
    assert all(not bool(x[1].any()) for x in results)
    assert all(bool(x[0].any()) and bool(x.isfinite().all()) for x in results)
    tiny = run(1e-9 * query, support, mask, grad, eps=1e-7)
    assert not any(bool(x.any()) for x in tiny)
    assert bool(run(1e-9 * query, support, mask, grad, eps=0.0)[0][0].any())


def test_torch_compat_gives_torchs_cosines_and_gradients() -> None:
    *tensors, grad = maps(dtype=torch.float64, mask_dtype=torch.float64)
    tensors[0][0, :, 2, 3] = 1e-10
    tensors[0][0, :, 2, 4] = 0
    results = []
    for ours in (True, False):
        leaves = [x.clone().requires_grad_() for x in tensors]
        if ours:
            output = masked_similarity(*leaves, torch_compat=True)
        else:
            upsampled = F.interpolate(leaves[1].flatten(0, 1), leaves[2].shape[3:], mode="bilinear")
            upsampled = upsampled.unflatten(0, leaves[1].shape[:2])
            pooled = (upsampled * leaves[2]).sum(dim=(3, 4)) / leaves[2].sum(dim=(3, 4))
            output = F.cosine_similarity(leaves[0], pooled.mean(dim=1)[:, :, None, None], dim=1)[:, None]
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert float(results[0][1].abs().max()) > 1e6


def test_an_object_is_more_like_itself_than_its_surroundings() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = torch.zeros(12, 12, dtype=torch.bool)
    inside[3:8, 4:9] = True
    directions = torch.randn(2, 16, generator=generator)
    features = torch.where(inside, directions[0][:, None, None], directions[1][:, None, None])
    features = (features + 0.1 * torch.randn(16, 12, 12, generator=generator))[None]
    mask = inside.repeat_interleave(8, 0).repeat_interleave(8, 1)[None, None, None]
    similarity = masked_similarity(features, features[:, None], mask)[0, 0]
    assert float(similarity[inside].mean()) > float(similarity[~inside].mean()) + 0.5


def test_large_features_in_half_precision_do_not_overflow() -> None:
    query, support, mask, grad = maps(channels=512, dtype=torch.float16)
    results = check(1000 * query.sign(), 1000 * support.sign(), mask, grad)
    assert all(bool(x.isfinite().all()) for x in results)


# ------------------------------------------------------------------------------------------------ many sizes


def padded(x: Tensor, rows: int, columns: int) -> Tensor:
    fill = math.nan if x.is_floating_point() else 1
    return F.pad(x, (0, columns - x.size(-1), 0, rows - x.size(-2)), value=fill)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("device", ["cpu", cuda])
def test_padded_supports_give_what_they_give_alone(
    device: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, resize: str
) -> None:
    query, support, mask, grad = maps((9, 7), (33, 31), (70, 50), shots=1, channels=21, dtype=dtype, device=device)
    alone = run(layout(query), of_shots(layout)(support), mask, grad, resize=resize)
    sizes = torch.tensor([[33, 31, 70, 50]], device=device).expand(2, 1, 4)
    wide_support, wide_mask = of_shots(layout)(padded(support, 40, 37)), padded(mask, 71, 90)
    got = run(layout(query), wide_support, wide_mask, grad, valid_sizes=sizes, resize=resize)
    assert torch.equal(got[0], alone[0])
    assert torch.equal(got[1], alone[1])
    for result, exact, (rows, columns) in zip(got[2:], alone[2:], ((33, 31), (70, 50)), strict=True):
        assert torch.equal(result[..., :rows, :columns], exact)
        assert not bool(result[..., rows:, :].any())
        assert not bool(result[..., columns:].any())


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool])
def test_lists_of_supports_of_different_sizes(mask_dtype: torch.dtype, resize: str) -> None:
    sizes = [((4, 6), (13, 11)), ((7, 3), (5, 20)), ((4, 9), (13, 11))]
    parts = [maps((5, 7), s, m, shots=1, mask_dtype=mask_dtype, seed=i) for i, (s, m) in enumerate(sizes)]
    query, grad = parts[0][0], parts[0][3]
    supports, masks = [x[1][:, 0] for x in parts], [x[2][:, 0] for x in parts]
    results = []
    for function in (masked_similarity, reference.masked_similarity):
        leaves = [x.clone().requires_grad_() for x in (query, *supports)]
        output = function(leaves[0], leaves[1:], masks, resize=resize)
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    same = [x[:, k] for x in maps()[1:2] for k in range(3)]
    torch.testing.assert_close(
        masked_similarity(query, same, [x[:, 0] for x in [parts[0][2]] * 3]),
        masked_similarity(query, torch.stack(same, 1), parts[0][2].expand(-1, 3, -1, -1, -1)),
    )


def test_sizes_of_each_sample_are_its_own() -> None:
    query, support, mask, grad = maps(dtype=torch.float64, mask_dtype=torch.float64)
    sizes = torch.tensor([[[4, 6, 13, 11], [2, 6, 7, 3], [1, 1, 1, 1]], [[3, 2, 9, 11], [4, 4, 1, 5], [4, 6, 0, 11]]])
    results = []
    for function in (masked_similarity, reference.masked_similarity):
        leaves = [x.clone().requires_grad_() for x in (query, support, mask)]
        output = function(*leaves, valid_sizes=sizes)
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.cuda
def test_cuda_sizes_out_of_range_count_as_the_nearest_in_it() -> None:
    query, support, mask, grad = maps(device="cuda")
    sizes = torch.tensor([4, 6, 13, 11], device="cuda").expand(2, 3, 4).clone()
    whole = run(query, support, mask, grad)
    sizes[0, 0], sizes[1, 2, 1] = 2**40, 7
    for got, expected in zip(run(query, support, mask, grad, valid_sizes=sizes), whole, strict=True):
        assert torch.equal(got, expected)


# ------------------------------------------------------------------------------------------------ any layout


@settings(max_examples=250)
@given(data=st.data())
def test_agrees_with_the_written_out_form_whatever_the_arguments(data: st.DataObject) -> None:
    draw, extents = data.draw, st.sampled_from([1, 2, 3, 5, 8, 9, 16, 17, 20])
    query, support, mask, grad = maps(
        draw(st.tuples(extents, extents), label="size"),
        draw(st.tuples(extents, extents), label="support size"),
        draw(st.tuples(st.integers(1, 50), st.integers(1, 50)), label="mask size"),
        batch=draw(st.integers(1, 2), label="batch"),
        shots=draw(st.integers(1, 3), label="shots"),
        channels=draw(st.integers(2, 27), label="channels"),
        dtype=draw(st.sampled_from(DTYPES), label="dtype"),
        mask_dtype=draw(st.sampled_from([*DTYPES, torch.bool, torch.uint8]), label="mask dtype"),
        seed=draw(st.integers(0, 1000), label="seed"),
    )
    query = draw(st.sampled_from(LAYOUTS), label="query")(query)
    support = of_shots(draw(st.sampled_from([contiguous, channels_last, sliced]), label="support"))(support)
    grad = draw(st.sampled_from([contiguous, channels_last, every_other_column]), label="grad")(grad)
    with threads(draw(st.sampled_from([1, 2]), label="threads")):
        check(query, support, mask, grad, draw(st.sampled_from(RESIZES), label="resize"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_neither_result_nor_arguments(layout: Callable[[Tensor], Tensor]) -> None:
    query, support, mask, grad = maps()
    arguments = layout(query), layout(support.swapaxes(1, 2)).swapaxes(1, 2), mask, layout(grad)
    before = [x.clone(memory_format=torch.contiguous_format) for x in arguments]
    for result, plain in zip(run(*arguments), run(*before), strict=True):
        torch.testing.assert_close(result, plain, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(x, copy) for x, copy in zip(arguments, before, strict=True))


def test_gradients_have_the_memory_format_of_their_arguments() -> None:
    query, support, mask, grad = maps()
    _, grad_query, grad_support, _ = run(channels_last(query), support, mask, grad)
    assert grad_query.stride() == channels_last(query).stride()
    assert grad_support.is_contiguous()
    last = of_shots(channels_last)(support)
    _, grad_query, grad_support, _ = run(query, last, mask, grad)
    assert grad_query.is_contiguous()
    assert grad_support.stride() == last.stride()


# ------------------------------------------------------------------------------------------------ bit for bit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced])
def test_the_number_of_threads_changes_no_bit(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    query, support, mask, grad = maps((33, 31), (29, 35), (90, 70), channels=37, dtype=dtype)
    results = []
    for count in (1, 2, 3, 7):
        with threads(count):
            results.append(run(layout(query), of_shots(layout)(support), mask, grad))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("device", ["cpu", cuda])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_a_sample_in_a_batch_is_the_sample_alone(layout: Callable[[Tensor], Tensor], device: str) -> None:
    query, support, mask, grad = maps((9, 14), batch=5, device=device)
    arguments = layout(query), of_shots(layout)(support), mask, grad
    together = run(*arguments)
    for i in range(5):
        alone = run(*(x[i : i + 1] for x in arguments))
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_repeated_and_deterministic_calls_agree_bit_for_bit(device: str) -> None:
    arguments = maps((33, 31), (29, 35), (90, 70), device=device)
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
    *tensors, _ = maps(
        (2, 3), (3, 2), (5, 4), batch=1, shots=2, channels=2, dtype=torch.float64, mask_dtype=torch.float64
    )
    function = partial(masked_similarity, resize=resize)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    sizes = torch.tensor([[[3, 2, 5, 4], [2, 2, 3, 3]]])
    assert torch.autograd.gradcheck(partial(function, valid_sizes=sizes), leaves)
    assert torch.autograd.gradgradcheck(partial(function, valid_sizes=sizes), leaves)


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_opcheck(layout: Callable[[Tensor], Tensor], dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    query, support, mask, grad = maps((3, 4), (4, 3), (7, 6), shots=2, dtype=dtype, mask_dtype=mask_dtype)
    query, support = layout(query), of_shots(layout)(support)
    for sizes in (None, torch.tensor([4, 3, 7, 5]).expand(2, 2, 4).contiguous()):
        options = sizes, False, 1e-8, False
        results = operator(query, support, mask, *options)
        for wanted in (0, 1, 2, 3, *((4, 7) if mask_dtype.is_floating_point else ())):
            torch.library.opcheck(backward_operator, (grad, query, support, mask, *results, *options, wanted))
        leaves = query.clone().requires_grad_(), support.clone().requires_grad_()
        torch.library.opcheck(operator, (*leaves, mask, *options))


def test_any_of_the_arguments_alone_may_require_grad() -> None:
    query, support, mask, grad = maps()
    _, *expected = run(query, support, mask, grad)
    for layout in (contiguous, channels_last):
        for which in range(3):
            arguments = [layout(query), of_shots(layout)(support), mask]
            arguments[which] = arguments[which].clone().requires_grad_()
            masked_similarity(*arguments).backward(grad)
            torch.testing.assert_close(arguments[which].grad, expected[which])
            assert all(x.grad is None for i, x in enumerate(arguments) if i != which)


def test_an_expanded_gradient_of_the_output() -> None:
    query, support, mask, grad = maps()
    ones = torch.ones(()).expand_as(grad)
    for by_sum, by_ones in zip(
        run(query, support, mask, ones), run(query, support, mask, torch.ones_like(grad)), strict=True
    ):
        assert torch.equal(by_sum, by_ones)


def test_autocast_promotes_query_and_support_and_leaves_the_mask() -> None:
    query, support, mask, _ = maps(dtype=torch.bfloat16)
    exact = masked_similarity(query.float(), support.float(), mask)
    for call in (masked_similarity, lambda *x: operator(*x, None, False, 1e-8, False)[0]):
        with torch.autocast("cpu", torch.bfloat16):
            assert call(query, support, mask).dtype == torch.bfloat16
            assert torch.equal(call(query.float(), support, mask), exact)
            assert call(query.double(), support.double(), mask).dtype == torch.float64


def test_vmap_and_func_grad() -> None:
    query, support, mask, grad = maps(batch=6)
    stacked = query.unflatten(0, (3, 2)), support.unflatten(0, (3, 2)).movedim(0, 3), mask.unflatten(0, (3, 2))
    mapped = torch.vmap(masked_similarity, in_dims=(0, 3, 0))(*stacked)
    torch.testing.assert_close(mapped.flatten(0, 1), masked_similarity(query, support, mask))
    shared = torch.vmap(masked_similarity, in_dims=(0, None, None))(stacked[0], support[:2], mask[:2] > 0.5)
    torch.testing.assert_close(shared[2], masked_similarity(stacked[0][2], support[:2], mask[:2] > 0.5))

    sizes = torch.tensor([[4, 6, 13, 11], [3, 3, 9, 9], [4, 2, 13, 5]]).expand(6, 3, 4).contiguous()
    sizes[3:, :, 0] -= 1

    def loss(query: Tensor, support: Tensor, mask: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
        return (masked_similarity(query, support, mask, valid_sizes=sizes) * weight).sum()

    expected = run(query, support, mask, grad, valid_sizes=sizes)[1:]
    arguments = query, support, mask, grad, sizes
    for got, exact in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*arguments), expected, strict=True):
        torch.testing.assert_close(got, exact)
    batched = [x.unflatten(0, (3, 2)) for x in arguments]
    for got, exact in zip(torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*batched), expected, strict=True):
        torch.testing.assert_close(got.flatten(0, 1), exact)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_second_derivatives_pass_where_the_first_is_of_one_argument_alone(which: int) -> None:
    arguments = maps(batch=4, dtype=torch.float64, mask_dtype=torch.float64)

    def of_gradient(function: Callable[..., Tensor]) -> Callable[..., Any]:
        def penalty(query: Tensor, support: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
            first = torch.func.grad(lambda *x: (function(*x).square() * weight).sum(), argnums=which)
            return first(query, support, mask).square().sum()

        return torch.func.grad(penalty, argnums=(0, 1, 2, 3))

    expected = of_gradient(reference.masked_similarity)(*arguments)
    assert all(float(x.abs().max()) > 1e-9 for x in expected)
    for got, exact in zip(of_gradient(masked_similarity)(*arguments), expected, strict=True):
        torch.testing.assert_close(got, exact)
    batched = [x.unflatten(0, (2, 2)) for x in arguments]
    for got, exact in zip(torch.vmap(of_gradient(masked_similarity))(*batched), expected, strict=True):
        torch.testing.assert_close(got.flatten(0, 1), exact)


def test_the_definition_takes_sizes_out_of_range_for_the_nearest_within_as_cuda_does() -> None:
    query, support, mask = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 3, 4, 5), torch.rand(2, 3, 1, 6, 7)
    sizes = torch.tensor([[4, 5, 6, 7], [-1, 5, 6, -3], [9, 4, 5, 2**40]]).expand(2, 3, 4)
    most = torch.tensor([4, 5, 6, 7])
    got, expected = (
        reference.masked_similarity(query, support, mask, valid_sizes=x) for x in (sizes, sizes.clamp(min=0).min(most))
    )
    assert torch.equal(got, expected)
    assert torch.allclose(got, masked_similarity(query, support, mask, valid_sizes=sizes.clamp(min=0).min(most)))


@pytest.mark.cuda
def test_gradients_of_gradients_take_sizes_out_of_range_as_those_do() -> None:
    maps = [torch.rand(shape, device="cuda", dtype=torch.float64) for shape in ((1, 3, 4, 5), (1, 2, 3, 4, 5))]
    mask = torch.rand(1, 2, 1, 6, 7, device="cuda", dtype=torch.float64)
    sizes, within = torch.tensor([[[[4, 5, 6, -2], [4, 9, 6, 7]]], [[[4, 5, 6, 0], [4, 5, 6, 7]]]], device="cuda")

    def second(sizes: Tensor) -> Tensor:
        query, support = (x.clone().requires_grad_() for x in maps)
        output = masked_similarity(query, support, mask, valid_sizes=sizes)
        (first,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
        return torch.autograd.grad(first.square().sum(), support)[0]

    torch.testing.assert_close(second(sizes), second(within))


def test_valid_sizes_changed_before_backward_are_noticed() -> None:
    query, support, mask, grad = maps()
    sizes = torch.tensor([4, 6, 13, 11]).expand(2, 3, 4).contiguous()
    output = masked_similarity(query, support.requires_grad_(), mask, valid_sizes=sizes)
    sizes.sub_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(grad)


def _block(query: Tensor, support: Tensor, mask: Tensor, sizes: Tensor) -> Tensor:
    return query * masked_similarity(query, support, mask) + masked_similarity(query, support, mask, valid_sizes=sizes)


def _sizes(support: Tensor, mask: Tensor) -> Tensor:
    sizes = torch.tensor([*support.shape[3:], *mask.shape[3:]])
    return torch.maximum(sizes - 1, torch.tensor(1)).expand(*support.shape[:2], 4).contiguous()


SHAPES = [(2, 2, (4, 5), (5, 4), (9, 8)), (3, 3, (7, 6), (3, 8), (3, 5)), (5, 4, (3, 9), (6, 6), (20, 30))]


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool])
def test_compile_is_one_graph_with_dynamic_shapes(mask_dtype: torch.dtype) -> None:
    torch.compiler.reset()
    compiled = torch.compile(_block, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, shots, *shapes in SHAPES:
        query, support, mask, _ = maps(*shapes, batch=batch, shots=shots, mask_dtype=mask_dtype)
        results = []
        for function in (compiled, _block):
            leaves = query.clone().requires_grad_(), support.clone().requires_grad_()
            output = function(*leaves, mask, _sizes(support, mask))
            results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


class _Block(torch.nn.Module):
    def forward(self, query: Tensor, support: Tensor, mask: Tensor, sizes: Tensor) -> Tensor:
        return _block(query, support, mask, sizes)


def test_export_with_dynamic_shapes() -> None:
    dim = {name: torch.export.Dim(name, min=1, max=64) for name in ("batch", "shots", "h", "w", "sh", "sw", "mh", "mw")}
    query, support, mask, _ = maps(*SHAPES[0][2:], batch=2, shots=3)
    exported = torch.export.export(
        _Block(),
        (query, support, mask, _sizes(support, mask)),
        dynamic_shapes={
            "query": {0: dim["batch"], 2: dim["h"], 3: dim["w"]},
            "support": {0: dim["batch"], 1: dim["shots"], 3: dim["sh"], 4: dim["sw"]},
            "mask": {0: dim["batch"], 1: dim["shots"], 3: dim["mh"], 4: dim["mw"]},
            "sizes": {0: dim["batch"], 1: dim["shots"]},
        },
    )
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch, shots, *shapes in SHAPES:
        query, support, mask, _ = maps(*shapes, batch=batch, shots=shots)
        arguments = query, support, mask, _sizes(support, mask)
        torch.testing.assert_close(loaded(*arguments), _block(*arguments))


def test_meta_tensors_have_the_shapes_and_no_data() -> None:
    query, support, mask, _ = (x.to("meta") for x in maps())
    assert masked_similarity(query, support, mask).is_meta
    assert masked_similarity(query, support, mask).shape == (2, 1, 5, 7)


def test_the_module_is_the_function() -> None:
    query, support, mask, _ = maps()
    module = MaskedSimilarity(resize="mask", eps=1e-3)
    assert torch.equal(module(query, support, mask), masked_similarity(query, support, mask, resize="mask", eps=1e-3))
    assert "eps=0.001" in repr(module)
    for options, message in (({"resize": "both"}, "resize must be"), ({"eps": -1.0}, "eps must be finite")):
        with pytest.raises(ValueError, match=message):
            MaskedSimilarity(**options)


# ------------------------------------------------------------------------------------------------ other processes

INSTRUCTION_SET = """
import sys, torch
import ml_dtypes, gingham.array
from gingham.ops import masked_similarity
results = []
for query, support, mask, grad, resize in torch.load(sys.argv[1]):
    leaves = [x.requires_grad_(x.is_floating_point()) for x in (query, support, mask)]
    output = masked_similarity(*leaves, resize=resize)
    results.append([output.detach(), *torch.autograd.grad(output, [x for x in leaves if x.requires_grad], grad)])
torch.save(results, sys.argv[2])
"""


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_agrees_with_the_written_out_form(name: str, tmp_path: Path) -> None:
    if name not in info()["instruction sets available"].split(", "):
        pytest.skip("this machine does not have it")
    cases = [
        (layout(query), of_shots(layout)(support), mask, grad, resize)
        for shapes in (((9, 33), (17, 5), (40, 70)), ((5, 2), (2, 3), (2, 9)))
        for dtype in kernels_of(name, DTYPES)
        for mask_dtype in (torch.bool, torch.float32)
        for layout in (contiguous, channels_last, sliced)
        for resize in RESIZES
        for query, support, mask, grad in (maps(*shapes, channels=21, dtype=dtype, mask_dtype=mask_dtype),)
    ]
    torch.save(cases, tmp_path / "arguments.pt")
    finished = run_python(
        INSTRUCTION_SET, str(tmp_path / "arguments.pt"), str(tmp_path / "results.pt"), GINGHAM_CPU=name
    )
    assert finished.returncode == 0, finished.stderr
    for case, results in zip(cases, torch.load(tmp_path / "results.pt"), strict=True):
        for which, result, exact in zip(NAMES, results, similarity_and_gradients(*case), strict=False):
            assert_within_bounds(which, result, exact, sums_dtype(case[0].dtype))


# ------------------------------------------------------------------------------------------------ arrays


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("mask_dtype", [np.float32, np.bool_])
def test_arrays_give_what_tensors_give(dtype: Any, mask_dtype: Any) -> None:
    query, support, mask, _ = maps(dtype=getattr(torch, np.dtype(dtype).name))
    mask = mask > 0.5 if mask_dtype == np.bool_ else mask
    sizes = torch.tensor([3, 6, 11, 9]).expand(2, 3, 4).contiguous()
    arrays = [x.double().numpy().astype(dtype) for x in (query, support)]
    last = [np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -3, -1)), -1, -3) for x in arrays]
    for options in ({}, {"resize": "mask", "eps": 0.5}, {"torch_compat": True, "valid_sizes": sizes}):
        expected = masked_similarity(query, support, mask, **options).double().numpy()
        own = {name: x.numpy() if isinstance(x, Tensor) else x for name, x in options.items()}
        for views in (arrays, last):
            got = array_similarity(*views, mask.numpy(), threads=2, **own)
            assert got.dtype == dtype
            np.testing.assert_allclose(got.astype(np.float64), expected, atol=1e-2 if got.itemsize == 2 else 1e-6)
    out = np.empty((2, 1, 7, 5), dtype=dtype).swapaxes(2, 3)
    assert array_similarity(*arrays, mask.numpy(), out=out) is out
    np.testing.assert_array_equal(out, array_similarity(*arrays, mask.numpy()))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a NumPy or CuPy array, got list"),
        ({"query": np.ones((2, 3, 4), np.float32)}, ValueError, r"query must be \[B, C, h, w\]"),
        ({"support": np.ones((2, 1, 3, 4, 5))}, TypeError, "support must have the dtype of query"),
        ({"support": np.ones((2, 0, 3, 4, 5), np.float32)}, ValueError, r"support must be \[2, K, 3, h', w'\]"),
        ({"mask": np.ones((2, 1, 6, 7))}, ValueError, r"mask must be \[2, 1, 1, H, W\] to match support"),
        ({"valid_sizes": np.ones((2, 1, 4), np.int32)}, TypeError, "valid_sizes must be int64"),
        ({"valid_sizes": np.ones((2, 4), np.int64)}, ValueError, r"valid_sizes must be \[2, 1, 4\]"),
        ({"valid_sizes": np.full((2, 1, 4), 6)}, ValueError, r"valid_sizes must be in \[0, \[4, 5\]\] for the support"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1.0"),
        ({"eps": 1e-40, "torch_compat": True}, ValueError, "eps must be at least 1.1754943508222875e-38, .*got 1e-40"),
        ({"eps": "1"}, TypeError, "eps must be a number, got str"),
        ({"torch_compat": 1}, TypeError, "torch_compat must be a bool, got int"),
        ({"resize": "both"}, ValueError, "resize must be 'features' or 'mask', got 'both'"),
        ({"out": np.ones((2, 1, 5, 4), np.float32)}, ValueError, r"out must have the shape \(2, 1, 4, 5\)"),
    ],
)
def test_wrong_arrays(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "query": np.ones((2, 3, 4, 5), np.float32),
        "support": np.ones((2, 1, 3, 4, 5), np.float32),
        "mask": np.ones((2, 1, 1, 6, 7), np.float32),
    } | changes
    with pytest.raises(error, match=f"masked_similarity: {message}"):
        array_similarity(**arguments)


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": None}, TypeError, "query must be a tensor, got NoneType"),
        ({"query": torch.ones(2, 3, 4)}, ValueError, r"query must be \[B, C, h, w\], got float32 \[2, 3, 4\]"),
        ({"query": torch.ones(2, 0, 4, 5)}, ValueError, "query must have at least one channel"),
        ({"query": torch.ones(2, 3, 4, 5).long()}, TypeError, "query must be float32.*got int64"),
        ({"support": torch.ones(2, 3, 4, 5)}, ValueError, r"support must be \[2, K, 3, h', w'\] with K > 0"),
        ({"support": torch.ones(2, 1, 4, 4, 5)}, ValueError, r"support must be \[2, K, 3, h', w'\]"),
        ({"support": torch.ones(2, 0, 3, 4, 5)}, ValueError, r"support must be \[2, K, 3, h', w'\] with K > 0"),
        ({"support": torch.ones(2, 1, 3, 4, 5).double()}, TypeError, "support must have the dtype of query"),
        ({"mask": torch.ones(2, 1, 6, 7)}, ValueError, r"mask must be \[2, 1, 1, H, W\] to match support"),
        ({"mask": torch.ones(2, 2, 1, 6, 7)}, ValueError, r"mask must be \[2, 1, 1, H, W\]"),
        ({"mask": torch.ones(2, 1, 1, 6, 7).int()}, TypeError, "mask must be float32.*bool or uint8, got int32"),
        ({"mask": torch.ones(2, 1, 1, 6, 7, device="meta")}, ValueError, "mask must be on the device of query"),
        ({"valid_sizes": torch.ones(2, 1, 4)}, TypeError, "valid_sizes must be int64, got float32"),
        ({"valid_sizes": torch.ones(2, 4).long()}, ValueError, r"valid_sizes must be \[2, 1, 4\] to match support"),
        (
            {"valid_sizes": torch.tensor([4, 6, 6, 7]).expand(2, 1, 4)},
            ValueError,
            r"valid_sizes must be in \[0, \[4, 5\]\]",
        ),
        ({"valid_sizes": torch.tensor([4, 5, -1, 7]).expand(2, 1, 4)}, ValueError, "valid_sizes must be in"),
        ({"valid_sizes": [4, 5, 6, 7]}, TypeError, "valid_sizes must be a tensor, got list"),
        ({"eps": -1e-8}, ValueError, "eps must be finite and not negative, got -1e-08"),
        ({"eps": 1e-40, "torch_compat": True}, ValueError, "eps must be at least 1.1754943508222875e-38, .*got 1e-40"),
        ({"eps": math.nan}, ValueError, "eps must be finite and not negative, got nan"),
        ({"eps": None}, TypeError, "eps must be a number, got NoneType"),
        ({"torch_compat": 1}, TypeError, "torch_compat must be a bool, got int"),
        ({"resize": "both"}, ValueError, "resize must be 'features' or 'mask', got 'both'"),
        ({"support": [torch.ones(2, 3, 4, 5)]}, TypeError, "support and mask must be both tensors or both lists"),
        ({"support": [], "mask": []}, ValueError, "support must have at least one shot, got none"),
        (
            {"support": [torch.ones(2, 3, 4, 5)], "mask": [torch.ones(2, 1, 4, 5)] * 2},
            ValueError,
            "mask must have as many shots as support, got 2 and 1",
        ),
        (
            {"support": [torch.ones(2, 3, 4, 5), torch.ones(2, 4, 4, 5)], "mask": [torch.ones(2, 1, 4, 5)] * 2},
            ValueError,
            r"support\[1\] must differ from support\[0\] in its size only",
        ),
        (
            {
                "support": [torch.ones(2, 3, 4, 5)] * 2,
                "mask": [torch.ones(2, 1, 4, 5), torch.ones(2, 1, 4, 5, dtype=torch.float64)],
            },
            TypeError,
            r"mask\[1\] must have the dtype of mask\[0\], got float64",
        ),
        (
            {"support": [torch.ones(3, 4, 5)], "mask": [torch.ones(2, 1, 4, 5)]},
            ValueError,
            r"support\[0\] must be \[B, C",
        ),
        ({"support": [1.0], "mask": [torch.ones(2, 1, 4, 5)]}, TypeError, r"support\[0\] must be a tensor, got float"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str, requires_grad: bool) -> None:
    arguments: dict[str, Any] = {
        "query": torch.ones(2, 3, 4, 5),
        "support": torch.ones(2, 1, 3, 4, 5),
        "mask": torch.ones(2, 1, 1, 6, 7),
    } | changes
    if requires_grad:
        arguments = {
            name: x.clone().requires_grad_()
            if isinstance(x, Tensor) and x.is_floating_point() and name != "valid_sizes"
            else x
            for name, x in arguments.items()
        }
    with pytest.raises(error, match=f"masked_similarity: {message}"):
        masked_similarity(**arguments)


def test_lists_have_no_valid_sizes() -> None:
    lists = {"support": [torch.ones(2, 3, 4, 5)], "mask": [torch.ones(2, 1, 4, 5)]}
    with pytest.raises(ValueError, match="valid_sizes must be None for lists"):
        masked_similarity(torch.ones(2, 3, 4, 5), **lists, valid_sizes=torch.ones(2, 1, 4).long())


def test_the_operator_itself_checks_its_arguments() -> None:
    query, support, mask, grad = maps()
    options = None, False, 1e-8, False
    results = operator(query, support, mask, *options)
    raw = torch.ops.gingham._masked_similarity.default
    raw_backward = torch.ops.gingham._masked_similarity_backward.default
    with pytest.raises(RuntimeError, match=r"support must be \[B, K, C, h', w'\]"):
        raw(query, support[:1], mask, *options)
    with pytest.raises(RuntimeError, match="valid_sizes must be within the sizes of support and mask"):
        raw(query, support, mask, torch.full((2, 3, 4), 7), *options[1:])
    with pytest.raises(RuntimeError, match="eps must be finite and not negative"):
        raw(query, support, mask, None, False, -1.0, False)
    for i, name in enumerate(("similarity", "weights", "totals", "prototype", "query_norms")):
        wrong = [x[:1] if i == j else x for j, x in enumerate(results)]
        with pytest.raises(RuntimeError, match=f"{name} must be what the forward returned"):
            raw_backward(grad, query, support, mask, *wrong, *options, 3)
    with pytest.raises(RuntimeError, match="a mask of whole numbers has no gradient"):
        raw_backward(grad, query, support, mask > 0.5, *results, *options, 4)


# ------------------------------------------------------------------------------------------------ CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shapes", [((5, 7), (4, 6), (13, 11)), ((47, 63), (47, 63), (375, 500))], ids=str)
def test_cuda_agrees_with_the_written_out_form(
    shapes: tuple[tuple[int, int], ...], layout: Callable[[Tensor], Tensor], dtype: torch.dtype, resize: str
) -> None:
    for mask_dtype in (torch.float32, torch.bool):
        query, support, mask, grad = maps(*shapes, dtype=dtype, mask_dtype=mask_dtype, device="cuda")
        check(layout(query), layout(support.swapaxes(1, 2)).swapaxes(1, 2), mask, grad, resize)


@pytest.mark.cuda
def test_cuda_opcheck_and_gradcheck() -> None:
    *tensors, _ = maps(
        (2, 3), (3, 2), (5, 4), shots=2, channels=2, dtype=torch.float64, mask_dtype=torch.float64, device="cuda"
    )
    leaves = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(operator, (*leaves, None, False, 1e-8, False))
    torch.autograd.gradcheck(masked_similarity, leaves)
    # The second derivative goes through the interpolation of PyTorch, whose backward adds in any order.
    torch.autograd.gradgradcheck(masked_similarity, leaves, nondet_tol=1e-12)
