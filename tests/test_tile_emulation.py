"""The bfloat16 kernels for AMX without AMX: compiled against tests/tile_emulation and compared with dense attention.

Where the machine has AMX, tests/test_criss_cross_attention.py runs the real instructions as well.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gingham
from oracles.dense_attention import dense_attention_and_gradients
from test_criss_cross_attention import NAMES, assert_within_bounds, channels_last, contiguous, maps

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("g++")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs g++"),
    pytest.mark.skipif(
        "avx512_bf16" not in gingham.info()["instruction sets available"], reason="needs a machine with AVX512-BF16"
    ),
]


class Map(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 5))


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("tile_emulation") / "emulation.so"
    flags = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"]
    defines = ["-DGINGHAM_TILES", "-DGINGHAM_EMULATED_TILES", "-DGINGHAM_ISA=amx"]
    include = [f"-I{ROOT / folder}" for folder in ("csrc/include", "csrc/cpu", "tests/tile_emulation")]
    sources = [str(ROOT / "csrc/cpu/criss_cross_attention.cpp"), str(ROOT / "tests/tile_emulation/module.cpp")]
    options = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    subprocess.run(
        [str(COMPILER), *options, *flags, *defines, *include, *sources, "-o", str(library)],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    loaded = ctypes.CDLL(str(library))
    loaded.forward.restype = loaded.backward.restype = ctypes.c_bool
    return loaded


def view_of(x: Tensor) -> Map:
    strides = x.stride() if x.dim() == 5 else (*x.stride()[:2], 0, *x.stride()[2:])
    return Map(x.data_ptr(), (ctypes.c_int64 * 5)(*strides))


def run(library: ctypes.CDLL, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    frames = query.shape[2] if query.dim() == 5 else 1
    sizes = (*query.shape[:2], value.shape[1], frames, *query.shape[-2:])
    shape = (ctypes.c_int64 * 6)(*sizes)
    results = [torch.full_like(x, math.nan) for x in (value, query, key, value)]
    lse = torch.full((query.shape[0], *query.shape[2:]), math.nan, dtype=torch.float64)
    views = [view_of(x) for x in (query, key, value, results[0], grad, *results[1:])]
    for call, count in ((library.forward, 4), (library.backward, 8)):
        assert call(shape, ctypes.c_double(scale), (Map * count)(*views[:count]), ctypes.c_void_p(lse.data_ptr()))
    return results


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize(
    ("size", "channels"),
    [
        ((5, 6), (3, 5)),
        ((1, 1), (1, 1)),
        ((1, 17), (2, 16)),
        ((33, 1), (31, 33)),
        ((16, 32), (32, 48)),
        ((17, 33), (64, 40)),
        ((3, 4, 5), (5, 7)),
        ((19, 49), (70, 130)),
        ((2, 3, 18), (9, 17)),
    ],
    ids=str,
)
def test_agrees_with_dense_attention(
    emulation: ctypes.CDLL, size: tuple[int, ...], channels: tuple[int, int], layout: object
) -> None:
    arguments = maps(*size, batch=2, key_channels=channels[0], value_channels=channels[1], dtype=torch.bfloat16)
    arguments = [layout(x) for x in arguments]  # type: ignore[operator]
    expected = dense_attention_and_gradients(*arguments, scale=0.4)
    for name, got, exact in zip(NAMES, run(emulation, *arguments, 0.4), expected, strict=True):
        assert_within_bounds(name, got, exact, torch.bfloat16)


def test_what_is_not_a_number_stays_on_its_cross(emulation: ctypes.CDLL) -> None:
    # The tiles are padded; a pixel must not get into another line by way of the padding.
    query, key, value, grad = maps(18, 19, batch=1, key_channels=5, value_channels=6, dtype=torch.bfloat16)
    value[0, 2, 3, 4] = math.nan
    output = run(emulation, query, key, value, grad, 1.0)[0]
    rows, columns = output[0, 2].isnan().nonzero(as_tuple=True)
    assert set(rows[columns != 4].tolist()) == {3}
    assert set(columns[rows != 3].tolist()) == {4}
    assert not output[0, [0, 1, 3, 4, 5]].isnan().any()
