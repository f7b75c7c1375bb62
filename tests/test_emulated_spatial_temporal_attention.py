"""The CUDA kernels of spatial-temporal attention without a GPU, against the definition: see oracles/cuda_emulation."""

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

ENERGIES = ("sq", "l2", "agrl")  # gingham::SpatialEnergy
RESULTS = ("pooled", "scores", "map")
ARRAYS = (
    *("sums", "shares", "map", "totals", "pooled", "scores", "chosen", "part_totals"),
    *("grad_pooled", "grad_scores", "grad_map", "grad_sums", "grad_shares"),
)
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = compile_operator("spatial_temporal_attention", tmp_path_factory.mktemp("cuda_emulation"))
    loaded.forward.restype = loaded.backward.restype = ctypes.c_char_p
    loaded.forward_workspace.restype = loaded.backward_workspace.restype = ctypes.c_size_t
    return loaded


def random_inputs(dtype: str, size: tuple[int, int, int, int, int], parts: int, seed: int = 0) -> Arrays:
    """Features [B, C, T, H, W] and the gradients of the results."""
    batch, channels, frames, rows, columns = size
    generator = np.random.default_rng(seed)
    sums = np.float64 if dtype == "float64" else np.float32
    draw = generator.standard_normal
    return {
        "features": np.abs(draw(size)).astype(DTYPES[dtype]),
        "grad_pooled": draw((batch, 2 * channels)).astype(DTYPES[dtype]),
        "grad_scores": draw((batch, frames, parts)).astype(sums),
        "grad_map": draw((batch, frames, rows, columns)).astype(sums),
    }


def definition(inputs: Arrays, parts: int, energy: str, eps: float, detach: bool, given: tuple[str, ...]) -> Arrays:
    """Results and the gradient of the features, in float64."""
    features = torch.from_numpy(inputs["features"].astype(np.float64)).requires_grad_()
    pooled, scores, frames, attention = reference.spatial_temporal_attention(
        features.transpose(1, 2), parts, energy=energy, eps=eps, detach_attention=detach, return_map=True
    )
    results = dict(zip(RESULTS, (pooled, scores, attention), strict=True))
    loss = torch.zeros((), dtype=torch.float64)
    for name in given:
        loss = loss + (results[name] * torch.from_numpy(inputs[f"grad_{name}"].astype(np.float64))).sum()
    (gradient,) = torch.autograd.grad(loss, features)
    found = {name: x.detach().numpy() for name, x in results.items()}
    return found | {"chosen": frames.numpy(), "grad_features": gradient.numpy()}


