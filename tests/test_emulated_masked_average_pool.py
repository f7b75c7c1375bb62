"""The CUDA kernels of masked_average_pool without a GPU (see oracles/cuda_emulation.py)."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

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
from oracles.masked_supports import pooled_and_gradients

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

MASKS = {**DTYPES, "uint8": np.uint8}
MASK_CODES = {**CODES, "uint8": 4}  # gingham::MaskType
NAMES = ("pooled", "grad_features", "grad_mask")

LAYOUTS = pytest.mark.parametrize("axes", [CHANNELS_FIRST, CHANNELS_LAST], ids=["channels_first", "channels_last"])
RESIZES = pytest.mark.parametrize("resize", ["features", "mask"])


class Arrays(ctypes.Structure):
    _fields_ = (
        ("features", Map),
        ("mask", Map),
        ("grad_features", Map),
        ("grad_mask", Map),
        ("pooled", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("grad_pooled", ctypes.c_void_p),
    )


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = compile_operator("masked_average_pool", tmp_path_factory.mktemp("cuda_emulation"))
    loaded.forward.restype = loaded.backward.restype = ctypes.c_char_p
    loaded.forward_workspace.restype = loaded.backward_workspace.restype = ctypes.c_size_t
    return loaded


def check(
    library: ctypes.CDLL,
    size: tuple[int, int],
    mask_size: tuple[int, int],
    dtype: str,
    mask_type: str,
    resize: str,
    axes: tuple[int, ...],
    *,
    batch: int = 2,
    channels: int = 5,
    extra: int = 0,
    seed: int = 0,
) -> None:
    """One call forward and backward against the written out form, elementwise."""
    generator = np.random.default_rng(seed)
    features = generator.standard_normal((batch, channels, 1, *size)).astype(DTYPES[dtype])
    mask = generator.random((batch, 1, 1, *mask_size))
    mask = (mask > 0.5).astype(np.uint8) if mask_type == "uint8" else mask.astype(MASKS[mask_type])
    grad = generator.standard_normal((batch, channels)).astype(DTYPES[dtype])
    sums = np.float64 if dtype == "float64" else np.float32
    shape = (ctypes.c_int64 * 6)(batch, channels, *size, *mask_size)
    arena = Arena(library)
    try:
        held: dict[str, Any] = {
            name: arena.array(features.shape, DTYPES[dtype], axes, extra) for name in ("features", "grad_features")
        }
        held["mask"] = arena.array(mask.shape, MASKS[mask_type], CHANNELS_FIRST, extra)
        has_grad = mask_type != "uint8"
        held["grad_mask"] = arena.array(mask.shape, MASKS[mask_type], CHANNELS_FIRST)
        for name in ("pooled", "grad_pooled"):
            held[name] = arena.array(grad.shape, DTYPES[dtype], (0, 1))
        held["weights"] = arena.array((batch, *size), sums, (0, 1, 2))
        held["total"] = arena.array((batch,), sums, (0,))
        held["features"][...], held["mask"][...], held["grad_pooled"][...] = features, mask, grad
        arrays = Arrays(
            *(view_of(held[name]) for name in ("features", "mask", "grad_features")),
            view_of(held["grad_mask"]) if has_grad else Map(),
            *(held[name].ctypes.data for name in ("pooled", "weights", "total", "grad_pooled")),
        )
        options = shape, CODES[dtype], MASK_CODES[mask_type], resize == "mask", ctypes.byref(arrays)
        for direction in ("forward", "backward"):
            workspace = getattr(library, f"{direction}_workspace")(*options)
            memory = arena.array((workspace // 8,), np.float64, (0,))
            error = getattr(library, direction)(*options, ctypes.c_void_p(memory.ctypes.data), seed)
            assert not error, error
        expected = pooled_and_gradients(
            torch.from_numpy(features.astype(np.float64))[:, :, 0],
            torch.from_numpy(mask.astype(np.float64))[:, :, 0],
            torch.from_numpy(grad.astype(np.float64)),
            resize,
        )
        for name, quantity in zip(NAMES, expected, strict=True):
            if name == "grad_mask" and not has_grad:
                continue
            result = torch.from_numpy(held[name].astype(np.float64)).reshape(quantity.exact.shape)
            stored = getattr(torch, mask_type if name == "grad_mask" else dtype)
            bound = quantity.bound(stored, torch.float64 if dtype == "float64" else torch.float32)
            error = (result - quantity.exact).abs()
            assert bool((error <= bound).all()), f"{name}: {float((error / bound).max())} times the bound"
    finally:
        arena.free()


@LAYOUTS
@RESIZES
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    ("size", "mask_size"),
    [((5, 7), (17, 12)), ((1, 9), (4, 30)), ((9, 1), (3, 1)), ((1, 1), (1, 1)), ((6, 5), (2, 3)), ((4, 4), (1, 70))],
    ids=str,
)
def test_kernels_agree_with_the_written_out_form(
    emulation: ctypes.CDLL,
    size: tuple[int, int],
    mask_size: tuple[int, int],
    dtype: str,
    resize: str,
    axes: tuple[int, ...],
) -> None:
    check(emulation, size, mask_size, dtype, "uint8", resize, axes, seed=sum(size))
    check(emulation, size, mask_size, dtype, dtype, resize, axes, channels=17, extra=3, seed=sum(size))


@RESIZES
@pytest.mark.parametrize("mask_type", list(MASKS))
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_masks_of_any_type(emulation: ctypes.CDLL, dtype: str, mask_type: str, resize: str) -> None:
    check(emulation, (4, 6), (11, 9), dtype, mask_type, resize, CHANNELS_FIRST)


@LAYOUTS
@pytest.mark.parametrize(("size", "channels"), [((33, 41), 2), ((3, 2), 600)])
def test_more_positions_or_channels_than_a_block_has_threads(
    emulation: ctypes.CDLL, size: tuple[int, int], channels: int, axes: tuple[int, ...]
) -> None:
    check(emulation, size, (40, 50), "float32", "float32", "features", axes, batch=1, channels=channels)
    check(emulation, size, (40, 50), "float16", "uint8", "mask", axes, batch=1, channels=channels)


@LAYOUTS
def test_sixteen_bytes_at_once_where_memory_allows_it(emulation: ctypes.CDLL, axes: tuple[int, ...]) -> None:
    for dtype, channels in (("float32", 8), ("bfloat16", 16), ("float64", 6), ("float16", 9)):
        check(emulation, (5, 7), (9, 9), dtype, "float32", "features", axes, channels=channels)
