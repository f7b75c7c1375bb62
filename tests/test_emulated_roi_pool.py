"""The CUDA kernels of roi_pool without a GPU (see oracles/cuda_emulation.py)."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

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
from oracles.roi_maxima import roi_maxima, scattered

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


class Arrays(ctypes.Structure):
    _fields_ = (
        ("features", Map),
        ("output", Map),
        ("places", Map),
        ("grad_output", Map),
        ("grad_features", Map),
        ("boxes", ctypes.c_void_p),
    )


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = compile_operator("roi_pool", tmp_path_factory.mktemp("cuda_emulation"))
    loaded.forward.restype = loaded.backward.restype = ctypes.c_char_p
    loaded.backward_workspace.restype = ctypes.c_size_t
    return loaded


def random_features(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Rounded, so that there are many ties and zeros of both signs, and some pixels that never win."""
    generator = np.random.default_rng(seed)
    features = np.round(2 * generator.standard_normal(shape)) / 2
    features[generator.random(shape) < 0.1] = np.nan
    features[generator.random(shape) < 0.1] = -np.inf
    return features.astype(DTYPES[dtype])


def random_boxes(dtype: str, count: int, images: int, size: tuple[int, int], scale: float, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    height, width = size
    corners = (generator.random((count, 4)) * 1.6 - 0.3) * [width, height, width, height] / scale
    boxes = np.concatenate([generator.integers(0, images, (count, 1)), corners], axis=1)
    return boxes.astype(np.float64 if dtype == "float64" else np.float32)


def run(
    library: ctypes.CDLL,
    features: np.ndarray,
    boxes: np.ndarray,
    size: tuple[int, int],
    scale: float,
    grad: np.ndarray,
    dtype: str,
    axes: tuple[int, ...],
    seed: int = 0,
    extra: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, places and the gradient of the features: the same whether forward keeps the places or not."""
    batch, channels, height, width = features.shape
    shape = (ctypes.c_int64 * 7)(batch, channels, height, width, len(boxes), *size)
    arena = Arena(library)
    try:
        held = {}
        for name, value in (
            ("features", features),
            ("grad_output", grad),
            ("output", grad),
            ("places", grad),
            ("grad_features", features),
        ):
            own = arena.array(
                (*value.shape[:2], 1, *value.shape[2:]),
                np.int32 if name == "places" else DTYPES[dtype],
                axes,
                extra if name == "features" else 0,
            )
            if name in ("features", "grad_output"):
                own[...] = value[:, :, None]
            held[name] = own
        own_boxes = arena.array(boxes.shape, boxes.dtype, (0, 1))
        own_boxes[...] = boxes
        arrays = Arrays(
            *(view_of(held[name]) for name in ("features", "output", "places", "grad_output", "grad_features")),
            own_boxes.ctypes.data,
        )
        code, factor = CODES[dtype], ctypes.c_double(scale)
        results = []
        for keep in (True, False):
            held["output"][...] = held["grad_features"][...] = 7
            assert library.forward(shape, code, factor, ctypes.byref(arrays), keep, seed) == b""
            size_of_workspace = library.backward_workspace(shape, code, ctypes.byref(arrays), keep)
            workspace = arena.array((size_of_workspace // 4,), np.float32, (0,))
            address = ctypes.c_void_p(workspace.ctypes.data)
            assert library.backward(shape, code, factor, ctypes.byref(arrays), keep, address, seed) == b""
            results.append([held[name][:, :, 0].copy() for name in ("output", "places", "grad_features")])
        for kept, found in zip(*results, strict=True):
            assert kept.tobytes() == found.tobytes()
        output, places, grad_features = results[0]
        return output, places, grad_features
    finally:
        arena.free()


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(f"u{x.itemsize}")


@pytest.mark.parametrize("axes", [CHANNELS_FIRST, CHANNELS_LAST], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "size", "scale"),
    [
        ((2, 5, 11, 13), (3, 4), 1.0),
        ((1, 9, 6, 300), (2, 2), 0.25),  # wider than a line of a warp
        ((2, 3, 13, 9), (1, 37), 0.5),  # more bins than lanes
        ((1, 34, 1, 7), (2, 1), 0.3),
        ((1, 160, 6, 18), (2, 3), 1.0),  # more channels than a block collects, and whole packs of them
        ((1, 1, 17, 1), (7, 7), 1.0),
    ],
)
def test_agrees_with_the_definition_bit_for_bit(
    emulation: ctypes.CDLL,
    shape: tuple[int, ...],
    size: tuple[int, int],
    scale: float,
    dtype: str,
    axes: tuple[int, ...],
) -> None:
    features = random_features(dtype, shape)
    boxes = random_boxes(dtype, 7, shape[0], shape[2:], scale)
    grad = np.random.default_rng(1).standard_normal((7, shape[1], *size)).astype(DTYPES[dtype])
    expected, places = roi_maxima(features, boxes, size, scale)
    for seed in (0, 1):
        got = run(emulation, features, boxes, size, scale, grad, dtype, axes, seed)
        assert (bits(got[0]) == bits(expected)).all()
        assert (got[1] == places).all()
        assert (bits(got[2]) == bits(scattered(places, grad, boxes, shape))).all()


def test_reads_maps_with_longer_rows_in_place(emulation: ctypes.CDLL) -> None:
    features, boxes = random_features("float32", (2, 3, 5, 7)), random_boxes("float32", 4, 2, (5, 7), 1.0)
    grad = np.ones((4, 3, 2, 2), dtype=np.float32)
    expected, places = roi_maxima(features, boxes, (2, 2), 1.0)
    for axes in (CHANNELS_FIRST, CHANNELS_LAST):
        got = run(emulation, features, boxes, (2, 2), 1.0, grad, "float32", axes, extra=3)
        assert (bits(got[0]) == bits(expected)).all()
        assert (got[2] == scattered(places, grad, boxes, features.shape)).all()


@pytest.mark.parametrize("axes", [CHANNELS_FIRST, CHANNELS_LAST], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_more_boxes_than_a_block_looks_at(emulation: ctypes.CDLL, dtype: str, axes: tuple[int, ...]) -> None:
    features, boxes = random_features(dtype, (2, 2, 9, 10)), random_boxes(dtype, 300, 2, (9, 10), 1.0)
    grad = np.random.default_rng(1).standard_normal((300, 2, 2, 2)).astype(DTYPES[dtype])
    expected, places = roi_maxima(features, boxes, (2, 2), 1.0)
    got = run(emulation, features, boxes, (2, 2), 1.0, grad, dtype, axes)
    assert (bits(got[0]) == bits(expected)).all()
    assert (bits(got[2]) == bits(scattered(places, grad, boxes, features.shape))).all()


@pytest.mark.parametrize("axes", [CHANNELS_FIRST, CHANNELS_LAST], ids=["channels_first", "channels_last"])
def test_an_invalid_box_is_nan_and_gives_nothing(emulation: ctypes.CDLL, axes: tuple[int, ...]) -> None:
    features = np.ones((2, 3, 5, 7), dtype=np.float32)
    boxes = np.array(
        [
            [2, 0, 0, 3, 3],
            [-1, 0, 0, 3, 3],
            [0.5, 0, 0, 3, 3],
            [np.nan, 0, 0, 3, 3],
            [0, np.nan, 0, 3, 3],
            [0, 0, 0, 3, np.inf],
            [1e30, 0, 0, 3, 3],
            [1, 0, 0, 3, 3],
        ],
        dtype=np.float32,
    )
    output, places, grad = run(
        emulation, features, boxes, (2, 2), 1.0, np.ones((8, 3, 2, 2), np.float32), "float32", axes
    )
    assert np.isnan(output[:7]).all()
    assert (output[7] == 1).all()
    assert (places[:7] == -1).all()
    assert grad.sum() == 3 * 4


@pytest.mark.parametrize("axes", [CHANNELS_FIRST, CHANNELS_LAST], ids=["channels_first", "channels_last"])
def test_coordinates_beyond_all_maps_saturate(emulation: ctypes.CDLL, axes: tuple[int, ...]) -> None:
    features = random_features("float32", (1, 2, 5, 7))
    far = np.float32(3e38)
    boxes = np.array([[0, -far, -far, far, far], [0, far, far, far, far], [0, -3e9, 0, 3e9, 4]], dtype=np.float32)
    grad = np.ones((3, 2, 2, 3), dtype=np.float32)
    expected, places = roi_maxima(features, boxes, (2, 3), 1.0)
    got = run(emulation, features, boxes, (2, 3), 1.0, grad, "float32", axes)
    assert (bits(got[0]) == bits(expected)).all()
    assert (got[2] == scattered(places, grad, boxes, features.shape)).all()


@pytest.mark.parametrize("shape", [(2, 3, 0, 7), (2, 3, 5, 0), (2, 0, 5, 7)])
def test_empty_maps(emulation: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    boxes = random_boxes("float32", 2, 2, (5, 7), 1.0)
    features, grad = np.zeros(shape, np.float32), np.ones((2, shape[1], 2, 2), np.float32)
    output, _, _ = run(emulation, features, boxes, (2, 2), 1.0, grad, "float32", CHANNELS_FIRST)
    assert (output == 0).all()


def test_no_boxes(emulation: ctypes.CDLL) -> None:
    features, boxes = np.ones((1, 2, 3, 4), np.float32), np.zeros((0, 5), np.float32)
    grad = np.ones((0, 2, 2, 2), np.float32)
    assert (run(emulation, features, boxes, (2, 2), 1.0, grad, "float32", CHANNELS_FIRST)[2] == 0).all()
