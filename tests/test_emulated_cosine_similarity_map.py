"""The CUDA kernels of cosine_similarity_map without a GPU (see oracles/cuda_emulation.py)."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from oracles.cosines import cosines_and_gradients
from oracles.cuda_emulation import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    CODES,
    COMPILER,
    DTYPES,
    Arena,
    Map,
    compile_operator,
    view_of,
)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

Maps = dict[str, np.ndarray]  # features and grad [B, C or P, 1, H, W], prototypes [B, P, C]
NAMES = ("output", "grad_features", "grad_prototypes")


class Arrays(ctypes.Structure):
    _fields_ = (
        ("features", Map),
        ("output", Map),
        ("grad_output", Map),
        ("grad_features", Map),
        ("prototypes", ctypes.c_void_p),
        ("grad_prototypes", ctypes.c_void_p),
        ("prototype_stride", ctypes.c_int64),
        ("feature_norms", ctypes.c_void_p),
        ("prototype_norms", ctypes.c_void_p),
    )


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = compile_operator("cosine_similarity_map", tmp_path_factory.mktemp("cuda_emulation"))
    loaded.forward.restype = loaded.backward.restype = ctypes.c_char_p
    loaded.backward_workspace.restype = ctypes.c_size_t
    return loaded


def random_maps(dtype: str, batch: int, channels: int, count: int, size: tuple[int, int], seed: int = 0) -> Maps:
    generator = np.random.default_rng(seed)
    shapes = {
        "features": (batch, channels, 1, *size),
        "prototypes": (batch, count, channels),
        "grad": (batch, count, 1, *size),
    }
    return {name: generator.standard_normal(shape).astype(DTYPES[dtype]) for name, shape in shapes.items()}


def run(
    library: ctypes.CDLL,
    maps: Maps,
    dtype: str,
    axes: tuple[int, ...],
    *,
    eps: float = 1e-8,
    torch_compat: bool = False,
    extra: int = 0,
    seed: int = 0,
) -> Maps:
    """Results in float64, and the norms."""
    batch, channels, _, *size = maps["features"].shape
    count = maps["prototypes"].shape[1]
    shape = (ctypes.c_int64 * 5)(batch, channels, count, *size)
    sums = np.float64 if dtype == "float64" else np.float32
    arena = Arena(library)
    try:
        held = {}
        for name, like in (
            ("features", "features"),
            ("grad_features", "features"),
            ("grad", "grad"),
            ("output", "grad"),
        ):
            held[name] = arena.array(maps[like].shape, DTYPES[dtype], axes, extra)
        held["prototypes"] = arena.array(maps["prototypes"].shape, DTYPES[dtype], (0, 1, 2), extra)
        held["grad_prototypes"] = arena.array(maps["prototypes"].shape, DTYPES[dtype], (0, 1, 2))
        for name in ("features", "grad", "prototypes"):
            held[name][...] = maps[name]
        norms = arena.array((batch, *size), sums, (0, 1, 2)), arena.array((batch, count), sums, (0, 1))
        arrays = Arrays(
            *(view_of(held[name]) for name in ("features", "output", "grad", "grad_features")),
            held["prototypes"].ctypes.data,
            held["grad_prototypes"].ctypes.data,
            channels + extra,
            *(x.ctypes.data for x in norms),
        )
        options = CODES[dtype], ctypes.c_double(eps), torch_compat, ctypes.byref(arrays)
        error = library.forward(shape, *options, seed)
        assert not error, error
        workspace = library.backward_workspace(shape, CODES[dtype], ctypes.byref(arrays))
        memory = arena.array((workspace // np.dtype(sums).itemsize,), sums, (0,))
        error = library.backward(shape, *options, ctypes.c_void_p(memory.ctypes.data), seed)
        assert not error, error
        for name in ("features", "grad", "prototypes"):
            np.testing.assert_array_equal(held[name].astype(np.float64), maps[name].astype(np.float64))
        results = {name: held[name].astype(np.float64) for name in NAMES}
        return results | {"feature_norms": norms[0].copy(), "prototype_norms": norms[1].copy()}
    finally:
        arena.free()


def check(
    library: ctypes.CDLL,
    maps: Maps,
    dtype: str,
    axes: tuple[int, ...],
    *,
    torch_compat: bool = False,
    extra: int = 0,
    seed: int = 0,
) -> Maps:
    got = run(library, maps, dtype, axes, torch_compat=torch_compat, extra=extra, seed=seed)
    features, prototypes, grad = (
        torch.from_numpy(maps[name].astype(np.float64)) for name in ("features", "prototypes", "grad")
    )
    expected = cosines_and_gradients(features[:, :, 0], prototypes, grad[:, :, 0], torch_compat=torch_compat)
    for name, quantity in zip(NAMES, expected, strict=True):
        result = torch.from_numpy(got[name]).reshape(quantity.exact.shape)
        error, bound = (result - quantity.exact).abs(), quantity.bound(getattr(torch, dtype))
        assert bool((error <= bound).all()), f"{name}: {float((error / bound).max())} times the bound"
    for name, vectors, axis in (("feature_norms", features[:, :, 0], 1), ("prototype_norms", prototypes, 2)):
        np.testing.assert_allclose(got[name], vectors.square().sum(dim=axis).sqrt().numpy(), rtol=1e-5)
    return got


LAYOUTS = pytest.mark.parametrize("axes", [CHANNELS_FIRST, CHANNELS_LAST], ids=["channels_first", "channels_last"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", list(DTYPES))


@LAYOUTS
@EVERY_DTYPE
@pytest.mark.parametrize("size", [(5, 7), (1, 9), (9, 1), (1, 1), (11, 13)], ids=str)
@pytest.mark.parametrize("count", [1, 3, 8, 9])
def test_kernels_agree_with_the_written_out_form(
    emulation: ctypes.CDLL, count: int, size: tuple[int, int], dtype: str, axes: tuple[int, ...]
) -> None:
    check(emulation, random_maps(dtype, 2, 5, count, size), dtype, axes, seed=sum(size))


@LAYOUTS
@EVERY_DTYPE
@pytest.mark.parametrize(("channels", "count"), [(1, 1), (8, 4), (16, 5), (17, 2), (133, 1), (66, 70), (48, 11)])
def test_any_number_of_channels_and_prototypes(
    emulation: ctypes.CDLL, channels: int, count: int, dtype: str, axes: tuple[int, ...]
) -> None:
    # Multiples of 16 bytes are moved 16 bytes at a time in channels-last maps; 66 and 70 take more than a tile.
    check(emulation, random_maps(dtype, 1, channels, count, (3, 4)), dtype, axes)


@LAYOUTS
@pytest.mark.parametrize("count", [2, 9])
def test_more_pixels_than_a_block_or_a_part_takes(emulation: ctypes.CDLL, count: int, axes: tuple[int, ...]) -> None:
    check(emulation, random_maps("float32", 1, 3, count, (19, 17)), "float32", axes)


@pytest.mark.parametrize("extra", [1, 8])
@pytest.mark.parametrize("count", [1, 9])
@LAYOUTS
@EVERY_DTYPE
def test_maps_that_are_slices(
    emulation: ctypes.CDLL, dtype: str, axes: tuple[int, ...], count: int, extra: int
) -> None:
    check(emulation, random_maps(dtype, 2, 8, count, (5, 6)), dtype, axes, extra=extra)


@LAYOUTS
@pytest.mark.parametrize("torch_compat", [False, True])
@pytest.mark.parametrize("count", [2, 9])
def test_norms_of_zero(emulation: ctypes.CDLL, count: int, torch_compat: bool, axes: tuple[int, ...]) -> None:
    maps = random_maps("float32", 1, 5, count, (3, 4))
    maps["features"][0, :, 0, 1, 2] = 0
    maps["prototypes"][0, 1] = 0
    got = check(emulation, maps, "float32", axes, torch_compat=torch_compat)
    assert not got["output"][0, :, 0, 1, 2].any()
    assert not got["output"][0, 1].any()
    assert bool(got["grad_features"][0, :, 0, 1, 2].any()) == torch_compat
    assert bool(got["grad_prototypes"][0, 1].any()) == torch_compat


@LAYOUTS
@pytest.mark.parametrize("count", [1, 9])
@EVERY_DTYPE
def test_results_do_not_depend_on_the_order_of_threads_or_on_the_batch(
    emulation: ctypes.CDLL, dtype: str, count: int, axes: tuple[int, ...]
) -> None:
    maps = random_maps(dtype, 3, 5, count, (9, 10))
    first, again = (run(emulation, maps, dtype, axes, seed=seed) for seed in (1, 2))
    alone = run(emulation, {name: x[1:2] for name, x in maps.items()}, dtype, axes, seed=3)
    for name, result in first.items():
        np.testing.assert_array_equal(result, again[name])
        np.testing.assert_array_equal(result[1:2], alone[name])


@EVERY_DTYPE
def test_nothing_to_do(emulation: ctypes.CDLL, dtype: str) -> None:
    for batch, count, size in [(0, 2, (3, 4)), (1, 2, (0, 4)), (1, 9, (4, 0)), (1, 0, (3, 4))]:
        got = run(emulation, random_maps(dtype, batch, 3, count, size), dtype, CHANNELS_FIRST)
        assert not got["grad_features"].any()
        assert not got["grad_prototypes"].any()
