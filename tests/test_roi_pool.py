"""torch.ops.gingham.roi_pool and all on top of it: bit for bit what plain loops and torchvision give."""

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

from gingham import info, reference
from gingham.array import roi_pool as array_roi_pool
from gingham.nn import RoIPool
from gingham.ops import roi_pool
from oracles.conditions import kernels_of, run_python, threads
from oracles.layouts import LAYOUTS, channels_last, contiguous, sliced
from oracles.roi_maxima import LOWEST, roi_maxima, scattered

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
operator = torch.ops.gingham.roi_pool.default
backward_operator = torch.ops.gingham.roi_pool_backward.default
# The same with the places of the maxima, which forward keeps for backward.
keeping_operator = torch.ops.gingham.roi_pool_with_places.default
keeping_backward_operator = torch.ops.gingham.roi_pool_with_places_backward.default
cuda = pytest.param("cuda", marks=pytest.mark.cuda)

RAMP = torch.arange(1.0, 65.0).reshape(1, 1, 8, 8)


def box(*corners: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([[0.0, *corners]], dtype=dtype)


def dtype_of_boxes(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_features(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rounded, so that there are ties and zeros of both signs, and some pixels that never win."""
    generator = torch.Generator().manual_seed(seed)
    features = (2 * torch.randn(shape, generator=generator)).round() / 2
    features[torch.rand(shape, generator=generator) < 0.1] = math.nan
    features[torch.rand(shape, generator=generator) < 0.1] = -math.inf
    return features.to(dtype)


def random_boxes(count: int, features: Tensor, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Inside and outside of the map, reversed ones among them, half of them at whole or half pixels."""
    generator = torch.Generator().manual_seed(seed)
    batch, _, height, width = features.shape
    corners = (torch.rand(count, 4, generator=generator) * 1.6 - 0.3) * torch.tensor([width, height, width, height])
    corners[::2] = (2 * corners[::2]).round() / 2
    image = torch.randint(0, batch, (count, 1), generator=generator)
    return torch.cat([image, corners / scale], dim=1).to(dtype_of_boxes(features.dtype))


def random_grad(output: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output.dtype)


def run(features: Tensor, boxes: Tensor, size: Any, scale: float, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and the gradient of features, which may be a view of any kind: the same with and without the places."""
    leaf = features.detach().requires_grad_()
    output = roi_pool(leaf, boxes, size, scale)
    grad = random_grad(output).to(output.device) if grad is None else grad
    (gradient,) = torch.autograd.grad(output, leaf, grad)
    arguments = boxes, *((size, size) if isinstance(size, int) else size), scale
    assert same_bits(operator(features, *arguments), output)
    assert same_bits(backward_operator(grad, features, *arguments), gradient)
    kept, places = keeping_operator(features, *arguments)
    assert same_bits(kept, output)
    assert same_bits(keeping_backward_operator(grad, features, boxes, places, *arguments[1:]), gradient)
    return output.detach(), gradient


def to_numpy(x: Tensor) -> np.ndarray:
    x = x.detach().cpu().contiguous()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def from_numpy(x: np.ndarray) -> Tensor:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.ascontiguousarray(x).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(x))


def expected_of(features: Tensor, boxes: Tensor, size: tuple[int, int], scale: float, grad: Tensor) -> list[Tensor]:
    """Output, gradient of features and places, by plain loops."""
    output, places = roi_maxima(to_numpy(features), to_numpy(boxes), size, scale)
    gradient = scattered(places, to_numpy(grad), to_numpy(boxes), tuple(features.shape))
    return [from_numpy(x) for x in (output, gradient, places)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = (x.detach().cpu().contiguous() for x in (a, b))
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def check(features: Tensor, boxes: Tensor, size: tuple[int, int], scale: float = 1.0) -> None:
    grad = torch.randn(boxes.size(0), features.size(1), *size, generator=torch.Generator().manual_seed(1))
    grad = grad.to(features.dtype)
    output, gradient, places = expected_of(features, boxes, size, scale, grad)
    got = run(features, boxes.to(features.device), size, scale, grad.to(features.device))
    assert same_bits(got[0], output)
    assert same_bits(got[1], gradient)
    assert same_bits(keeping_operator(features, boxes.to(features.device), *size, scale)[1], places)


# ------------------------------------------------------------------------------------------------ golden values


@pytest.mark.parametrize("function", [roi_pool, reference.roi_pool])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("corners", "golden"),
    [
        ((0, 0, 3, 3), [10, 12, 26, 28]),
        ((0, 0, 2, 2), [10, 11, 18, 19]),
        ((0, 0, 4, 4), [19, 21, 35, 37]),
        ((5, 5, 5, 5), [46, 46, 46, 46]),
        ((5, 5, 2, 2), [46, 46, 46, 46]),
        ((0.5, 0.5, 2.5, 2.5), [19, 20, 27, 28]),
        ((3, 3, 3, 3), [28, 28, 28, 28]),
        ((6, 6, 9, 9), [64, 0, 0, 0]),
        ((20, 20, 30, 30), [0, 0, 0, 0]),
    ],
)
def test_gives_the_golden_values(
    function: Callable[..., Tensor], corners: tuple[float, ...], golden: list[float], dtype: torch.dtype
) -> None:
    features, boxes = RAMP.to(dtype), box(*corners, dtype=dtype_of_boxes(dtype))
    assert function(features, boxes, 2, 1.0).flatten().tolist() == golden


def test_gradient_goes_to_the_maximum_of_each_bin() -> None:
    _, gradient = run(RAMP, box(0, 0, 3, 3), 2, 1.0, torch.ones(1, 1, 2, 2))
    assert gradient.flatten().nonzero().flatten().tolist() == [9, 11, 25, 27]
    assert gradient.sum() == 4
    for corners in ((5, 5, 5, 5), (5, 5, 2, 2)):  # the second is malformed
        _, gradient = run(RAMP, box(*corners), 2, 1.0, torch.ones(1, 1, 2, 2))
        assert gradient[0, 0, 5, 5] == 4
        assert gradient.sum() == 4


def test_overlapping_bins_share_a_pixel() -> None:
    spike = torch.zeros(1, 1, 8, 8)
    spike[0, 0, 2, 2] = 1
    output, gradient = run(spike, box(0, 0, 4, 4), 2, 1.0, torch.ones(1, 1, 2, 2))
    assert bool((output == 1).all())
    assert gradient[0, 0, 2, 2] == 4


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (20, 20)])
def test_the_first_of_equal_pixels_gets_the_gradient(layout: Callable[[Tensor], Tensor], size: tuple[int, int]) -> None:
    check(layout(torch.ones(1, 3, 40, 50)), box(2, 3, 45, 33), size)
    _, places = keeping_operator(layout(torch.ones(1, 3, 40, 50)), box(2, 3, 45, 33), 1, 1, 1.0)
    assert places.unique().tolist() == [3 * 50 + 2]


@pytest.mark.parametrize(("x", "value"), [(2.0, 2.0), (10.0, 4.0), (-2.0, 1.0)])
def test_halves_are_rounded_away_from_zero(x: float, value: float) -> None:
    # 0.5 -> 1, 2.5 -> 3, -0.5 -> -1
    assert roi_pool(RAMP, box(x, 0, max(x, 0), 0), 1, 0.25).item() == value


def test_a_box_that_leaves_the_map_keeps_its_grid() -> None:
    assert roi_pool(RAMP, box(-4, -4, 1, 1), 3).flatten().tolist() == [0] * 8 + [10]


def test_negative_maxima_stay_negative() -> None:
    assert roi_pool(-RAMP, box(0, 0, 3, 3), 2).flatten().tolist() == [-1, -3, -17, -19]


def test_edges_of_bins_are_those_of_float32() -> None:
    features = torch.zeros(1, 1, 4, 80)
    features[0, 0, :, 57] = 1  # a pixel beyond the box
    assert roi_pool(features, box(0, 0, 56, 3), (1, 7))[0, 0, 0, 6] == 1
    doubles = roi_pool(features.double(), box(0, 0, 56, 3, dtype=torch.float64), (1, 7))
    assert doubles[0, 0, 0, 6] == 0


def test_a_pixel_that_is_not_a_number_never_wins() -> None:
    features = RAMP.clone()
    features[0, 0, 1, 1] = math.nan
    assert roi_pool(features, box(0, 0, 1, 1), 1).item() == 9
    for dtype in DTYPES:
        nothing = torch.full((1, 1, 8, 8), math.nan, dtype=dtype)
        output, gradient = run(nothing, box(0, 0, 1, 1, dtype=dtype_of_boxes(dtype)), 1, 1.0)
        expected = -math.inf if dtype in (torch.float16, torch.bfloat16) else LOWEST
        assert output.item() == expected
        assert bool((gradient == 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_edges_of_float32(dtype: torch.dtype) -> None:
    features = torch.zeros(1, 1, 1, 2060, dtype=dtype)
    features[..., 2049] = 1
    assert roi_pool(features, box(2040, 0, 2049, 0), 1).item() == 1
    assert roi_pool(features, box(2040, 0, 2048, 0), 1).item() == 0


def test_two_boxes_add_their_gradients() -> None:
    once, twice = (run(RAMP, box(0, 0, 3, 3).repeat(n, 1), 2, 1.0, torch.ones(n, 1, 2, 2))[1] for n in (1, 2))
    assert torch.equal(twice, 2 * once)


# ------------------------------------------------------------------------------------------------ torchvision


@pytest.mark.parametrize("seed", range(40))
def test_is_torchvision_bit_for_bit(seed: int) -> None:
    torchvision = pytest.importorskip("torchvision")
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    dtype = pick(torch.float32, torch.float64)
    shape = pick(1, 2, 3), pick(1, 3, 17, 70), pick(1, 5, 17, 40), pick(1, 7, 16, 33, 70, 200)
    size, scale = (pick(1, 2, 7, 14, 56), pick(1, 3, 7, 16, 56)), pick(1.0, 0.25, 0.3, 1 / 16, -1.0)
    features = pick(random_features(*shape, dtype=dtype, seed=seed), torch.randn(shape, dtype=dtype).relu())
    boxes = random_boxes(100, features, abs(scale), seed)
    boxes[:, 1:] *= pick(1, 1, 1000)
    leaf = features.clone().requires_grad_()
    output = torchvision.ops.roi_pool(leaf, boxes, size, scale)
    grad = random_grad(output)
    (gradient,) = torch.autograd.grad(output, leaf, grad)
    for layout in (contiguous, channels_last):
        got = run(layout(features), boxes, size, scale, grad)
        assert same_bits(got[0], output)
        assert same_bits(got[1], gradient)


def test_boxes_beyond_32_bits_are_cut_off_there_and_do_not_wrap_around() -> None:
    ramp = torch.arange(1.0, 65.0).reshape(1, 1, 8, 8)
    rows = {
        (-2e9, 0.0, 2e9, 3.0): [0, 16, 0, 32],  # wider than 32 bits hold
        (0.0, 0.0, 1e30, 3.0): [16, 0, 32, 0],
        (-1e30, 0.0, 3.0, 3.0): [0, 0, 0, 0],  # float32 rounds its width, so that it ends at the edge
        (1e30, 0.0, 2e30, 3.0): [0, 0, 0, 0],
    }
    boxes = torch.tensor([(0.0, *corners) for corners in rows])
    expected = torch.tensor([*rows.values()], dtype=torch.float32).reshape(-1, 1, 2, 2)
    assert torch.equal(reference.roi_pool(ramp, boxes, 2), expected)
    assert torch.equal(roi_pool(ramp, boxes, 2), expected)


def test_lists_of_boxes_are_torchvisions() -> None:
    torchvision = pytest.importorskip("torchvision")
    features = torch.randn(3, 4, 9, 11)
    boxes = [10 * torch.rand(n, 4) for n in (2, 0, 5)]
    expected = torchvision.ops.roi_pool(features, boxes, (2, 3), 0.9)
    assert torch.equal(roi_pool(features, boxes, (2, 3), 0.9), expected)


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize(
    ("shape", "size", "scale"),
    [
        ((2, 3, 20, 30), (7, 7), 1.0),
        ((1, 70, 9, 40), (2, 3), 0.25),
        ((2, 33, 30, 9), (3, 19), 0.5),
        ((1, 2, 1, 200), (1, 1), 0.3),
        ((1, 17, 200, 1), (5, 1), 1.0),
        ((3, 1, 1, 1), (3, 2), 1.0),
    ],
)
def test_agrees_with_plain_loops(
    shape: tuple[int, ...],
    size: tuple[int, int],
    scale: float,
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> None:
    features = random_features(*shape, dtype=dtype)
    check(layout(features), random_boxes(9, features, scale), size, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_agrees_with_plain_loops(dtype: torch.dtype) -> None:
    features = random_features(2, 3, 12, 17, dtype=dtype).requires_grad_()
    boxes = random_boxes(30, features.detach(), 0.7)
    output = reference.roi_pool(features, boxes, (3, 5), 0.7)
    grad = random_grad(output)
    expected = expected_of(features, boxes, (3, 5), 0.7, grad)
    assert same_bits(output, expected[0])
    (gradient,) = torch.autograd.grad(output, features, grad)
    torch.testing.assert_close(gradient, expected[1])


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_agrees_with_plain_loops_whatever_the_arguments(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = [data.draw(st.integers(low, high)) for low, high in ((1, 3), (1, 20), (1, 24), (1, 40))]
    features = random_features(*shape, dtype=dtype, seed=data.draw(st.integers(0, 1000)))
    size = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    scale = data.draw(st.sampled_from([1.0, 0.25, 0.1, 3.0, -0.5, 0.0]))
    boxes = random_boxes(data.draw(st.integers(0, 5)), features, abs(scale) or 1.0, data.draw(st.integers(0, 1000)))
    layout = data.draw(st.sampled_from(LAYOUTS))
    check(layout(features), boxes, size, scale)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("far", [1e9, 3e9, 1e20, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coordinates_beyond_all_maps_saturate(
    far: float, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    corners = [(-far, -far, far, far), (far, far, far, far), (far, 0, -far, 3), (-far, 0, 5, 3), (-far, 2, -far, 2)]
    boxes = torch.tensor([(0, *c) for c in corners], dtype=dtype)
    features = layout(random_features(1, 3, 9, 40, dtype=dtype))
    check(features, boxes, (2, 3))
    check(features, boxes, (2, 3), 10.0)  # beyond the range of float32


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 0, 5), (2, 3, 5, 0), (2, 0, 4, 5), (2, 3, 4, 5), (0, 3, 4, 5)])
@pytest.mark.parametrize("count", [0, 4])
def test_nothing_to_do(shape: tuple[int, ...], count: int, layout: Callable[[Tensor], Tensor]) -> None:
    count = 0 if shape[0] == 0 else count
    boxes = torch.tensor([[1.0, 0, 0, 4, 3]]).repeat(count, 1)
    output, gradient = run(layout(torch.ones(shape)), boxes, (2, 3), 1.0)
    assert output.shape == (count, shape[1], 2, 3)
    assert gradient.shape == shape
    if math.prod(shape) == 0:
        assert bool((output == 0).all())
        assert reference.roi_pool(torch.ones(shape), boxes, (2, 3)).shape == output.shape
    elif count == 0:
        assert bool((gradient == 0).all())


def test_the_sum_of_the_gradients_is_that_of_the_bins_that_have_pixels() -> None:
    features = torch.randn(2, 3, 20, 30, dtype=torch.float64)
    boxes = random_boxes(20, features)
    output, gradient = run(features, boxes, (3, 4), 1.0)
    torch.testing.assert_close(gradient.sum(), (random_grad(output) * (output != 0)).sum())


# ------------------------------------------------------------------------------------------------ layouts, threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_features_and_of_the_gradient(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    features = layout(random_features(2, 18, 13, 21, dtype=dtype))
    boxes = random_boxes(6, features)
    before = features.clone()
    check(features, boxes, (3, 4))
    assert same_bits(features, before)
    for of_grad in LAYOUTS:
        grad = of_grad(random_grad(torch.empty(6, 18, 3, 4, dtype=dtype)))
        expected = expected_of(features, boxes, (3, 4), 1.0, grad)
        for f in (contiguous(features), channels_last(features)):
            assert same_bits(run(f, boxes, (3, 4), 1.0, grad)[1], expected[1])


def test_results_have_the_memory_format_of_features() -> None:
    features = torch.randn(2, 8, 9, 10)
    for layout in (contiguous, channels_last):
        output, gradient = run(layout(features), random_boxes(3, features), (4, 5), 1.0)
        assert output.stride() == layout(output).stride()
        assert gradient.stride() == layout(features).stride()


def test_boxes_may_be_a_view() -> None:
    features = torch.randn(2, 3, 9, 10)
    boxes = random_boxes(5, features)
    assert torch.equal(roi_pool(features, sliced(boxes), 3), roi_pool(features, boxes, 3))
    assert torch.equal(roi_pool(features, boxes.T.contiguous().T, 3), roi_pool(features, boxes, 3))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 40])
def test_the_number_of_threads_changes_no_bit(
    channels: int, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    features = layout(random_features(2, channels, 30, 40, dtype=dtype))
    boxes = random_boxes(200, features)
    with threads(1):
        expected = run(features, boxes, (7, 7), 1.0)
    for count in (2, 3, 16):
        with threads(count):
            for a, b in zip(run(features, boxes, (7, 7), 1.0), expected, strict=True):
                assert same_bits(a, b)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_a_sample_in_a_batch_is_the_sample_alone(layout: Callable[[Tensor], Tensor]) -> None:
    features = layout(torch.randn(3, 19, 20, 30))
    boxes = random_boxes(40, features)
    output, gradient = run(features, boxes, (3, 5), 1.0)
    grad = random_grad(output)
    for image in range(3):
        own = boxes[:, 0] == image
        alone = torch.cat([torch.zeros(int(own.sum()), 1), boxes[own, 1:]], dim=1)
        of_image = run(features[image : image + 1], alone, (3, 5), 1.0, grad[own])
        assert same_bits(of_image[0], output[own])
        assert same_bits(of_image[1], gradient[image : image + 1])


INSTRUCTION_SET = """
import sys
import torch
import gingham.ops

ops = torch.ops.gingham
results = []
for features, boxes, size, scale, grad in torch.load(sys.argv[1]):
    options = (*size, scale)
    output, gradient = ops.roi_pool(features, boxes, *options), ops.roi_pool_backward(grad, features, boxes, *options)
    kept, places = ops.roi_pool_with_places(features, boxes, *options)
    results.append((output, gradient))
    results.append((kept, ops.roi_pool_with_places_backward(grad, features, boxes, places, *options)))
torch.save(results, sys.argv[2])
"""


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    if name not in info()["instruction sets available"].split(", "):
        pytest.skip("this machine does not have it")
    cases = []
    for dtype in kernels_of(name, DTYPES):
        for shape in ((2, 5, 20, 130), (1, 37, 9, 7), (1, 3, 3, 20)):
            for size in ((3, 3), (2, 40)):
                for layout in (contiguous, channels_last):
                    features = layout(random_features(*shape, dtype=dtype))
                    grad = random_grad(torch.empty(9, shape[1], *size, dtype=dtype))
                    cases.append((features, random_boxes(9, features), size, 1.0, grad))
    torch.save(cases, tmp_path / "arguments.pt")
    finished = run_python(
        INSTRUCTION_SET, str(tmp_path / "arguments.pt"), str(tmp_path / "results.pt"), GINGHAM_CPU=name
    )
    assert finished.returncode == 0, finished.stderr
    results = torch.load(tmp_path / "results.pt")
    for arguments, *both in zip(cases, results[::2], results[1::2], strict=True):
        expected = expected_of(*arguments)
        for output, gradient in both:
            assert same_bits(output, expected[0])
            assert same_bits(gradient, expected[1])


# ------------------------------------------------------------------------------------------------ PyTorch


def distinct_features(*shape: int) -> Tensor:
    """Without ties, at which there is no derivative."""
    order = torch.randperm(math.prod(shape), generator=torch.Generator().manual_seed(0))
    return order.double().reshape(shape).requires_grad_()


# With bins of the first size the places of the maxima are kept for backward, with the second they are not.
both_ways = pytest.mark.parametrize("size", [(2, 3), (11, 10)], ids=["kept", "found anew"])


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@both_ways
def test_gradcheck_and_gradgradcheck(size: tuple[int, int], layout: Callable[[Tensor], Tensor]) -> None:
    features = layout(distinct_features(2, 3, 6, 7).detach()).requires_grad_()
    boxes = random_boxes(4, features.detach())

    def function(x: Tensor) -> Tensor:
        return roi_pool(x, boxes, size)

    assert torch.autograd.gradcheck(function, (features,))
    assert torch.autograd.gradgradcheck(function, (features,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_opcheck(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    features = layout(torch.randn(2, 3, 6, 7).to(dtype)).requires_grad_()
    boxes = random_boxes(4, features.detach())
    arguments = features, boxes, 2, 3, 0.8
    torch.library.opcheck(operator, arguments)
    torch.library.opcheck(keeping_operator, arguments)
    grad = torch.randn(4, 3, 2, 3).to(dtype).requires_grad_()
    torch.library.opcheck(backward_operator, (grad, *arguments))
    _, places = keeping_operator(features.detach(), *arguments[1:])
    torch.library.opcheck(keeping_backward_operator, (grad, features, boxes, places, *arguments[2:]))


def saved_dtypes(function: Callable[[], Any]) -> list[torch.dtype]:
    saved: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.dtype) or x, lambda x: x):
        function()
    return saved


def test_places_are_kept_where_they_take_no_more_than_the_features() -> None:
    features, boxes = torch.randn(1, 3, 8, 9, requires_grad=True), random_boxes(18, torch.empty(1, 3, 8, 9))
    inputs = [torch.float32, torch.float32]
    assert saved_dtypes(lambda: roi_pool(features, boxes, 2)) == [*inputs, torch.int32]
    assert saved_dtypes(lambda: roi_pool(features, boxes, (1, 5))) == inputs
    assert saved_dtypes(lambda: roi_pool(channels_last(features), boxes, 1)) == [*inputs, torch.int32]
    assert saved_dtypes(lambda: roi_pool(channels_last(features), boxes, (1, 2))) == inputs
    assert saved_dtypes(lambda: list(RoIPool(2).chunks(features, boxes, max_bytes=500))) == inputs * 2
    with torch.no_grad():
        assert saved_dtypes(lambda: roi_pool(features, boxes, 2)) == []
    assert saved_dtypes(lambda: roi_pool(features.detach(), boxes, 2)) == []


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_compiled_keeps_places_by_the_same_rule(backend: str) -> None:
    torch.compiler.reset()
    features, boxes = torch.randn(1, 3, 8, 9, requires_grad=True), random_boxes(18, torch.empty(1, 3, 8, 9))
    for dynamic in (False, True):
        compiled = torch.compile(roi_pool, backend=backend, fullgraph=True, dynamic=dynamic)
        assert torch.int32 in saved_dtypes(lambda c=compiled: c(features, boxes, 2))
        assert torch.int32 not in saved_dtypes(lambda c=compiled: c(features, boxes, (1, 5)))


def test_what_is_exported_keeps_no_places() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, 1, 1))

        def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
            return roi_pool(x * self.weight, boxes, 2)

    features = torch.randn(1, 3, 8, 9)
    for strict in (False, True):
        exported = torch.export.export(Model(), (features, random_boxes(4, features)), strict=strict)
        called = [str(node.target) for node in exported.graph.nodes if "gingham" in str(node.target)]
        assert called == ["gingham.roi_pool.default"]


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_a_place_outside_of_the_map_gets_nothing(layout: Callable[[Tensor], Tensor]) -> None:
    features, boxes = layout(torch.randn(1, 3, 8, 9)), random_boxes(4, torch.empty(1, 3, 8, 9))
    for wrong in (-(2**31), -2, 72, 2**31 - 1):
        places = layout(torch.full((4, 3, 2, 2), wrong, dtype=torch.int32))
        gradient = keeping_backward_operator(torch.ones(4, 3, 2, 2), features, boxes, places, 2, 2, 1.0)
        assert bool((gradient == 0).all())


def test_boxes_have_no_gradient() -> None:
    features, boxes = torch.randn(1, 2, 8, 8, requires_grad=True), box(1, 1, 5, 6).requires_grad_()
    roi_pool(features, boxes, 2).sum().backward()
    assert boxes.grad is None
    assert features.grad is not None


@pytest.mark.parametrize("device", ["cpu", cuda])
def test_autocast_keeps_features_and_casts_boxes(device: str) -> None:
    boxes = box(1, 1, 5, 6).to(device)
    with torch.autocast(device, torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            features = torch.randn(1, 2, 8, 8, device=device).to(dtype)
            for given_boxes in (boxes, boxes.bfloat16(), [boxes[:, 1:].half()]):
                output = roi_pool(features, given_boxes, 2)
                assert output.dtype == dtype
                assert torch.equal(output.float(), roi_pool(features.float(), boxes, 2))
        assert operator(torch.randn(1, 2, 8, 8, device=device), boxes.half(), 2, 2, 1.0).dtype == torch.float32


def test_vmap() -> None:
    features, boxes = torch.randn(4, 2, 3, 9, 11), torch.stack([random_boxes(5, torch.empty(2, 3, 9, 11))] * 4)
    boxes[:, :, 1:] += torch.arange(4.0)[:, None, None]
    expected = torch.stack([roi_pool(f, b, (2, 3)) for f, b in zip(features, boxes, strict=True)])
    assert torch.equal(torch.vmap(lambda f, b: roi_pool(f, b, (2, 3)))(features, boxes), expected)
    moved = torch.vmap(lambda f, b: roi_pool(f, b, (2, 3)), in_dims=(2, 1))(features.movedim(0, 2), boxes.movedim(0, 1))
    assert torch.equal(moved, expected)
    shared = torch.vmap(lambda b: roi_pool(features[0], b, (2, 3)))(boxes)
    assert torch.equal(shared, torch.stack([roi_pool(features[0], b, (2, 3)) for b in boxes]))
    same_boxes = torch.vmap(lambda f: roi_pool(f, boxes[0], (2, 3)))(features)
    assert torch.equal(same_boxes, torch.stack([roi_pool(f, boxes[0], (2, 3)) for f in features]))


def test_vmap_lets_no_box_name_an_image_of_another_sample() -> None:
    features, boxes = torch.randn(2, 1, 2, 8, 8), torch.stack([box(0, 0, 3, 3), box(0, 0, 3, 3)])
    boxes[0, 0, 0] = 1  # there is one image in each sample
    with pytest.raises(ValueError, match=r"roi_pool: boxes\[0\] must name an image"):
        torch.vmap(lambda f, b: roi_pool(f, b, 2))(features, boxes)


@both_ways
def test_func_grad_and_vmap_over_it(size: tuple[int, int]) -> None:
    features, boxes = torch.randn(3, 2, 4, 9, 11), random_boxes(5, torch.empty(2, 4, 9, 11))

    def energy(x: Tensor, b: Tensor) -> Tensor:
        return roi_pool(x, b, size).square().sum()

    def gradient(x: Tensor, b: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(energy(leaf, b), leaf)[0]

    torch.testing.assert_close(torch.func.grad(energy)(features[0], boxes), gradient(features[0], boxes))
    mapped = torch.vmap(torch.func.grad(energy), in_dims=(0, None))(features, boxes)
    torch.testing.assert_close(mapped, torch.stack([gradient(x, boxes) for x in features]))
    moved = torch.stack([boxes, boxes + torch.tensor([0, 1, 1, 1, 1])])
    mapped = torch.vmap(torch.func.grad(energy), in_dims=(None, 0))(features[0], moved)
    torch.testing.assert_close(mapped, torch.stack([gradient(features[0], b) for b in moved]))


@both_ways
def test_func_second_derivatives(size: tuple[int, int]) -> None:
    features, boxes = distinct_features(1, 2, 4, 5).detach(), box(0, 0, 3, 3, dtype=torch.float64)

    def energy(x: Tensor) -> Tensor:
        return (roi_pool(x, boxes, size) ** 3).sum()

    hessian = torch.func.jacrev(torch.func.jacrev(energy))(features).reshape(40, 40)
    expected = torch.autograd.functional.hessian(
        lambda x: (reference.roi_pool(x, boxes, size) ** 3).sum(), features
    ).reshape(40, 40)
    torch.testing.assert_close(hessian, expected)
    assert bool((hessian.diagonal() > 0).any())


def _double(features: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    return 2 * roi_pool(features + 1, boxes, size, 0.5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@both_ways
def test_compile_is_one_graph_with_dynamic_shapes(size: tuple[int, int], backend: str) -> None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if backend == "inductor" and not compiler:
        pytest.skip("inductor needs a C++ compiler on PATH")
    torch.compiler.reset()
    compiled = torch.compile(_double, backend=backend, fullgraph=True, dynamic=True)
    for batch, count, extent in ((2, 3, (4, 5)), (3, 7, (7, 6)), (5, 2, (3, 9))):
        features = torch.randn(batch, 3, *extent)
        boxes = random_boxes(count, features)
        results = []
        for function in (compiled, _double):
            leaf = features.clone().requires_grad_()
            output = function(leaf, boxes, size)
            results.append((output, *torch.autograd.grad(output, leaf, random_grad(output))))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_compile_takes_lists_of_boxes() -> None:
    torch.compiler.reset()
    features, boxes = torch.randn(2, 3, 8, 9), [box(0, 0, 3, 3)[:, 1:], box(1, 1, 9, 5)[:, 1:]]
    compiled = torch.compile(lambda x, b: roi_pool(x, b, 2), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(features, boxes), roi_pool(features, boxes, 2))


def test_compile_says_what_is_wrong_with_an_argument() -> None:
    torch.compiler.reset()
    with pytest.raises(ValueError, match=r"roi_pool: boxes must be \[N, 5\]"):
        torch.compile(roi_pool, backend="eager")(torch.randn(1, 2, 8, 8), torch.zeros(3, 4), 2)


def test_export_with_dynamic_shapes() -> None:
    dims = {name: torch.export.Dim(name, min=1, max=64) for name in ("batch", "height", "width", "count")}
    features = torch.randn(2, 3, 8, 9)
    exported = torch.export.export(
        RoIPool((2, 3), 0.5),
        (features, random_boxes(4, features)),
        dynamic_shapes={
            "features": {0: dims["batch"], 2: dims["height"], 3: dims["width"]},
            "boxes": {0: dims["count"]},
        },
    )
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch, count, size in ((2, 4, (8, 9)), (3, 9, (5, 6)), (1, 1, (11, 2))):
        features = torch.randn(batch, 3, *size)
        boxes = random_boxes(count, features)
        assert torch.equal(loaded(features, boxes), roi_pool(features, boxes, (2, 3), 0.5))


def test_meta_tensors_have_the_shapes_and_no_data() -> None:
    output = roi_pool(torch.empty(2, 3, 8, 9, device="meta"), torch.empty(7, 5, device="meta"), (2, 3))
    assert output.shape == (7, 3, 2, 3)
    assert output.is_meta


# ------------------------------------------------------------------------------------------------ modules, arrays


@pytest.mark.parametrize("per_part", [1, 3, 7, 100])
@pytest.mark.parametrize("as_list", [False, True])
def test_chunks_are_parts_of_the_whole(per_part: int, as_list: bool) -> None:
    pool = RoIPool((3, 4), 0.5)
    features = torch.randn(2, 5, 20, 30, requires_grad=True)
    given_boxes: Any = random_boxes(10, features.detach())
    if as_list:
        given_boxes = [10 * torch.rand(n, 4) for n in (4, 6)]
    whole = pool(features, given_boxes)
    bytes_of_box = 5 * 3 * 4 * 4
    parts = list(pool.chunks(features, given_boxes, max_bytes=per_part * bytes_of_box + 1))
    assert all(pooled.numel() * 4 <= per_part * bytes_of_box for _, pooled in parts)
    assert torch.equal(torch.cat([pooled for _, pooled in parts]), whole)
    assert [i for part, _ in parts for i in range(10)[part]] == list(range(10))
    weight = torch.randn_like(whole)
    (expected,) = torch.autograd.grad(whole, features, weight)
    got = sum(torch.autograd.grad(pooled, features, weight[part])[0] for part, pooled in parts)
    torch.testing.assert_close(got, expected)


def test_chunks_say_what_one_box_takes() -> None:
    with pytest.raises(ValueError, match=r"RoIPool: max_bytes must be at least 240, .* got 239"):
        RoIPool((3, 4)).chunks(torch.randn(2, 5, 20, 30), torch.zeros(2, 5), max_bytes=239)
    assert list(RoIPool(2).chunks(torch.randn(2, 5, 20, 30), torch.zeros(0, 5), max_bytes=1000)) == []


def test_the_module_is_the_function() -> None:
    features = torch.randn(2, 5, 20, 30)
    boxes = random_boxes(5, features)
    assert torch.equal(RoIPool(3, 0.5)(features, boxes), roi_pool(features, boxes, 3, 0.5))
    assert "output_size=(3, 3), spatial_scale=0.5" in repr(RoIPool(3, 0.5))
    for size in (0, (1, 2, 3), (2, -1)):
        with pytest.raises(ValueError, match="RoIPool: output_size must be"):
            RoIPool(size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_arrays_give_what_tensors_give(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    features = random_features(2, 5, 12, 17, dtype=dtype)
    boxes = random_boxes(8, features, 0.5)
    expected = to_numpy(roi_pool(features, boxes, (3, 4), 0.5))
    array = to_numpy(features)
    if layout is channels_last:
        array = np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)
    for count in (None, 1, 3):
        got = array_roi_pool(array, boxes.numpy(), (3, 4), 0.5, threads=count)
        assert got.tobytes() == expected.tobytes()
    reversed_array = np.ascontiguousarray(array[..., ::-1])[..., ::-1]
    assert array_roi_pool(reversed_array, boxes.numpy(), (3, 4), 0.5).tobytes() == expected.tobytes()


def test_arrays_are_written_to_out() -> None:
    features = torch.randn(2, 5, 12, 17)
    boxes = random_boxes(8, features)
    expected = roi_pool(features, boxes, (3, 4)).numpy()
    for out in (
        np.empty((8, 5, 3, 4), np.float32),
        np.empty((8, 5, 3, 9), np.float32)[..., :4],
        np.moveaxis(np.empty((8, 3, 4, 5), np.float32), -1, 1),
    ):
        assert array_roi_pool(features.numpy(), boxes.numpy(), (3, 4), out=out) is out
        assert (out == expected).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": [1]}, TypeError, "features must be a NumPy or CuPy array"),
        ({"features": np.ones((2, 3, 4), np.float32)}, ValueError, r"features must be \[B, C, H, W\]"),
        ({"features": np.ones((1, 3, 4, 5), np.int32)}, TypeError, "features must be float32"),
        ({"boxes": np.zeros((2, 5))}, TypeError, "boxes must be float32"),
        ({"boxes": np.zeros((2, 4), np.float32)}, ValueError, r"boxes must be \[N, 5\]"),
        ({"boxes": np.full((2, 5), 7, np.float32)}, ValueError, r"boxes\[0\] must name an image in \[0, 1\)"),
        ({"output_size": 0}, ValueError, "output_size must be positive"),
        ({"output_size": 1.5}, TypeError, "output_size must be a whole number or two"),
        ({"output_size": (1, 2, 3)}, TypeError, "output_size must be a whole number or two"),
        ({"spatial_scale": math.inf}, ValueError, "spatial_scale must be finite"),
        ({"spatial_scale": "1"}, TypeError, "spatial_scale must be a number"),
        ({"threads": 0}, ValueError, "threads must be a positive whole number"),
        ({"out": np.empty((2, 3, 2, 3), np.float32)}, ValueError, "out must have the shape"),
        ({"out": np.empty((2, 3, 2, 2))}, TypeError, "out must have the dtype of features"),
    ],
)
def test_wrong_arrays(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "features": np.ones((1, 3, 4, 5), np.float32),
        "boxes": np.zeros((2, 5), np.float32),
        "output_size": 2,
    } | changes
    with pytest.raises(error, match=f"roi_pool: {message}"):
        array_roi_pool(**arguments)


# ------------------------------------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": [1]}, TypeError, "features must be a tensor, got list"),
        ({"features": torch.ones(2, 3, 4)}, ValueError, r"features must be \[B, C, H, W\]"),
        ({"features": torch.ones(1, 3, 4, 5, dtype=torch.int32)}, TypeError, "features must be float32"),
        ({"features": torch.ones(1, 3, 4, 5).to_sparse()}, TypeError, "features must be a dense tensor"),
        ({"boxes": torch.zeros(2, 5).double()}, TypeError, "boxes must be float32 beside float32 features"),
        ({"features": torch.ones(1, 3, 4, 5).bfloat16(), "boxes": torch.zeros(2, 5).bfloat16()}, TypeError,
         "boxes must be float32 beside bfloat16 features"),
        ({"features": torch.ones(1, 3, 4, 5).double()}, TypeError, "boxes must be float64 beside float64 features"),
        ({"boxes": torch.zeros(2, 4)}, ValueError, r"boxes must be \[N, 5\] or a list of \[n, 4\]"),
        ({"boxes": torch.zeros(5)}, ValueError, r"boxes must be \[N, 5\] or a list of \[n, 4\]"),
        ({"boxes": 3}, TypeError, "boxes must be a tensor or a list of tensors, got int"),
        ({"boxes": []}, ValueError, "boxes must be a list of B tensors"),
        ({"boxes": [torch.zeros(2, 5)]}, ValueError, r"boxes\[0\] must be \[n, 4\]"),
        ({"boxes": [[0, 0, 1, 1]]}, TypeError, r"boxes\[0\] must be a tensor"),
        ({"boxes": torch.empty(2, 5, device="meta")}, ValueError, "boxes must be on the device of features"),
        ({"output_size": 0}, ValueError, "output_size must be positive"),
        ({"output_size": (2, -1)}, ValueError, "output_size must be positive"),
        ({"output_size": 2**16}, ValueError, r"output_size must have fewer than 2\^31 bins"),
        ({"output_size": 2**63}, ValueError, r"output_size must have fewer than 2\^31 bins"),
        ({"output_size": 1.5}, TypeError, "output_size must be a whole number or two"),
        ({"output_size": (1, 2, 3)}, TypeError, "output_size must be a whole number or two"),
        ({"output_size": True}, TypeError, "output_size must be a whole number or two"),
        ({"spatial_scale": "1"}, TypeError, "spatial_scale must be a number"),
        ({"spatial_scale": math.nan}, ValueError, "spatial_scale must be finite"),
        ({"spatial_scale": 10**400}, ValueError, "spatial_scale must be in the range of float64"),
    ],
)  # fmt: skip
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str, requires_grad: bool) -> None:
    arguments = {"features": torch.ones(1, 3, 4, 5), "boxes": torch.zeros(2, 5), "output_size": 2} | changes
    features = arguments["features"]
    if requires_grad and isinstance(features, Tensor) and features.is_floating_point():
        arguments["features"] = features.detach().requires_grad_()
    with pytest.raises(error, match=f"roi_pool: {message}"):
        roi_pool(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrong", [(0, 2.0), (0, -1.0), (0, 0.5), (0, math.nan), (1, math.nan), (4, math.inf)])
def test_a_box_that_cannot_be_is_named(wrong: tuple[int, float], dtype: torch.dtype) -> None:
    features, boxes = torch.randn(2, 3, 8, 8, dtype=dtype), torch.ones(5, 5, dtype=dtype)
    boxes[3, wrong[0]] = wrong[1]
    for x in (features, features.clone().requires_grad_()):
        with pytest.raises(ValueError, match=r"roi_pool: boxes\[3\] must name an image in \[0, 2\) and have finite"):
            roi_pool(x, boxes, 2)


def test_the_operator_itself_checks_its_arguments() -> None:
    features, boxes = torch.randn(1, 2, 8, 8), box(0, 0, 3, 3)
    for wrong in (
        (features[0], boxes, 2, 2, 1.0),
        (features, boxes[:, 1:], 2, 2, 1.0),
        (features, boxes.double(), 2, 2, 1.0),
        (features, boxes, 0, 2, 1.0),
        (features, boxes, 2, 2, math.inf),
        (features, boxes + 7, 2, 2, 1.0),
    ):
        with pytest.raises(RuntimeError, match="roi_pool: "):
            operator(*wrong)
    with pytest.raises(RuntimeError, match="roi_pool: grad_output must have"):
        backward_operator(torch.ones(1, 2, 2, 3), features, boxes, 2, 2, 1.0)
    for places in (torch.zeros(1, 2, 2, 3, dtype=torch.int32), torch.zeros(1, 2, 2, 2, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="roi_pool: places must be int32"):
            keeping_backward_operator(torch.ones(1, 2, 2, 2), features, boxes, places, 2, 2, 1.0)


def test_scale_and_size_may_be_any_numbers() -> None:
    features, boxes = torch.randn(1, 2, 8, 8), box(0, 0, 3, 3)
    assert torch.equal(roi_pool(features, boxes, [2, 2], 1), roi_pool(features, boxes, 2, 1.0))
    assert torch.equal(roi_pool(features, boxes, 2, np.float32(0.5)), roi_pool(features, boxes, (2, 2), 0.5))


# ------------------------------------------------------------------------------------------------ CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_agrees_with_plain_loops(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    for shape, size, scale in (
        ((2, 18, 13, 21), (3, 4), 0.5),
        ((1, 3, 9, 300), (7, 7), 0.25),
        ((2, 5, 8, 9), (2, 40), 1.0),
    ):
        features = random_features(*shape, dtype=dtype)
        boxes = random_boxes(300, features, scale)
        check(layout(features.cuda()), boxes, size, scale)


@pytest.mark.cuda
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_cuda_an_invalid_box_is_nan_and_gives_nothing(layout: Callable[[Tensor], Tensor]) -> None:
    boxes = torch.tensor([[2.0, 0, 0, 3, 3], [0, math.nan, 0, 3, 3], [0.5, 0, 0, 3, 3], [1, 0, 0, 3, 3]]).cuda()
    features = layout(torch.ones(2, 3, 8, 8).cuda())
    output, gradient = run(features, boxes, 2, 1.0, torch.ones(4, 3, 2, 2).cuda())
    assert bool(output[:3].isnan().all())
    assert bool((output[3] == 1).all())
    assert gradient.sum() == 12


@pytest.mark.cuda
def test_cuda_opcheck_and_gradcheck() -> None:
    features = distinct_features(2, 3, 6, 7).detach().cuda().requires_grad_()
    boxes = random_boxes(4, features.detach()).cuda()
    torch.library.opcheck(operator, (features, boxes, 2, 3, 0.8))
    torch.library.opcheck(keeping_operator, (features, boxes, 2, 3, 0.8))
    _, places = keeping_operator(features.detach(), boxes, 2, 3, 0.8)
    grad = torch.randn_like(places, dtype=torch.float64)
    torch.library.opcheck(keeping_backward_operator, (grad, features, boxes, places, 2, 3, 0.8))
    assert torch.autograd.gradcheck(lambda x: roi_pool(x, boxes, (2, 3)), (features,))
    assert torch.autograd.gradgradcheck(lambda x: roi_pool(x, boxes, (2, 3)), (features,))


@pytest.mark.cuda
def test_cuda_is_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision")
    features = torch.randn(2, 64, 50, 68, device="cuda")
    boxes = random_boxes(100, features, 0.25).cuda()
    assert torch.equal(roi_pool(features, boxes, 7, 0.25), torchvision.ops.roi_pool(features, boxes, 7, 0.25))
