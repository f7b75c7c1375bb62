"""The CUDA kernels of masked_similarity without a GPU (see oracles/cuda_emulation.py)."""

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
    Arena,
    Map,
    compile_operator,
    view_of,
)
from oracles.masked_supports import similarity_and_gradients

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

MASKS = {**DTYPES, "uint8": np.uint8}
MASK_CODES = {**CODES, "uint8": 4}  # gingham::MaskType
NAMES = ("similarity", "grad_query", "grad_support", "grad_mask")

LAYOUTS = pytest.mark.parametrize("axes", [CHANNELS_FIRST, CHANNELS_LAST], ids=["channels_first", "channels_last"])
RESIZES = pytest.mark.parametrize("resize", ["features", "mask"])


class Arrays(ctypes.Structure):
    _fields_ = (
        *((name, Map) for name in ("query", "support", "mask", "grad_query", "grad_support", "grad_mask")),
        ("valid_sizes", ctypes.c_void_p),
        *(
            (name, ctypes.c_void_p)
            for name in ("similarity", "weights", "totals", "prototype", "query_norms", "grad_similarity")
        ),
    )


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = compile_operator("masked_similarity", tmp_path_factory.mktemp("cuda_emulation"))
    loaded.forward.restype = loaded.backward.restype = ctypes.c_char_p
    loaded.forward_workspace.restype = loaded.backward_workspace.restype = ctypes.c_size_t
    return loaded


Maps = dict[str, np.ndarray]  # query and grad [B, C or 1, h, w], support and mask [B, K, C or 1, *]


def random_maps(
    size: tuple[int, int],
    support_size: tuple[int, int],
    mask_size: tuple[int, int],
    dtype: str,
    mask_type: str,
    *,
    batch: int = 2,
    shots: int = 2,
    channels: int = 5,
    seed: int = 0,
) -> Maps:
    generator = np.random.default_rng(seed)
    mask = generator.random((batch, shots, 1, *mask_size))
    return {
        "query": generator.standard_normal((batch, channels, *size)).astype(DTYPES[dtype]),
        "support": generator.standard_normal((batch, shots, channels, *support_size)).astype(DTYPES[dtype]),
        "mask": (mask > 0.5).astype(np.uint8) if mask_type == "uint8" else mask.astype(MASKS[mask_type]),
        "grad": generator.standard_normal((batch, 1, *size)).astype(DTYPES[dtype]),
    }