def run(
    library: ctypes.CDLL,
    inputs: Arrays,
    parts: int,
    dtype: str,
    axes: tuple[int, ...],
    *,
    energy: str = "sq",
    eps: float = 1e-12,
    detach: bool = False,
    given: tuple[str, ...] = RESULTS,
    extra: int = 0,
    seed: int = 0,
) -> Arrays:
    batch, channels, frames, rows, columns = inputs["features"].shape
    sums = np.float64 if dtype == "float64" else np.float32
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "sums": ((batch, frames, parts, channels), sums),
        "shares": ((batch, frames, parts), sums),
        "totals": ((batch, frames), sums),
        "map": ((batch, frames, rows, columns), sums),
        "part_totals": ((batch, parts), sums),
        "pooled": ((batch, 2 * channels), DTYPES[dtype]),
        "scores": ((batch, frames, parts), sums),
        "chosen": ((batch, parts), np.float64),  # of 8 bytes, as the integers that it will hold
        "grad_sums": ((batch, frames, parts, channels), sums),
        "grad_shares": ((batch, frames, parts), sums),
    } | {f"grad_{name}": (inputs[f"grad_{name}"].shape, inputs[f"grad_{name}"].dtype) for name in RESULTS}
    arena = Arena(library)

    def workspace(size: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(arena.array((size // np.dtype(sums).itemsize,), sums, (0,)).ctypes.data)

    try:
        held = {name: arena.array(shape, kind, tuple(range(len(shape)))) for name, (shape, kind) in shapes.items()}
        for name in ("features", "grad_features"):
            held[name] = arena.array(inputs["features"].shape, DTYPES[dtype], axes, extra)
        for name, x in inputs.items():
            held[name][...] = x if name.removeprefix("grad_") in ("features", *given) else 0
        pointers = {name: held[name].ctypes.data for name in ARRAYS}
        if "map" not in given:
            pointers["grad_map"] = None
        arrays = (ctypes.c_void_p * len(ARRAYS))(*pointers.values())
        call = (
            (ctypes.c_int64 * 6)(batch, frames, channels, rows, columns, parts),
            CODES[dtype],
            ENERGIES.index(energy),
            ctypes.c_double(eps),
        )
        features: Map = view_of(held["features"])
        maps = (ctypes.byref(features), ctypes.byref(view_of(held["grad_features"])))
        size = library.forward_workspace(*call, maps[0], arrays)
        error = library.forward(*call, maps[0], arrays, workspace(size), seed)
        assert not error, error
        size = library.backward_workspace(*call, *maps, arrays)
        error = library.backward(*call, *maps, arrays, workspace(size), detach, seed)
        assert not error, error
        np.testing.assert_array_equal(held["features"].astype(np.float64), inputs["features"].astype(np.float64))
        found = {name: held[name].astype(np.float64) for name in (*RESULTS, "grad_features")}
        return found | {"chosen": held["chosen"].view(np.int64).copy()}
    finally:
        arena.free()


def check(
    library: ctypes.CDLL,
    inputs: Arrays,
    parts: int,
    dtype: str,
    axes: tuple[int, ...],
    *,
    energy: str = "sq",
    eps: float = 1e-12,
    detach: bool = False,
    given: tuple[str, ...] = RESULTS,
    extra: int = 0,
    seed: int = 0,
) -> Arrays:
    got = run(
        library,
        inputs,
        parts,
        dtype,
        axes,
        energy=energy,
        eps=eps,
        detach=detach,
        given=given,
        extra=extra,
        seed=seed,
    )
    expected = definition(inputs, parts, energy, eps, detach, given)
    np.testing.assert_array_equal(got["chosen"], expected["chosen"])
    sums = EPSILON["float64" if dtype == "float64" else "float32"]
    for name in (*RESULTS, "grad_features"):
        storage = EPSILON[dtype] if name in ("pooled", "grad_features") else 0
        exact = expected[name]
        scale = np.abs(exact) + (np.abs(exact).max(initial=0) if name == "grad_features" else 0)
        bound = (storage + 64 * sums) * scale + (2.0**-24 if dtype == "float16" else 1e-30)
        error = np.abs(got[name] - exact)
        assert (error <= bound).all(), f"{name}: {np.nanmax(error / bound):.3g} times the bound"
    return got


LAYOUTS = pytest.mark.parametrize("axes", [CHANNELS_FIRST, CHANNELS_LAST], ids=["channels_first", "channels_last"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", list(DTYPES))
# [B, C, T, H, W] and parts: bands that are whole chunks and bands that are not, many tiles of a plane, more channels
# than a block takes, many frames.
SIZES = [
    ((2, 5, 3, 4, 6), 2),
    ((1, 3, 2, 7, 2), 3),
    ((2, 16, 2, 16, 8), 4),
    ((1, 70, 2, 7, 7), 7),
    ((1, 24, 1, 1, 9), 1),
    ((1, 4, 4, 3, 1), 2),
    ((1, 130, 1, 4, 8), 2),
    ((1, 2, 1, 90, 48), 5),
    ((1, 34, 1, 20, 26), 4),
    ((1, 3, 70, 2, 4), 2),
]


@LAYOUTS
@EVERY_DTYPE
@pytest.mark.parametrize(("size", "parts"), SIZES, ids=str)
def test_kernels_agree_with_the_definition(
    emulation: ctypes.CDLL, size: tuple[int, int, int, int, int], parts: int, dtype: str, axes: tuple[int, ...]
) -> None:
    check(emulation, random_inputs(dtype, size, parts), parts, dtype, axes, seed=sum(size))


@LAYOUTS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("given", [("pooled",), ("scores",), ("map",), ("pooled", "map")], ids="+".join)
@pytest.mark.parametrize("detach", [False, True])
def test_every_energy_and_gradient(
    emulation: ctypes.CDLL, detach: bool, given: tuple[str, ...], energy: str, dtype: str, axes: tuple[int, ...]
) -> None:
    inputs = random_inputs(dtype, (2, 9, 3, 7, 4), 3)
    check(emulation, inputs, 3, dtype, axes, energy=energy, detach=detach, given=given)


@LAYOUTS
@EVERY_DTYPE
@pytest.mark.parametrize("extra", [1, 8])
def test_maps_that_are_slices(emulation: ctypes.CDLL, extra: int, dtype: str, axes: tuple[int, ...]) -> None:
    check(emulation, random_inputs(dtype, (2, 16, 2, 6, 8), 3), 3, dtype, axes, extra=extra)


def test_more_parts_than_a_block_takes_at_a_time(emulation: ctypes.CDLL) -> None:
    check(emulation, random_inputs("float32", (1, 3, 2, 150, 2), 150), 150, "float32", CHANNELS_FIRST)


@LAYOUTS
@EVERY_DTYPE
def test_results_do_not_depend_on_the_order_of_threads_or_on_the_batch(
    emulation: ctypes.CDLL, dtype: str, axes: tuple[int, ...]
) -> None:
    inputs = random_inputs(dtype, (3, 33, 2, 7, 5), 2)
    first = run(emulation, inputs, 2, dtype, axes, seed=1)
    again = run(emulation, inputs, 2, dtype, axes, seed=2)
    alone = run(emulation, {n: x[1:2] for n, x in inputs.items()}, 2, dtype, axes, seed=3)
    for name, result in first.items():
        np.testing.assert_array_equal(result, again[name])
        np.testing.assert_array_equal(result[1:2], alone[name])


@LAYOUTS
@pytest.mark.parametrize("energy", ENERGIES)
def test_frames_without_energy(emulation: ctypes.CDLL, energy: str, axes: tuple[int, ...]) -> None:
    inputs = random_inputs("float32", (3, 5, 3, 4, 4), 2)
    inputs["features"][0] = 0
    inputs["features"][1, :, 1] = 0
    inputs["features"][2, :, :, 2:] = 0
    got = check(emulation, inputs, 2, "float32", axes, energy=energy)
    assert not got["scores"][0].any()
    assert not got["scores"][1, 1].any()
    assert not got["scores"][2, :, 1].any()


def test_equal_frames_tie_and_the_first_is_chosen(emulation: ctypes.CDLL) -> None:
    inputs = random_inputs("float32", (1, 5, 40, 4, 4), 2)
    inputs["features"][...] = inputs["features"][:, :, :1]
    got = run(emulation, inputs, 2, "float32", CHANNELS_FIRST)
    np.testing.assert_array_equal(got["chosen"], [[0, 0]])
    np.testing.assert_allclose(got["scores"], 1 / 40, rtol=1e-5)


@EVERY_DTYPE
def test_no_clips_and_no_channels(emulation: ctypes.CDLL, dtype: str) -> None:
    run(emulation, random_inputs(dtype, (0, 3, 2, 4, 2), 2), 2, dtype, CHANNELS_FIRST)
    got = run(emulation, random_inputs(dtype, (1, 0, 2, 4, 2), 2), 2, dtype, CHANNELS_FIRST)
    assert not got["scores"].any()
    assert not got["map"].any()
