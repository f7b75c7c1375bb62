"""The CUDA kernels without a GPU: compiled by g++ against tests/cuda_emulation and compared with the definition.

What this shows: indices, fragment layouts, masks, barriers (threads run in random order between them), accesses past
the end of global and shared memory, alignment, and the arithmetic of each type. What it cannot show: speed, and that
nvcc and the hardware agree with the emulation.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

from gingham import reference
from oracles.cuda_emulation import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    CODES,
    COMPILER,
    DTYPES,
    EPSILON,
    Arena,
    Map,
    compile_operator,
    view_of,
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = compile_operator("criss_cross_attention", tmp_path_factory.mktemp("cuda_emulation"))
    loaded.forward.restype = loaded.backward.restype = ctypes.c_char_p
    loaded.forward_workspace.restype = loaded.backward_workspace.restype = ctypes.c_size_t
    return loaded


# ------------------------------------------------------------------------------------------------ the definition

Maps = dict[str, np.ndarray]  # of shape [B, C, T, H, W]
Axes = tuple[int, ...] | dict[str, tuple[int, ...]]  # as they lie in memory; of all maps, or of each


def definition(maps: Maps, scale: float) -> tuple[Maps, Maps]:
    """Results in float64 and, of each, the sum of the absolute values of its terms, by which rounding is measured."""
    batch, _, *size = maps["query"].shape
    q, k, v, g = (
        maps[n].astype(np.float64).reshape(batch, -1, np.prod(size)) for n in ("query", "key", "value", "grad")
    )
    places = np.stack(np.unravel_index(np.arange(np.prod(size)), size))
    cross = (places[:, :, None] != places[:, None, :]).sum(axis=0) <= 1
    logits = np.where(cross, scale * np.einsum("bcu,bcp->bup", q, k), -np.inf)
    largest = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - largest)
    total = weights.sum(axis=-1, keepdims=True)
    lse, weights = largest + np.log(total), weights / total
    output = np.einsum("bup,bcp->bcu", weights, v)
    delta = (g * output).sum(axis=1)[:, :, None]
    slopes = weights * (np.einsum("bcu,bcp->bup", g, v) - delta) * scale
    # Rounding of the stored output enters delta, and with it every slope.
    rounded = weights * (
        np.einsum("bcu,bcp->bup", abs(g), abs(v))
        + (abs(g) * np.einsum("bup,bcp->bcu", weights, abs(v))).sum(1)[:, :, None]
    )
    results = {
        "output": output,
        "lse": lse[:, None, :, 0],
        "grad_query": np.einsum("bup,bcp->bcu", slopes, k),
        "grad_key": np.einsum("bup,bcu->bcp", slopes, q),
        "grad_value": np.einsum("bup,bcu->bcp", weights, g),
    }
    sizes = {
        "output": np.einsum("bup,bcp->bcu", weights, abs(v)),
        "lse": 1 + np.abs(lse[:, None, :, 0]),
        "grad_query": np.einsum("bup,bcp->bcu", rounded, abs(k)) * abs(scale),
        "grad_key": np.einsum("bup,bcu->bcp", rounded, abs(q)) * abs(scale),
        "grad_value": np.einsum("bup,bcu->bcp", weights, abs(g)),
    }
    shaped = lambda x: x.reshape(batch, -1, *size)  # noqa: E731
    return {n: shaped(x) for n, x in results.items()}, {n: shaped(x) for n, x in sizes.items()}


# ------------------------------------------------------------------------------------------------ running the kernels


def run(
    library: ctypes.CDLL,
    maps: Maps,
    dtype: str,
    scale: float,
    axes: Axes,
    *,
    tf32: bool = False,
    extra: int = 0,
    expanded: tuple[str, ...] = (),
    seed: int = 0,
) -> Maps:
    batch, key_channels, *size = maps["query"].shape
    value_channels = maps["value"].shape[1]
    shape = (ctypes.c_int64 * 6)(batch, key_channels, value_channels, *size)
    arena = Arena(library)
    try:
        held = {}
        for name, like in (
            ("query", "query"),
            ("key", "query"),
            ("value", "value"),
            ("grad", "value"),
            ("output", "value"),
            ("grad_query", "query"),
            ("grad_key", "query"),
            ("grad_value", "value"),
        ):
            memory_axes = axes[name] if isinstance(axes, dict) else axes
            held[name] = arena.array(maps[like].shape, DTYPES[dtype], memory_axes, extra)
            if name in expanded:  # of one channel; the others' memory is not theirs
                held[name][:, :1] = maps[name][:, :1]
                held[name] = np.broadcast_to(held[name][:, :1], held[name].shape)
            elif name in maps:
                held[name][...] = maps[name]
        lse = arena.array((batch, 1, *size), np.float64, CHANNELS_FIRST)
        views = [
            view_of(held[n])
            for n in ("query", "key", "value", "output", "grad", "grad_query", "grad_key", "grad_value")
        ]
        for kernels, workspace_size, arguments in (
            (library.forward, library.forward_workspace, (Map * 4)(*views[:4])),
            (library.backward, library.backward_workspace, (Map * 8)(*views)),
        ):
            workspace = arena.array((workspace_size(shape, CODES[dtype], arguments),), np.uint8, (0,))
            error = kernels(
                shape,
                CODES[dtype],
                ctypes.c_double(scale),
                tf32,
                arguments,
                ctypes.c_void_p(lse.ctypes.data),
                ctypes.c_void_p(workspace.ctypes.data),
                seed,
            )
            assert not error, error
        for name in ("query", "key", "value", "grad"):
            np.testing.assert_array_equal(held[name].astype(np.float64), maps[name].astype(np.float64))
        return {
            n: x.astype(np.float64)
            for n, x in (
                {"lse": lse} | {n: held[n] for n in ("output", "grad_query", "grad_key", "grad_value")}
            ).items()
        }
    finally:
        arena.free()


def random_maps(
    dtype: str, batch: int, key_channels: int, value_channels: int, size: tuple[int, ...], seed: int = 0
) -> Maps:
    generator = np.random.default_rng(seed)
    channels = {"query": key_channels, "key": key_channels, "value": value_channels, "grad": value_channels}
    size = (1,) * (3 - len(size)) + size
    return {n: generator.standard_normal((batch, c, *size)).astype(DTYPES[dtype]) for n, c in channels.items()}


def check(
    library: ctypes.CDLL,
    maps: Maps,
    dtype: str,
    axes: Axes,
    *,
    scale: float = 0.6,
    tf32: bool = False,
    extra: int = 0,
    expanded: tuple[str, ...] = (),
    seed: int = 0,
) -> Maps:
    got = run(library, maps, dtype, scale, axes, tf32=tf32, extra=extra, expanded=expanded, seed=seed)
    expected, sizes = definition(maps, scale)
    largest_query = np.abs(maps["query"].astype(np.float64)).max()
    logits = 1 + np.abs(expected["lse"]).max() + abs(scale) * largest_query**2 * maps["query"].shape[1]
    for name, exact in expected.items():
        sums = EPSILON["float64" if dtype == "float64" else "tf32" if tf32 else "float32"]
        storage = 0 if name == "lse" else EPSILON["tf32" if tf32 else dtype]
        bound = (4 * storage + 4 * sums * logits) * sizes[name]
        if dtype == "float16":
            bound = bound + 2.0**-23  # half of the smallest number, for each of four passes
        error = np.abs(got[name] - exact)
        assert (error <= bound).all(), (
            f"{name}: {np.nanmax(error / bound):.3g} times the bound, {np.isnan(got[name]).sum()} not finite"
        )
    return got


# ------------------------------------------------------------------------------------------------ tests

LAYOUTS = pytest.mark.parametrize("axes", [CHANNELS_FIRST, CHANNELS_LAST], ids=["channels_first", "channels_last"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", list(DTYPES))
SIZES = [(5, 6), (1, 7), (7, 1), (1, 1), (17, 3), (3, 18), (3, 4, 5), (2, 1, 3), (1, 3, 2), (18, 2, 1)]


@LAYOUTS
@EVERY_DTYPE
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernels_agree_with_the_definition(
    emulation: ctypes.CDLL, size: tuple[int, ...], dtype: str, axes: tuple[int, ...]
) -> None:
    check(emulation, random_maps(dtype, 2, 5, 7, size), dtype, axes, seed=sum(size))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_emulated_conversions_are_those_of_numpy(emulation: ctypes.CDLL, dtype: str) -> None:
    # A map of one position is its own output, whatever it is; float16 by way of weights scaled by 2^15.
    numbers = np.array([0.0, -0.0, 1.0, -2.5, 6e-8, 1e-5, 6.1e-5, 3.3, 65504.0, 1023.5, 0.1], dtype=DTYPES[dtype])
    maps = random_maps(dtype, 1, 2, len(numbers), (1, 1))
    maps["value"][0, :, 0, 0, 0] = numbers
    got = run(emulation, maps, dtype, 1.0, CHANNELS_FIRST)
    np.testing.assert_array_equal(got["output"].ravel(), numbers.astype(np.float64))


@LAYOUTS
@pytest.mark.parametrize("size", [(4, 5), (17, 18), (3, 4, 5)], ids=str)
def test_tf32_products_agree_as_far_as_tf32_goes(
    emulation: ctypes.CDLL, size: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    maps = random_maps("float32", 1, 9, 10, size)
    fast = check(emulation, maps, "float32", axes, tf32=True)
    exact = check(emulation, maps, "float32", axes)
    assert not np.array_equal(fast["output"], exact["output"])


@LAYOUTS
@EVERY_DTYPE
@pytest.mark.parametrize(("key_channels", "value_channels"), [(1, 1), (8, 16), (17, 24), (65, 3), (3, 130)])
def test_any_number_of_channels(
    emulation: ctypes.CDLL, key_channels: int, value_channels: int, dtype: str, axes: tuple[int, ...]
) -> None:
    # 8, 16 and 24 take the path of 16-byte vectors in channels-last maps, 130 several chunks of channels.
    check(emulation, random_maps(dtype, 1, key_channels, value_channels, (4, 3)), dtype, axes, scale=1 / key_channels)


@LAYOUTS
@EVERY_DTYPE
@pytest.mark.parametrize("size", [(131, 2), (2, 131), (131, 1, 2), (97, 3)], ids=str)
def test_lines_longer_than_a_warp_holds(
    emulation: ctypes.CDLL, size: tuple[int, ...], dtype: str, axes: tuple[int, ...]
) -> None:
    check(emulation, random_maps(dtype, 1, 3, 9, size), dtype, axes)


@LAYOUTS
@EVERY_DTYPE
def test_more_neighbouring_lines_than_a_block_takes(emulation: ctypes.CDLL, dtype: str, axes: tuple[int, ...]) -> None:
    check(emulation, random_maps(dtype, 1, 2, 3, (2, 2, 37)), dtype, axes)
    check(emulation, random_maps(dtype, 1, 2, 3, (37, 2)), dtype, axes)


def test_the_block_with_most_shared_memory(emulation: ctypes.CDLL) -> None:
    check(emulation, random_maps("bfloat16", 1, 1, 1, (113, 16)), "bfloat16", CHANNELS_FIRST)


@pytest.mark.parametrize("extra", [1, 8])
@LAYOUTS
@EVERY_DTYPE
def test_maps_that_are_slices(emulation: ctypes.CDLL, dtype: str, axes: tuple[int, ...], extra: int) -> None:
    check(emulation, random_maps(dtype, 2, 8, 16, (5, 6)), dtype, axes, extra=extra)


MAPS = ("query", "key", "value", "output", "grad", "grad_query", "grad_key", "grad_value")
CHANNELS_OUTERMOST = (1, 2, 3, 4, 0)  # neighbours of a channel are images, so that channels are apart in 1 x 1 maps too


@EVERY_DTYPE
@pytest.mark.parametrize("size", [(7, 1), (1, 7), (1, 1), (3, 4, 1), (3, 1, 4), (3, 1, 1)], ids=str)
def test_each_map_may_have_a_layout_of_its_own(emulation: ctypes.CDLL, size: tuple[int, ...], dtype: str) -> None:
    # With adjacent channels and a single column, a map passes for either layout: the other maps must be asked too.
    maps = random_maps(dtype, 2, 8, 16, size)
    for odd in MAPS:
        for layout in (CHANNELS_FIRST, CHANNELS_OUTERMOST):
            check(emulation, maps, dtype, dict.fromkeys(MAPS, CHANNELS_LAST) | {odd: layout})
    check(emulation, maps, dtype, dict.fromkeys(MAPS, CHANNELS_FIRST) | {"value": CHANNELS_LAST})


@pytest.mark.parametrize("name", ["query", "key"])
@pytest.mark.parametrize("size", [(7, 1), (1, 1), (3, 4, 1)], ids=str)
def test_maps_may_be_expanded_beside_values_with_adjacent_channels(
    emulation: ctypes.CDLL, size: tuple[int, ...], name: str
) -> None:
    maps = random_maps("float32", 2, 8, 16, size)
    maps[name][...] = maps[name][:, :1]
    check(emulation, maps, "float32", CHANNELS_LAST, expanded=(name,))


@LAYOUTS
@EVERY_DTYPE
def test_results_do_not_depend_on_the_order_of_threads_or_on_the_batch(
    emulation: ctypes.CDLL, dtype: str, axes: tuple[int, ...]
) -> None:
    maps = random_maps(dtype, 3, 5, 7, (9, 10))
    first = run(emulation, maps, dtype, 0.6, axes, seed=1)
    again = run(emulation, maps, dtype, 0.6, axes, seed=2)
    alone = run(emulation, {n: x[1:2] for n, x in maps.items()}, dtype, 0.6, axes, seed=3)
    for name, result in first.items():
        np.testing.assert_array_equal(result, again[name])
        np.testing.assert_array_equal(result[1:2], alone[name])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("scale", [1.0, 0.0, -1.0])
def test_large_logits_and_scales_of_any_sign(emulation: ctypes.CDLL, dtype: str, scale: float) -> None:
    maps = random_maps(dtype, 1, 64, 5, (4, 5))
    for name in ("query", "key"):
        maps[name] = (60 * np.sign(maps[name].astype(np.float32))).astype(DTYPES[dtype])
    check(emulation, maps, dtype, CHANNELS_FIRST, scale=scale)


@EVERY_DTYPE
@pytest.mark.parametrize("level", [60, 1000])
@pytest.mark.parametrize("size", [(5, 6), (2, 131)], ids=str)
def test_equal_logits_of_any_size_give_the_mean(
    emulation: ctypes.CDLL, size: tuple[int, ...], level: int, dtype: str
) -> None:
    # 64 * 1000^2 needs 26 bits: beside it float32 would lose the logarithm of the sum, and with it the gradients.
    maps = random_maps(dtype, 1, 64, 5, size)
    maps["query"][...] = maps["key"][...] = level
    got = run(emulation, maps, dtype, 1.0, CHANNELS_FIRST)
    expected, sizes = definition(maps, 1.0)
    sums = 8 * EPSILON["float64" if dtype == "float64" else "float32"] + EPSILON["float64"] * 64 * level**2
    for name, exact in expected.items():
        bound = (4 * (0 if name == "lse" else EPSILON[dtype]) + 4 * sums) * sizes[name]
        assert (np.abs(got[name] - exact) <= bound).all(), name


# Keys of minus infinity: along a row, in all that two passes of three see, in a row's first segment.
INFINITE: dict[str, tuple[tuple[int, ...], Any]] = {
    "row": ((5, 6), np.s_[:, :, :, 2]),
    "plane": ((3, 4, 5), np.s_[:, :, 1]),
    "part of a row": ((2, 131), np.s_[..., 0, :70]),
    "all": ((3, 4), np.s_[:]),
}


def by_torch(maps: Maps, scale: float) -> Maps:
    """Output and gradients by the reference, in float64 whatever the dtype."""
    query, key, value, grad = (
        torch.from_numpy(maps[n].astype(np.float64)).requires_grad_(n != "grad")
        for n in ("query", "key", "value", "grad")
    )
    output = reference.criss_cross_attention(query, key, value, scale=scale)
    gradients = torch.autograd.grad(output, (query, key, value), grad)
    names = ("output", "grad_query", "grad_key", "grad_value")
    return {n: x.detach().numpy() for n, x in zip(names, (output, *gradients), strict=True)}


@EVERY_DTYPE
@pytest.mark.parametrize("where", INFINITE)
def test_infinite_keys_take_no_weight(emulation: ctypes.CDLL, where: str, dtype: str) -> None:
    size, place = INFINITE[where]
    maps = random_maps(dtype, 1, 4, 5, size)
    maps["query"] = np.abs(maps["query"])
    maps["key"][place] = -np.inf
    got, expected = run(emulation, maps, dtype, 1.0, CHANNELS_FIRST), by_torch(maps, 1.0)
    assert np.isnan(got["output"]).all() == (where == "all")
    for name in expected:
        tolerance = 64 * EPSILON[dtype]
        np.testing.assert_allclose(got[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


@EVERY_DTYPE
@pytest.mark.parametrize("name", ["query", "key", "value", "grad"])
def test_what_is_not_a_number_spreads_as_in_the_reference(emulation: ctypes.CDLL, name: str, dtype: str) -> None:
    maps = random_maps(dtype, 1, 4, 5, (3, 4, 5))
    maps[name][0, 1, 1, 2, 3] = np.nan
    got, expected = run(emulation, maps, dtype, 1.0, CHANNELS_FIRST), by_torch(maps, 1.0)
    for result in expected:
        np.testing.assert_array_equal(np.isnan(got[result]), np.isnan(expected[result]), err_msg=result)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_overflowing_logits_take_no_weight(emulation: ctypes.CDLL, dtype: str) -> None:
    maps = random_maps(dtype, 1, 4, 5, (5, 6))
    maps["query"][...] = 1e20
    maps["key"][...] = np.abs(maps["key"]) * 1e-20
    maps["key"][:, :, :, 2] = -1e20
    got, expected = run(emulation, maps, dtype, 1.0, CHANNELS_FIRST), by_torch(maps, 1.0)
    for name in expected:
        largest = np.abs(expected[name]).max()
        np.testing.assert_allclose(got[name], expected[name], atol=64 * EPSILON[dtype] * largest, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_weights_keep_their_digits(emulation: ctypes.CDLL, dtype: str) -> None:
    # One position takes nearly everything; float16 holds nothing below 6e-8, which the weights of the others are.
    maps = random_maps(dtype, 1, 1, 3, (1, 24))
    maps["query"][...], maps["key"][...] = 4.0, 0.0
    maps["key"][..., 0] = 4.0
    maps["value"][..., 0] = 0.0
    maps["value"][..., 1:] = 1000.0
    got = run(emulation, maps, dtype, 1.0, CHANNELS_FIRST)
    expected, _ = definition(maps, 1.0)
    np.testing.assert_allclose(got["output"], expected["output"], rtol=4 * EPSILON[dtype])


@LAYOUTS
@pytest.mark.parametrize("factor", [2.0**-16, 2.0**9])
def test_gradients_of_any_size_keep_their_digits(emulation: ctypes.CDLL, factor: float, axes: tuple[int, ...]) -> None:
    maps = random_maps("float16", 1, 8, 7, (20, 21))
    maps["key"] *= 64
    maps["grad"] = np.round(maps["grad"] * 32) / 32  # so that the factor does not round it
    ordinary = run(emulation, maps, "float16", 1 / 64, axes)
    maps["grad"] *= np.float16(factor)
    got = run(emulation, maps, "float16", 1 / 64, axes)
    for name in ("grad_query", "grad_key", "grad_value"):
        smallest = 2.0**-24 / min(factor, 1)
        np.testing.assert_allclose(got[name] / factor, ordinary[name], rtol=EPSILON["float16"], atol=smallest)


@EVERY_DTYPE
def test_maps_without_elements(emulation: ctypes.CDLL, dtype: str) -> None:
    for batch, channels, size in [(0, 3, (2, 2)), (2, 3, (0, 4)), (2, 3, (4, 0)), (2, 3, (0, 2, 2))]:
        run(emulation, random_maps(dtype, batch, 2, channels, size), dtype, 1.0, CHANNELS_FIRST)
    got = run(emulation, random_maps(dtype, 1, 2, 0, (3, 4)), dtype, 1.0, CHANNELS_FIRST)
    assert not got["grad_query"].any()
    assert not got["grad_key"].any()
