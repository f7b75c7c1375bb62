"""torch.ops.gingham.cosine_similarity_map and the function on top of it, against the written-out form in float64."""

from __future__ import annotations

import io
import math
import os
import shutil
from collections.abc import Callable
from fractions import Fraction
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
from gingham.array import cosine_similarity_map as array_map
from gingham.nn import CosineSimilarityMap
from gingham.ops import cosine_similarity_map
from oracles.conditions import kernels_of, run_python, threads
from oracles.cosines import Quantity, cosines_and_gradients
from oracles.layouts import (
    LAYOUTS,
    channels_last,
    contiguous,
    every_other_column,
    expanded_batch,
    sliced,
    some_of_the_channels_last,
    transposed,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = ("output", "grad_features", "grad_prototypes")
COUNTS = [1, 5, 8, 9, 21]  # of prototypes: in one pass over the pixels up to 8, as matrix products beyond

operator = torch.ops.gingham.cosine_similarity_map.default
backward_operator = torch.ops.gingham.cosine_similarity_map_backward.default
cuda = pytest.param("cuda", marks=pytest.mark.cuda)


def run(features: Tensor, prototypes: Tensor, grad_output: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Output and gradients of features and prototypes, which may be views of any kind."""
    leaves = [x.detach().requires_grad_() for x in (features, prototypes)]
    output = cosine_similarity_map(*leaves, **options)
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output)


def assert_within_bounds(name: str, got: Tensor, expected: Quantity, dtype: torch.dtype) -> None:
    assert got.shape == expected.exact.shape, name
    assert got.dtype == dtype, name
    error, bound = (got.detach().cpu().double() - expected.exact).abs(), expected.bound(dtype)
    assert bool((error <= bound).all()), f"{name}: {float((error / bound).nan_to_num(math.inf).max()):.2f} times bound"


def check(features: Tensor, prototypes: Tensor, grad_output: Tensor, **options: Any) -> tuple[Tensor, ...]:
    got = run(features, prototypes, grad_output, **options)
    expected = cosines_and_gradients(features.cpu(), prototypes.cpu(), grad_output.cpu(), **options)
    for name, result, exact in zip(NAMES, got, expected, strict=True):
        assert_within_bounds(name, result, exact, features.dtype)
    return got


def maps(
    *size: int,
    batch: int = 2,
    channels: int = 19,
    count: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> list[Tensor]:
    """Features, prototypes and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, channels, *size), (batch, count, channels), (batch, count, *size))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def laid_out(layout: Callable[[Tensor], Tensor], arguments: list[Tensor]) -> list[Tensor]:
    """The maps in that layout."""
    return [layout(arguments[0]), arguments[1], layout(arguments[2])]


# ------------------------------------------------------------------------------------------------ golden values


def golden_case() -> tuple[Tensor, Tensor, Tensor]:
    """Features, prototype and cosines of the specification of SG-One."""
    features = torch.arange(18, dtype=torch.float64).sin().reshape(1, 3, 2, 3)
    prototype = torch.tensor([-1.5703125, -0.0703125, 1.4296875], dtype=torch.float64).reshape(1, 1, 3)
    cosines = torch.tensor([[-0.581502, -0.314577, -0.022887], [0.408349, 0.393224, 0.056270]], dtype=torch.float64)
    return features, prototype, cosines