def run(
    library: ctypes.CDLL,
    maps: Maps,
    dtype: str,
    mask_type: str,
    resize: str,
    axes: tuple[int, ...],
    *,
    wanted: tuple[str, ...] = ("query", "support", "mask"),
    valid_sizes: np.ndarray | None = None,
    extra: int = 0,
    seed: int = 0,
    grad_query_axes: tuple[int, ...] | None = None,
) -> Maps:
    batch, channels, *size = maps["query"].shape
    shots, support_size, mask_size = maps["support"].shape[1], maps["support"].shape[3:], maps["mask"].shape[3:]
    sums = np.float64 if dtype == "float64" else np.float32
    shape = (ctypes.c_int64 * 9)(batch, shots, channels, *size, *support_size, *mask_size)
    arena = Arena(library)
    try:
        held: dict[str, Any] = {}
        # All as [B, C, frame or shot, row, column].
        for name, padding in (("query", extra), ("support", extra), ("mask", extra)):
            value = maps[name][:, :, None] if name == "query" else maps[name].swapaxes(1, 2)
            order = CHANNELS_FIRST if name == "mask" else axes
            if name == "support":  # shots lie apart
                order = (0, 2, 1, 3, 4) if axes == CHANNELS_FIRST else (0, 2, 3, 4, 1)
            held[name] = arena.array(value.shape, value.dtype, order, padding)
            held[name][...] = value
            if name == "query" and grad_query_axes is not None:
                order = grad_query_axes
            held[f"grad_{name}"] = arena.array(value.shape, value.dtype, order)
        for name in ("similarity", "grad_similarity"):
            held[name] = arena.array(maps["grad"].shape, DTYPES[dtype], (0, 1, 2, 3))
        held["grad_similarity"][...] = maps["grad"]
        held["weights"] = arena.array((batch, shots, int(np.prod(support_size))), sums, (0, 1, 2))
        held["totals"] = arena.array((batch, shots), sums, (0, 1))
        held["prototype"] = arena.array((batch, channels), sums, (0, 1))
        held["query_norms"] = arena.array((batch, *size), sums, (0, 1, 2))
        arrays = Arrays(
            *(view_of(held[name]) for name in ("query", "support", "mask")),
            *(view_of(held[f"grad_{name}"]) if name in wanted else Map() for name in ("query", "support", "mask")),
            None if valid_sizes is None else valid_sizes.ctypes.data,
            *(
                held[name].ctypes.data
                for name in ("similarity", "weights", "totals", "prototype", "query_norms", "grad_similarity")
            ),
        )
        options = shape, CODES[dtype], MASK_CODES[mask_type], resize == "mask", ctypes.byref(arrays)
        for direction in ("forward", "backward"):
            workspace = getattr(library, f"{direction}_workspace")(*options)
            memory = arena.array((workspace // 8,), np.float64, (0,))
            error = getattr(library, direction)(*options, ctypes.c_void_p(memory.ctypes.data), seed)
            assert not error, error
        results = {"similarity": held["similarity"].astype(np.float64)}
        for name in wanted:
            gradient = held[f"grad_{name}"].astype(np.float64)
            results[f"grad_{name}"] = gradient[:, :, 0] if name == "query" else gradient.swapaxes(1, 2)
        return results
    finally:
        arena.free()


def check(
    library: ctypes.CDLL, maps: Maps, dtype: str, mask_type: str, resize: str, axes: tuple[int, ...], **options: Any
) -> Maps:
    if mask_type == "uint8":
        options.setdefault("wanted", ("query", "support"))
    got = run(library, maps, dtype, mask_type, resize, axes, **options)
    tensors = (torch.from_numpy(maps[name].astype(np.float64)) for name in ("query", "support", "mask", "grad"))
    expected = similarity_and_gradients(*tensors, resize)
    for name, quantity in zip(NAMES, expected, strict=True):
        if name not in got:
            continue
        stored = getattr(torch, mask_type if name == "grad_mask" else dtype)
        bound = quantity.bound(stored, torch.float64 if dtype == "float64" else torch.float32)
        error = (torch.from_numpy(got[name]) - quantity.exact).abs()
        assert bool((error <= bound).all()), f"{name}: {float((error / bound).max())} times the bound"
    return got


@LAYOUTS
@RESIZES
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    ("size", "support_size", "mask_size"),
    [((5, 7), (4, 6), (13, 11)), ((1, 9), (7, 1), (3, 8)), ((1, 1), (1, 1), (1, 1)), ((3, 4), (5, 3), (2, 2))],
    ids=str,
)
def test_kernels_agree_with_the_written_out_form(
    emulation: ctypes.CDLL,
    size: tuple[int, int],
    support_size: tuple[int, int],
    mask_size: tuple[int, int],
    dtype: str,
    resize: str,
    axes: tuple[int, ...],
) -> None:
    for mask_type, channels, extra in (("uint8", 5, 0), (dtype, 16, 0), ("float32", 7, 3)):
        maps = random_maps(size, support_size, mask_size, dtype, mask_type, channels=channels, seed=sum(size))
        check(emulation, maps, dtype, mask_type, resize, axes, extra=extra, seed=channels)


def test_a_query_of_one_column_may_lie_otherwise_than_its_gradient(emulation: ctypes.CDLL) -> None:
    maps = random_maps((9, 1), (4, 6), (13, 11), "float32", "float32", channels=8)
    check(emulation, maps, "float32", "float32", "features", CHANNELS_LAST, grad_query_axes=CHANNELS_FIRST)


@LAYOUTS
@pytest.mark.parametrize(
    "wanted", [("query",), ("support",), ("mask",), ("support", "mask"), ("query", "mask")], ids=str
)
def test_gradients_that_are_not_wanted_are_not_needed(
    emulation: ctypes.CDLL, wanted: tuple[str, ...], axes: tuple[int, ...]
) -> None:
    maps = random_maps((5, 7), (4, 6), (13, 11), "float32", "float32")
    assert set(check(emulation, maps, "float32", "float32", "features", axes, wanted=wanted)) == {
        "similarity",
        *(f"grad_{name}" for name in wanted),
    }


@LAYOUTS
@RESIZES
def test_padded_supports_give_what_they_give_alone(emulation: ctypes.CDLL, resize: str, axes: tuple[int, ...]) -> None:
    maps = random_maps((5, 7), (6, 8), (13, 15), "float32", "float32", batch=1, shots=1, channels=6)
    alone = run(emulation, maps, "float32", "float32", resize, axes)
    padded = dict(maps)
    for name in ("support", "mask"):
        room = [(0, 0)] * 3 + [(0, 3), (0, 2)]
        padded[name] = np.pad(maps[name], room, constant_values=np.nan)
    sizes = np.array([[[6, 8, 13, 15]]], dtype=np.int64)
    got = run(emulation, padded, "float32", "float32", resize, axes, valid_sizes=sizes)
    for name in ("similarity", "grad_query"):
        np.testing.assert_array_equal(got[name], alone[name])
    for name, (rows, columns) in (("grad_support", (6, 8)), ("grad_mask", (13, 15))):
        np.testing.assert_array_equal(got[name][..., :rows, :columns], alone[name])
        assert not got[name][..., rows:, :].any()
        assert not got[name][..., columns:].any()


def test_sizes_out_of_range_count_as_the_nearest_in_it(emulation: ctypes.CDLL) -> None:
    maps = random_maps((5, 7), (6, 8), (13, 15), "float32", "float32", batch=1)
    whole = run(emulation, maps, "float32", "float32", "features", CHANNELS_FIRST)
    sizes = np.array([[[7, 99, 14, 2**40], [6, 8, 13, 15]]], dtype=np.int64)
    got = run(emulation, maps, "float32", "float32", "features", CHANNELS_FIRST, valid_sizes=sizes)
    for name, result in whole.items():
        np.testing.assert_array_equal(got[name], result)
    sizes[0, :, 1] = -5
    nothing = run(emulation, maps, "float32", "float32", "features", CHANNELS_FIRST, valid_sizes=sizes)
    assert all(not result.any() for result in nothing.values())


def test_a_support_given_twice_counts_as_once(emulation: ctypes.CDLL) -> None:
    maps = random_maps((5, 7), (6, 8), (13, 15), "float32", "uint8", shots=1)
    repeated = maps | {name: np.repeat(maps[name], 5, axis=1) for name in ("support", "mask")}
    once, five = (
        run(emulation, x, "float32", "uint8", "features", CHANNELS_LAST, wanted=("query",)) for x in (maps, repeated)
    )
    np.testing.assert_array_equal(once["similarity"], five["similarity"])
    np.testing.assert_array_equal(once["grad_query"], five["grad_query"])


def test_the_definition_agrees_with_the_written_out_form() -> None:
    maps = random_maps((5, 7), (4, 6), (13, 11), "float64", "float64")
    leaves = [torch.from_numpy(maps[name]).requires_grad_() for name in ("query", "support", "mask")]
    grad = torch.from_numpy(maps["grad"])
    for resize in ("features", "mask"):
        output = reference.masked_similarity(*leaves, resize=resize)
        results = output, *torch.autograd.grad(output, leaves, grad)
        expected = similarity_and_gradients(*(x.detach() for x in leaves), grad, resize)
        for result, quantity in zip(results, expected, strict=True):
            torch.testing.assert_close(result, quantity.exact)