@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_the_golden_values(dtype: torch.dtype) -> None:
    features, prototype, cosines = golden_case()
    got = cosine_similarity_map(features.to(dtype), prototype.to(dtype))
    tolerance = max(1e-6, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(got[0, 0].double(), cosines, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_cosines_of_equal_opposite_and_orthogonal_vectors(
    layout: Callable[[Tensor], Tensor], count: int, dtype: torch.dtype
) -> None:
    direction = torch.randn(40, generator=torch.Generator().manual_seed(0))
    other = torch.randn(40, generator=torch.Generator().manual_seed(1))
    other -= direction * (other @ direction) / direction.square().sum()
    factors = torch.tensor([2.0, 0.25, -3.0])
    features = torch.stack([*(f * direction for f in factors), other], dim=1).reshape(1, 40, 1, 4).to(dtype)
    prototypes = direction.expand(1, count, 40).to(dtype)
    got = cosine_similarity_map(layout(features), prototypes)
    expected = torch.tensor([1.0, 1.0, -1.0, 0.0]).expand(1, count, 1, 4).to(dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=max(1e-6, 2 * torch.finfo(dtype).eps))
    assert float(got.abs().max()) <= 1 + 1e-6


def test_positive_factors_change_nothing_and_negative_ones_the_sign() -> None:
    features, prototypes, _ = maps(4, 5, dtype=torch.float64)
    plain = cosine_similarity_map(features, prototypes)
    torch.testing.assert_close(cosine_similarity_map(3 * features, 0.01 * prototypes), plain)
    torch.testing.assert_close(cosine_similarity_map(-3 * features, prototypes), -plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_squares_beyond_the_range_of_half_precision(
    layout: Callable[[Tensor], Tensor], count: int, dtype: torch.dtype
) -> None:
    features, prototypes, grad = maps(4, 5, channels=512, count=count)
    arguments = [(1000 * x.sign()).to(dtype) for x in (features, prototypes)]
    check(layout(arguments[0]), arguments[1], layout(grad.to(dtype)))


@pytest.mark.parametrize("torch_compat", [False, True])
def test_the_written_out_gradients_of_the_oracle_are_those_of_autograd(torch_compat: bool) -> None:
    features, prototypes, grad = maps(3, 4, dtype=torch.float64)
    features[0, :, 1, 2], prototypes[1, 2] = 0, 0
    features[0, :, 2, 1] *= 1e-9
    leaves = [x.requires_grad_() for x in (features, prototypes)]
    output = reference.cosine_similarity_map(*leaves, torch_compat=torch_compat)
    by_autograd = (output, *torch.autograd.grad(output, leaves, grad))
    expected = cosines_and_gradients(features, prototypes, grad, torch_compat=torch_compat)
    for result, written_out in zip(by_autograd, expected, strict=True):
        torch.testing.assert_close(result.detach(), written_out.exact.detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_agrees_with_the_oracle(dtype: torch.dtype) -> None:
    features, prototypes, grad = maps(4, 5, dtype=dtype)
    expected = cosines_and_gradients(features, prototypes, grad).output
    assert_within_bounds("reference", reference.cosine_similarity_map(features, prototypes), expected, dtype)


# ------------------------------------------------------------------------------------------------ vectors of no length


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_a_vector_of_no_length_has_cosine_zero_and_no_gradient(
    layout: Callable[[Tensor], Tensor], count: int, dtype: torch.dtype
) -> None:
    features, prototypes, grad = maps(5, 7, count=count, dtype=dtype)
    features[0, :, 2, 3] = 0
    prototypes[1, count - 1] = 0
    output, grad_features, grad_prototypes = check(*laid_out(layout, [features, prototypes, grad]))
    for nothing in (output[0, :, 2, 3], output[1, -1], grad_features[0, :, 2, 3], grad_prototypes[1, -1]):
        assert not bool(nothing.any())


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_norms_up_to_eps_count_as_none(layout: Callable[[Tensor], Tensor], count: int) -> None:
    features, prototypes, grad = maps(5, 7, count=count, dtype=torch.float64)
    features[0, :, 1, 1] *= 0.5 / features[0, :, 1, 1].norm()
    features[0, :, 1, 2] *= 0.501 / features[0, :, 1, 2].norm()
    output, grad_features, _ = check(*laid_out(layout, [features, prototypes, grad]), eps=0.5 + 1e-9)
    assert not bool(output[0, :, 1, 1].any())
    assert not bool(grad_features[0, :, 1, 1].any())
    assert bool(output[0, :, 1, 2].all())


def test_any_norm_but_zero_is_above_an_eps_of_zero() -> None:
    features, prototypes, grad = maps(3, 4, dtype=torch.float64)
    features[0, :, 1, 1] *= 1e-100
    features[0, :, 2, 1] = 0
    output, *_ = check(features, prototypes, grad, eps=0.0)
    assert bool(output[0, :, 1, 1].all())
    assert not bool(output[0, :, 2, 1].any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_torch_compat_gives_what_torch_gives(
    eps: float, layout: Callable[[Tensor], Tensor], count: int, dtype: torch.dtype
) -> None:
    features, prototypes, grad = maps(5, 7, count=count, dtype=dtype)
    features[0, :, 2, 3], prototypes[1, count - 1] = 0, 0
    features[1, :, 0, 0] *= 0.1 * eps
    prototypes[0, 0] *= 0.1 * eps
    features = layout(features)
    got = run(features, prototypes, grad, eps=eps, torch_compat=True)
    leaves = [x.detach().double().requires_grad_() for x in (features, prototypes)]
    output = F.cosine_similarity(leaves[0][:, None], leaves[1][..., None, None], dim=2, eps=eps)
    exact = (output, *torch.autograd.grad(output, leaves, grad.double()))
    for name, result, expected in zip(NAMES, got, exact, strict=True):
        # A sum of gradients of order 1 / eps and of others.
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        size = expected.abs().amax(dim=1 if name == "grad_features" else -1, keepdim=True).detach()
        error = (result.double() - expected.detach()).abs()
        assert bool((error <= tolerance * (size + 1)).all()), name


def test_each_norm_is_clamped_not_their_product() -> None:
    tiny = torch.full((1, 1, 1, 1), 2e-5)
    assert float(cosine_similarity_map(tiny, tiny[0], torch_compat=True)) == pytest.approx(1.0)
    assert float(cosine_similarity_map(tiny, tiny[0])) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 21])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("which", range(3))
def test_what_is_not_a_number_spoils_what_depends_on_it_and_no_later_call(
    which: int, layout: Callable[[Tensor], Tensor], count: int, dtype: torch.dtype
) -> None:
    clean = laid_out(layout, maps(9, 17, batch=1, count=count, dtype=dtype))
    before = run(*clean)
    spoilt = [x.clone() for x in clean]
    spoilt[which][(0, 1, 2) if which == 1 else (0, 1, 2, 3)] = math.nan
    got = run(*spoilt)
    leaves = [x.clone().requires_grad_() for x in spoilt[:2]]
    output = reference.cosine_similarity_map(*leaves)
    expected = (output, *torch.autograd.grad(output, leaves, spoilt[2]))
    for name, result, exact in zip(NAMES, got, expected, strict=True):
        assert torch.equal(result.isnan(), exact.isnan()), name
    assert all(torch.equal(a, b) for a, b in zip(before, run(*clean), strict=True))  # scratch memory is used again


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("count", COUNTS)
def test_gradients_are_orthogonal_to_what_they_belong_to(count: int) -> None:
    features, prototypes, grad = maps(5, 7, count=count, dtype=torch.float64)
    _, grad_features, grad_prototypes = run(features, prototypes, grad)
    assert float(grad_prototypes.abs().max()) > 0.1
    assert float((features * grad_features).sum(dim=1).abs().max()) < 1e-13
    # A prototype that is alone is orthogonal to its own gradient, and every one is, as no other enters it.
    assert float((prototypes * grad_prototypes).sum(dim=2).abs().max()) < 1e-12


@pytest.mark.parametrize(("count", "torch_compat"), [(1, False), (3, True), (9, False)])
def test_gradcheck_and_gradgradcheck(count: int, torch_compat: bool) -> None:
    leaves = [x.requires_grad_() for x in maps(2, 3, batch=1, channels=3, count=count, dtype=torch.float64)[:2]]

    def function(features: Tensor, prototypes: Tensor) -> Tensor:
        return cosine_similarity_map(features, prototypes, torch_compat=torch_compat)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_second_derivatives_at_vectors_of_no_length_are_finite() -> None:
    features, prototypes, _ = maps(2, 3, batch=1, dtype=torch.float64)
    features[0, :, 1, 1], prototypes[0, 1] = 0, 0
    leaves = [x.requires_grad_() for x in (features, prototypes)]
    first = torch.autograd.grad(cosine_similarity_map(*leaves).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
    assert all(bool(x.isfinite().all()) for x in second)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("count", [3, 9])
def test_one_argument_alone_may_require_grad(which: int, count: int) -> None:
    *arguments, grad = maps(4, 5, count=count)
    everything = run(*arguments, grad)
    arguments[which] = arguments[which].clone().requires_grad_()
    cosine_similarity_map(*arguments).backward(grad)
    assert torch.equal(arguments[which].grad, everything[1 + which])


@pytest.mark.parametrize("count", [3, 9])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_an_expanded_gradient_of_the_output(layout: Callable[[Tensor], Tensor], count: int) -> None:
    features, prototypes, grad = maps(4, 5, count=count)
    features = layout(features)
    for by_sum, by_ones in zip(
        run(features, prototypes, torch.ones(()).expand_as(grad)),
        run(features, prototypes, torch.ones_like(grad)),
        strict=True,
    ):
        torch.testing.assert_close(by_sum, by_ones)


def test_no_graph_without_gradients() -> None:
    leaves = [x.requires_grad_() for x in maps(4, 5)[:2]]
    with torch.no_grad():
        assert not cosine_similarity_map(*leaves).requires_grad
    with torch.inference_mode():
        assert cosine_similarity_map(*leaves).is_inference()
    assert cosine_similarity_map(*leaves).requires_grad


def test_arguments_changed_before_backward_are_noticed() -> None:
    features, prototypes, grad = maps(4, 5)
    output = cosine_similarity_map(features, prototypes.requires_grad_())
    features.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(grad)


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced])
@pytest.mark.parametrize("count", [1, 3, 9, 33])
@pytest.mark.parametrize("size", [(5, 6), (1, 7), (7, 1), (1, 1), (3, 43), (11, 13), (1, 145), (129, 2)])
def test_agrees_with_the_written_out_form(
    size: tuple[int, int], count: int, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    check(*laid_out(layout, maps(*size, count=count, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize(
    ("channels", "count"),
    [(1, 1), (1, 9), (2, 2), (7, 4), (8, 6), (15, 7), (16, 8), (17, 12), (33, 16), (129, 3), (130, 65), (513, 130)],
)
def test_any_number_of_channels_and_prototypes(
    channels: int, count: int, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    check(*laid_out(layout, maps(6, 11, channels=channels, count=count, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [contiguous, channels_last, transposed])
@pytest.mark.parametrize("count", [1, 21])
def test_agrees_with_the_written_out_form_on_the_map_of_the_paper(
    count: int, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    check(*laid_out(layout, maps(47, 63, batch=1, channels=512, count=count, dtype=dtype)))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_no_prototypes(layout: Callable[[Tensor], Tensor]) -> None:
    output, grad_features, grad_prototypes = run(*laid_out(layout, maps(4, 5, count=0)))
    assert output.shape == (2, 0, 4, 5)
    assert not bool(grad_features.any())
    assert grad_prototypes.shape == (2, 0, 19)


@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced])
@pytest.mark.parametrize(("channels", "count"), [(19, 2), (19, 9), (1, 2)])
@pytest.mark.parametrize(("batch", "size"), [(0, (4, 5)), (2, (0, 5)), (2, (4, 0)), (0, (0, 0))])
def test_empty_maps(
    batch: int, size: tuple[int, int], channels: int, count: int, layout: Callable[[Tensor], Tensor]
) -> None:
    arguments = maps(*size, batch=batch, channels=channels, count=count)
    output, grad_features, grad_prototypes = run(*laid_out(layout, arguments))
    assert output.shape == (batch, count, *size)
    assert grad_features.shape == (batch, channels, *size)
    assert not bool(grad_prototypes.any())
    assert grad_prototypes.shape == (batch, count, channels)


@pytest.mark.parametrize(
    ("batch", "channels", "count", "size"), [(9000, 2, 1, (2, 3)), (1, 66_000, 2, (2, 3)), (1, 2, 3000, (2, 3))]
)
def test_more_of_something_than_usual(batch: int, channels: int, count: int, size: tuple[int, int]) -> None:
    check(*maps(*size, batch=batch, channels=channels, count=count))


# ------------------------------------------------------------------------------------------------ any layout


@settings(max_examples=400)
@given(data=st.data())
def test_agrees_with_the_written_out_form_whatever_the_arguments(data: st.DataObject) -> None:
    extents = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 20])
    arguments = maps(
        data.draw(extents, label="height"),
        data.draw(extents, label="width"),
        batch=data.draw(st.integers(1, 3), label="batch"),
        channels=data.draw(st.integers(1, 70), label="channels"),
        count=data.draw(st.integers(1, 24), label="prototypes"),
        dtype=data.draw(st.sampled_from(DTYPES), label="dtype"),
        seed=data.draw(st.integers(0, 1000), label="seed"),
    )
    of_maps = [data.draw(st.sampled_from(LAYOUTS), label=name) for name in ("features", "grad output")]
    of_prototypes = data.draw(st.sampled_from([contiguous, every_other_column, expanded_batch]), label="prototypes")
    options = {
        "eps": data.draw(st.sampled_from([1e-8, 0.0, 1.5]), label="eps"),
        "torch_compat": data.draw(st.booleans(), label="torch_compat"),
    }
    if options["eps"] == 0:
        options["torch_compat"] = False  # 0 / 0 there
    with threads(data.draw(st.sampled_from([1, 2]), label="threads")):
        check(of_maps[0](arguments[0]), of_prototypes(arguments[1]), of_maps[1](arguments[2]), **options)


@pytest.mark.parametrize("count", [3, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_neither_result_nor_arguments(layout: Callable[[Tensor], Tensor], count: int) -> None:
    arguments = laid_out(layout, maps(5, 6, count=count))
    before = [x.clone(memory_format=torch.contiguous_format) for x in arguments]
    for name, result, plain in zip(NAMES, run(*arguments), run(*before), strict=True):
        torch.testing.assert_close(result, plain, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for x, copy in zip(arguments, before, strict=True):
        assert torch.equal(x, copy)


@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_offsets_past_two_to_the_31(layout: Callable[[Tensor], Tensor], axis: int, count: int) -> None:
    innermost = 3 if layout is contiguous else 1
    if axis == innermost:
        pytest.skip("a step of this axis is copied, not read in place")
    features, prototypes, grad = laid_out(layout, maps(4, 5, channels=2, count=count, dtype=torch.bfloat16))
    strides = list(features.stride())
    strides[axis] = 2**31 // (features.shape[axis] - 1) + 64
    last = sum((extent - 1) * stride for extent, stride in zip(features.shape, strides, strict=True))
    assert last > 2**31
    far = features.new_empty(last + 1).as_strided(features.shape, strides).copy_(features)
    for got, near in zip(run(far, prototypes, grad), run(features, prototypes, grad), strict=True):
        assert torch.equal(got, near)


def test_negated_views() -> None:
    arguments = maps(5, 6)
    negated = [torch.complex(torch.zeros_like(x), -x).conj().imag for x in arguments]
    assert all(x.is_neg() for x in negated)
    for got, plain in zip(run(*negated), run(*arguments), strict=True):
        torch.testing.assert_close(got, plain)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_results_have_the_memory_format_of_features(count: int) -> None:
    features, prototypes, grad = maps(5, 6, count=count)
    last = features.contiguous(memory_format=torch.channels_last)
    for result in run(last, prototypes, grad)[:2]:
        assert result.is_contiguous(memory_format=torch.channels_last)
    for result in run(features, prototypes, grad):
        assert result.is_contiguous()


# ------------------------------------------------------------------------------------------------ bit for bit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced])
@pytest.mark.parametrize("count", [1, 3, 21])
def test_the_number_of_threads_changes_no_bit(
    count: int, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    for batch, size in ((3, (33, 31)), (1, (65, 67))):
        arguments = laid_out(layout, maps(*size, batch=batch, channels=100, count=count, dtype=dtype))
        results = []
        for number in (1, 2, 3, 7):
            with threads(number):
                results.append(run(*arguments))
        for others in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("count", [1, 3, 21])
def test_a_sample_in_a_batch_is_the_sample_alone(
    count: int, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    arguments = laid_out(layout, maps(9, 41, batch=5, channels=70, count=count, dtype=dtype))
    together = run(*arguments)
    for sample in range(5):
        alone = run(*(x[sample : sample + 1] for x in arguments))
        assert all(torch.equal(a, b[sample : sample + 1]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("device", ["cpu", cuda])
@pytest.mark.parametrize("count", [3, 21])
def test_repeated_calls_agree_bit_for_bit(count: int, device: str) -> None:
    arguments = maps(33, 31, batch=3, count=count, device=device)
    first = run(*arguments)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, run(*arguments), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------------------------ PyTorch's machinery


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last, every_other_column])
@pytest.mark.parametrize("count", [1, 9])
def test_opcheck(count: int, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    features, prototypes, grad = laid_out(layout, maps(3, 4, count=count, dtype=dtype))
    results = operator(features, prototypes, 1e-8)
    torch.library.opcheck(backward_operator, (grad, features, prototypes, *results, 1e-8))
    raw = torch.ops.gingham._cosine_similarity_map.default
    torch.library.opcheck(raw, (features, prototypes, 1e-8), test_utils=("test_schema", "test_faketensor"))
    leaves = [x.requires_grad_() for x in (features, prototypes)]
    torch.library.opcheck(operator, (*leaves, 1e-8, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_the_eager_path_is_the_registered_formula(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    features, prototypes, grad = laid_out(layout, maps(5, 6, dtype=dtype))
    leaves = [x.detach().requires_grad_() for x in (features, prototypes)]
    output, feature_norms, prototype_norms = operator(*leaves, 1e-8)
    torch.testing.assert_close(feature_norms.double(), features.double().norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(prototype_norms.double(), prototypes.double().norm(dim=2), rtol=1e-5, atol=0)
    registered = (output, *torch.autograd.grad(output, leaves, grad))
    for eager, formula in zip(run(features, prototypes, grad), registered, strict=True):
        assert torch.equal(eager, formula)
        assert eager.stride() == formula.stride()


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_autocast_casts_mixed_dtypes_to_the_widest(device: str) -> None:
    features, prototypes, _ = maps(5, 6, device=device)
    low = features.bfloat16()
    with torch.autocast(device, torch.bfloat16):
        for call in (cosine_similarity_map, lambda *x: operator(*x, 1e-8)[0]):
            assert call(features, prototypes).dtype == torch.float32
            assert call(low, prototypes.bfloat16()).dtype == torch.bfloat16
            mixed = call(low, prototypes)
            assert torch.equal(mixed, cosine_similarity_map(low.float(), prototypes))
            assert call(features.double(), prototypes).dtype == torch.float64
    with pytest.raises(TypeError, match="prototypes must have the dtype of features"):
        cosine_similarity_map(low, prototypes)


def test_vmap() -> None:
    features, prototypes, _ = maps(4, 5, batch=6)
    mapped = torch.vmap(cosine_similarity_map, in_dims=(2, None))(
        features.unflatten(0, (3, 2)).movedim(0, 2), prototypes[:2]
    )
    for i in range(3):
        torch.testing.assert_close(mapped[i], cosine_similarity_map(features[2 * i : 2 * i + 2], prototypes[:2]))


def test_func_grad_and_vmap_over_it() -> None:
    features, prototypes, grad = maps(4, 5, batch=6)

    def loss(features: Tensor, prototypes: Tensor, weight: Tensor) -> Tensor:
        return (cosine_similarity_map(features, prototypes) * weight).sum()

    expected = run(features, prototypes, grad)[1:]
    for got, exact in zip(torch.func.grad(loss, argnums=(0, 1))(features, prototypes, grad), expected, strict=True):
        torch.testing.assert_close(got, exact)
    batched = [x.unflatten(0, (3, 2)) for x in (features, prototypes, grad)]
    for got, exact in zip(torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(*batched), expected, strict=True):
        torch.testing.assert_close(got.flatten(0, 1), exact)


def test_func_second_derivatives_and_vmap_over_them() -> None:
    features, prototypes, grad = maps(3, 4, batch=4, dtype=torch.float64)

    def penalty(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def of_gradients(features: Tensor, prototypes: Tensor, weight: Tensor) -> Tensor:
            gradients = torch.func.grad(lambda *x: (function(*x) * weight).sum(), argnums=(0, 1))
            return torch.stack([x.square().sum() for x in gradients(features, prototypes)]).sum()

        return torch.func.grad(of_gradients, argnums=(0, 1, 2))

    expected = penalty(reference.cosine_similarity_map)(features, prototypes, grad)
    for got, exact in zip(penalty(cosine_similarity_map)(features, prototypes, grad), expected, strict=True):
        torch.testing.assert_close(got, exact)
    batched = [x.unflatten(0, (2, 2)) for x in (features, prototypes, grad)]
    for got, exact in zip(torch.vmap(penalty(cosine_similarity_map))(*batched), expected, strict=True):
        torch.testing.assert_close(got.flatten(0, 1), exact)


def _gate(features: Tensor, prototypes: Tensor) -> Tensor:
    return features[:, :3] * cosine_similarity_map(features, prototypes, eps=1e-6).relu()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_is_one_graph_with_dynamic_shapes(backend: str) -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if backend == "inductor" and not compiler:
        pytest.skip("inductor needs a C++ compiler on PATH")
    torch.compiler.reset()
    compiled = torch.compile(_gate, backend=backend, fullgraph=True, dynamic=True)
    for batch, size in ((2, (4, 5)), (3, (7, 6)), (5, (3, 9))):
        features, prototypes, grad = maps(*size, batch=batch)
        got, expected = [], []
        for function, results in ((compiled, got), (_gate, expected)):
            leaves = [x.clone().requires_grad_() for x in (features, prototypes)]
            output = function(*leaves)
            results += [output, *torch.autograd.grad(output, leaves, grad)]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", [contiguous, channels_last, every_other_column])
@pytest.mark.parametrize("count", [1, 9])
def test_compiled_results_are_the_eager_ones_in_any_layout(count: int, layout: Callable[[Tensor], Tensor]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(cosine_similarity_map, backend="aot_eager", fullgraph=True)
    features, prototypes, grad = laid_out(layout, maps(4, 5, count=count))
    leaves = [x.detach().requires_grad_() for x in (features, prototypes)]
    output = compiled(*leaves, eps=0.5, torch_compat=True)
    results = (output, *torch.autograd.grad(output, leaves, grad))
    eager_results = run(features, prototypes, grad, eps=0.5, torch_compat=True)
    for got, eager in zip(results, eager_results, strict=True):
        assert torch.equal(got, eager)
    assert output.stride() == eager_results[0].stride()


def test_compile_says_what_is_wrong_with_an_argument() -> None:
    torch.compiler.reset()
    features, prototypes, _ = maps(4, 5)
    with pytest.raises(ValueError, match=r"cosine_similarity_map: prototypes must be \[2, P, 19\]"):
        torch.compile(cosine_similarity_map, backend="eager")(features, prototypes[..., :3])


def test_compile_under_autocast() -> None:
    torch.compiler.reset()
    compiled = torch.compile(_gate, backend="aot_eager", fullgraph=True)
    features, prototypes, _ = maps(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(features, prototypes), _gate(features, prototypes))


class _Gate(torch.nn.Module):
    def forward(self, features: Tensor, prototypes: Tensor) -> Tensor:
        return _gate(features, prototypes)


def test_export_with_dynamic_batch_height_and_width() -> None:
    batch, height, width = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "height", "width"))
    exported = torch.export.export(
        _Gate(),
        tuple(maps(4, 5)[:2]),
        dynamic_shapes={"features": {0: batch, 2: height, 3: width}, "prototypes": {0: batch}},
    )
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch_size, size in ((2, (4, 5)), (3, (7, 6)), (1, (9, 2))):
        arguments = maps(*size, batch=batch_size)[:2]
        torch.testing.assert_close(loaded(*arguments), _gate(*arguments))


def test_the_module_is_the_function() -> None:
    features, prototypes, _ = maps(4, 5)
    module = CosineSimilarityMap(eps=6.0, torch_compat=True)
    expected = cosine_similarity_map(features, prototypes, eps=6.0, torch_compat=True)
    assert torch.equal(module(features, prototypes), expected)
    assert not torch.equal(CosineSimilarityMap()(features, prototypes), expected)
    assert repr(module) == "CosineSimilarityMap(eps=6.0, torch_compat=True)"
    for eps in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="eps must be finite and not negative"):
            CosineSimilarityMap(eps=eps)


# ------------------------------------------------------------------------------------------------ other processes

MEMORY = """
import resource, torch
from gingham.ops import cosine_similarity_map
torch.set_num_threads(2)
def step(features, prototypes):
    leaves = [x.requires_grad_() for x in (features, prototypes)]
    output = cosine_similarity_map(*leaves)
    return torch.autograd.grad(output, leaves, torch.ones_like(output))
step(torch.randn(1, 64, 9, 9), torch.randn(1, 16, 64))
features, prototypes = torch.randn(16, 256, 64, 64), torch.randn(16, 16, 256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
results = step(features, prototypes)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer keeps freed memory")
def test_no_normalised_copy_is_stored() -> None:
    finished = run_python(MEMORY)
    assert finished.returncode == 0, finished.stderr
    one_map = 16 * 256 * 64 * 64 * 4 / 2**20  # 64 MB
    outputs = 2 * one_map / 16  # and the gradient of the output
    assert int(finished.stdout) < 1.3 * one_map + outputs  # the gradient of the features is one map


INSTRUCTION_SET = """
import sys, torch
from gingham.ops import cosine_similarity_map
results = []
for arguments in torch.load(sys.argv[1]):
    leaves = [x.requires_grad_() for x in arguments[:2]]
    output = cosine_similarity_map(*leaves)
    results.append([output.detach(), *torch.autograd.grad(output, leaves, arguments[2])])
torch.save(results, sys.argv[2])
"""


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set_agrees_with_the_written_out_form(name: str, tmp_path: Path) -> None:
    if name not in info()["instruction sets available"].split(", "):
        pytest.skip("this machine does not have it")
    cases = [
        laid_out(layout, maps(*size, channels=channels, count=count, dtype=dtype))
        for size in ((9, 33), (1, 5), (7, 19))
        for channels in (3, 81)
        for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 21, 66)
        for dtype in kernels_of(name, DTYPES)
        for layout in (contiguous, channels_last)
    ]
    torch.save(cases, tmp_path / "arguments.pt")
    finished = run_python(
        INSTRUCTION_SET, str(tmp_path / "arguments.pt"), str(tmp_path / "results.pt"), GINGHAM_CPU=name
    )
    assert finished.returncode == 0, finished.stderr
    for arguments, results in zip(cases, torch.load(tmp_path / "results.pt"), strict=True):
        for which, result, exact in zip(NAMES, results, cosines_and_gradients(*arguments), strict=True):
            assert_within_bounds(which, result, exact, arguments[0].dtype)


# ------------------------------------------------------------------------------------------------ arrays


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_arrays_give_what_tensors_give(count: int, dtype: Any) -> None:
    features, prototypes, _ = maps(5, 6, count=count)
    kind = getattr(torch, np.dtype(dtype).name)
    expected = cosine_similarity_map(features.to(kind), prototypes.to(kind), eps=4.0, torch_compat=True)
    arrays = [x.numpy().astype(dtype) for x in (features, prototypes)]
    room = np.zeros((2, 19, 5, 14), dtype=dtype)
    room[..., 1:13:2] = arrays[0]
    for x in (arrays[0], np.moveaxis(np.ascontiguousarray(np.moveaxis(arrays[0], 1, -1)), -1, 1), room[..., 1:13:2]):
        for vectors in (arrays[1], np.asfortranarray(arrays[1]), arrays[1][:, ::-1][:, ::-1]):
            got = array_map(x, vectors, eps=4.0, torch_compat=True)
            assert got.dtype == dtype
            np.testing.assert_allclose(
                got.astype(np.float64), expected.double().numpy(), rtol=0, atol=4 * float(torch.finfo(kind).eps)
            )
    reversed_ = array_map(arrays[0][:, :, ::-1], arrays[1])
    np.testing.assert_array_equal(reversed_[:, :, ::-1], array_map(arrays[0], arrays[1]))


def test_arrays_are_written_to_out() -> None:
    features, prototypes = (x.numpy() for x in maps(5, 6)[:2])
    expected = array_map(features, prototypes)
    for out in (np.empty((2, 3, 5, 6), np.float32), np.empty((2, 5, 6, 3), np.float32).transpose(0, 3, 1, 2)):
        assert array_map(features, prototypes, out=out, threads=2) is out
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": [1.0]}, TypeError, "features must be a NumPy or CuPy array, got list"),
        ({"features": np.ones((2, 5, 4, 5), np.int32)}, TypeError, "features must be float32, .* got int32"),
        ({"prototypes": np.ones((2, 3, 5))}, TypeError, "prototypes must have the dtype of features, got float64"),
        ({"features": np.ones((2, 5, 4), np.float32)}, ValueError, r"features must be \[B, C, H, W\]"),
        ({"features": np.ones((2, 0, 4, 5), np.float32)}, ValueError, "features must have at least one channel"),
        ({"prototypes": np.ones((2, 3, 4), np.float32)}, ValueError, r"prototypes must be \[2, P, 5\]"),
        ({"prototypes": np.ones((1, 3, 5), np.float32)}, ValueError, r"prototypes must be \[2, P, 5\]"),
        ({"out": np.ones((2, 3, 4, 4), np.float32)}, ValueError, r"out must have the shape \(2, 3, 4, 5\)"),
        ({"eps": -1}, ValueError, "eps must be finite and not negative, got -1"),
        ({"eps": 1e-40, "torch_compat": True}, ValueError, "eps must be at least 1.1754943508222875e-38, .*got 1e-40"),
        ({"eps": "1"}, TypeError, "eps must be a number, got str"),
        ({"torch_compat": 1}, TypeError, "torch_compat must be a bool, got int"),
        ({"threads": 0}, ValueError, "threads must be a positive whole number, got 0"),
    ],
)
def test_wrong_arrays(changes: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"features": np.ones((2, 5, 4, 5), np.float32), "prototypes": np.ones((2, 3, 5), np.float32)}
    with pytest.raises(error, match=f"cosine_similarity_map: {message}"):
        array_map(**(arguments | changes))


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("eps", [0, 1, True, np.float32(0.5), np.float16(0.5), np.int64(2), Fraction(1, 2)])
def test_eps_may_be_any_real_number(eps: Any) -> None:
    arguments = maps(4, 5)
    for got, expected in zip(run(*arguments, eps=eps), run(*arguments, eps=float(eps)), strict=True):
        assert torch.equal(got, expected)
    arrays = [x.numpy() for x in arguments[:2]]
    assert np.array_equal(array_map(*arrays, eps=eps), array_map(*arrays, eps=float(eps)))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": None}, TypeError, "features must be a tensor, got NoneType"),
        ({"prototypes": [1.0]}, TypeError, "prototypes must be a tensor, got list"),
        (
            {"features": torch.ones(2, 5, 4, 5, dtype=torch.int64)},
            TypeError,
            r"features must be float32.*got int64 \[2, 5, 4, 5\]",
        ),
        ({"prototypes": torch.ones(2, 3, 5).half()}, TypeError, "prototypes must have the dtype of features, got flo"),
        ({"features": torch.ones(2, 5, 4)}, ValueError, r"features must be \[B, C, H, W\], got float32 \[2, 5, 4\]"),
        ({"features": torch.ones(2, 5, 1, 4, 5)}, ValueError, r"features must be \[B, C, H, W\]"),
        (
            {"features": torch.ones(2, 0, 4, 5), "prototypes": torch.ones(2, 3, 0)},
            ValueError,
            "features must have at least one channel",
        ),
        ({"prototypes": torch.ones(2, 3, 6)}, ValueError, r"prototypes must be \[2, P, 5\] to match features"),
        ({"prototypes": torch.ones(1, 3, 5)}, ValueError, r"prototypes must be \[2, P, 5\] to match features"),
        ({"prototypes": torch.ones(2, 5)}, ValueError, r"prototypes must be \[2, P, 5\] to match features"),
        (
            {"prototypes": torch.ones(2, 3, 5, device="meta")},
            ValueError,
            "prototypes must be on the device of features, got .* on meta",
        ),
        ({"prototypes": torch.ones(2, 3, 5).to_sparse()}, TypeError, "prototypes must be a dense tensor, got sparse"),
        ({"eps": torch.tensor(1.0)}, TypeError, r"eps must be a number, got float32 \[\]"),
        ({"eps": "1"}, TypeError, "eps must be a number, got str"),
        ({"eps": None}, TypeError, "eps must be a number, got NoneType"),
        ({"eps": -1e-9}, ValueError, "eps must be finite and not negative, got -1e-09"),
        ({"eps": 1e-40, "torch_compat": True}, ValueError, "eps must be at least 1.1754943508222875e-38, .*got 1e-40"),
        ({"eps": math.nan}, ValueError, "eps must be finite and not negative, got nan"),
        ({"eps": math.inf}, ValueError, "eps must be finite and not negative, got inf"),
        ({"eps": 10**400}, ValueError, "eps must be in the range of float64"),
        ({"eps": Fraction(10**400)}, ValueError, "eps must be in the range of float64"),
        ({"torch_compat": 1}, TypeError, "torch_compat must be a bool, got int"),
        ({"torch_compat": None}, TypeError, "torch_compat must be a bool, got NoneType"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str, requires_grad: bool) -> None:
    features, prototypes, _ = maps(4, 5, channels=5)
    arguments = {"features": features, "prototypes": prototypes} | changes
    if requires_grad:
        arguments = {
            name: x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in arguments.items()
        }
    with pytest.raises(error, match=f"cosine_similarity_map: {message}"):
        cosine_similarity_map(**arguments)


def test_an_eps_by_which_nothing_is_divided_may_be_as_small_as_one_likes() -> None:
    features, prototypes, _ = maps(4, 5)
    expected = cosine_similarity_map(features, prototypes, eps=0.0)
    assert torch.equal(cosine_similarity_map(features, prototypes, eps=1e-50), expected)
    wide = features.double() * 0, prototypes.double()
    assert not cosine_similarity_map(*wide, eps=1e-50, torch_compat=True).any()


def test_the_operator_itself_checks_its_arguments() -> None:
    features, prototypes, grad = maps(4, 5)
    output, feature_norms, prototype_norms = operator(features, prototypes, 1e-8)
    raw = torch.ops.gingham._cosine_similarity_map
    raw_backward = torch.ops.gingham._cosine_similarity_map_backward
    with pytest.raises(RuntimeError, match="must have the same batch and channels"):
        raw(features, prototypes[..., :3], 1e-8)
    with pytest.raises(RuntimeError, match="eps must be finite and not negative"):
        raw(features, prototypes, -1.0)
    kept = (output, feature_norms, prototype_norms)
    for position, wrong, message in (
        (0, grad.double(), "grad_output must be"),
        (3, output[:, :2], "output must be"),
        (4, feature_norms[:1], "feature_norms must have the shape, dtype and device"),
        (5, prototype_norms.double(), "prototype_norms must have the shape, dtype and device"),
    ):
        arguments = [grad, features, prototypes, *kept]
        arguments[position] = wrong
        with pytest.raises(RuntimeError, match=f"cosine_similarity_map: {message}"):
            raw_backward(*arguments, 1e-8)


def test_meta_tensors_have_the_shapes_and_no_data() -> None:
    features, prototypes, _ = (x.to("meta") for x in maps(4, 5))
    assert cosine_similarity_map(features, prototypes).shape == (2, 3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert cosine_similarity_map(features, prototypes).is_meta
    compiled = torch.compile(cosine_similarity_map, fullgraph=True, backend="eager")
    assert compiled(features, prototypes).shape == (2, 3, 4, 5)


# ------------------------------------------------------------------------------------------------ CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout", [contiguous, channels_last, sliced, every_other_column, some_of_the_channels_last, expanded_batch]
)
@pytest.mark.parametrize("count", [1, 3, 8, 9, 70])
@pytest.mark.parametrize("size", [(5, 6), (1, 7), (7, 1), (31, 33)])
def test_cuda_agrees_with_the_written_out_form(
    size: tuple[int, int], count: int, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    check(*laid_out(layout, maps(*size, count=count, dtype=dtype, device="cuda")))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize(("channels", "count"), [(1, 1), (512, 1), (512, 5), (513, 21), (2048, 2), (64, 200)])
def test_cuda_any_number_of_channels_and_prototypes(
    channels: int, count: int, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    check(*laid_out(layout, maps(47, 63, batch=1, channels=channels, count=count, dtype=dtype, device="cuda")))


@pytest.mark.cuda
@pytest.mark.parametrize("torch_compat", [False, True])
def test_cuda_vectors_of_no_length(torch_compat: bool) -> None:
    for count in (2, 9):
        features, prototypes, grad = maps(5, 7, count=count, device="cuda")
        features[0, :, 2, 3], prototypes[1, 1] = 0, 0
        check(features, prototypes, grad, torch_compat=torch_compat)


@pytest.mark.cuda
def test_cuda_runs_on_the_current_stream() -> None:
    cold = maps(33, 31, count=2)
    expected = run(*(x.cuda() for x in cold))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # an operator on another stream would read what is not there yet
        arguments = [x.pin_memory().cuda(non_blocking=True) for x in cold]
        got = run(*arguments)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.cuda
def test_cuda_nothing_to_do() -> None:
    for batch, size, count in ((0, (4, 5), 2), (2, (0, 5), 2), (2, (4, 5), 0), (2, (4, 0), 9)):
        output, _, grad_prototypes = run(*maps(*size, batch=batch, count=count, device="cuda"))
        assert output.shape == (batch, count, *size)
        assert not bool(grad_prototypes.any())


@pytest.mark.cuda
def test_cuda_opcheck_and_gradcheck() -> None:
    leaves = [x.requires_grad_() for x in maps(3, 4, batch=1, channels=3, dtype=torch.float64, device="cuda")[:2]]
    torch.library.opcheck(operator, (*leaves, 1e-8))
    torch.autograd.gradcheck(cosine_similarity_map, leaves)
    torch.autograd.gradgradcheck(cosine_similarity_map, leaves)
