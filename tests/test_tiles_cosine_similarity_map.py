"""The CPU kernels of cosine_similarity_map with AMX's tiles in software, and scratch memory that is no number.

Tiles hold bfloat16; the other types are computed as without them. Where the machine has AMX,
tests/test_cosine_similarity_map.py runs the real instructions as well.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gingham
from oracles.cosines import cosines_and_gradients
from oracles.layouts import channels_last, contiguous, sliced
from test_cosine_similarity_map import DTYPES, NAMES, assert_within_bounds, laid_out, maps

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("g++")
CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # gingham::DType
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs g++"),
    pytest.mark.skipif(
        "avx512_bf16" not in gingham.info()["instruction sets available"], reason="needs a machine with AVX512-BF16"
    ),
]


class Map(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 5))


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """The kernels of "avx512", or those of "amx" on emulated tiles."""
    return cache(lambda isa: build(isa, tmp_path_factory.mktemp(isa)))


def build(isa: str, folder: Path) -> ctypes.CDLL:
    flags = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    flags += ["-mavx512bf16", "-DGINGHAM_TILES", "-DGINGHAM_EMULATED_TILES"] if isa == "amx" else []
    include = [f"-I{ROOT / path}" for path in ("csrc/include", "csrc/cpu", "tests/tile_emulation")]
    sources = [str(ROOT / path / "cosine_similarity_map.cpp") for path in ("csrc/cpu", "tests/tile_emulation")]
    options = ["-std=c++17", "-O2", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    objects = []
    for name, source in zip(("kernels", "module"), sources, strict=True):
        objects.append(str(folder / f"{name}.o"))
        command = [str(COMPILER), *options, *flags, f"-DGINGHAM_ISA={isa}", *include, "-c", source, "-o", objects[-1]]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    library = str(folder / "kernels.so")
    subprocess.run([str(COMPILER), "-shared", *objects, "-o", library], check=True)
    loaded = ctypes.CDLL(library)
    loaded.forward.restype = loaded.backward.restype = ctypes.c_bool
    return loaded


def view_of(x: Tensor) -> Map:
    return Map(x.data_ptr(), (ctypes.c_int64 * 5)(*x.stride()[:2], 0, *x.stride()[2:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced])
@pytest.mark.parametrize(
    ("channels", "count", "size"),
    [(5, 0, (3, 4)), (3, 2, (5, 7)), (81, 9, (1, 1)), (97, 17, (9, 14)), (300, 33, (3, 47)), (66, 70, (7, 19))],
)
def test_scratch_memory_and_tiles(
    kernels: Callable[[str], ctypes.CDLL],
    channels: int,
    count: int,
    size: tuple[int, int],
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> None:
    features, prototypes, grad = laid_out(layout, maps(*size, channels=channels, count=count, dtype=dtype))
    output, grad_features = (layout(torch.empty(x.shape, dtype=dtype)) for x in (grad, features))
    grad_prototypes = torch.empty(prototypes.shape, dtype=dtype)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    norms = torch.empty(2, *size, dtype=sums), torch.empty(2, count, dtype=sums)
    shape = (ctypes.c_int64 * 5)(2, channels, count, *size)
    views = (Map * 4)(*(view_of(x) for x in (features, output, grad, grad_features)))
    vectors = [ctypes.c_void_p(x.data_ptr()) for x in (prototypes, *norms, grad_prototypes)]
    loaded = kernels("amx" if dtype == torch.bfloat16 else "avx512")
    assert loaded.forward(shape, CODES[dtype], views, *vectors[:3])
    assert loaded.backward(shape, CODES[dtype], views, *vectors)
    expected = cosines_and_gradients(features, prototypes, grad)
    for name, got, exact in zip(NAMES, (output, grad_features, grad_prototypes), expected, strict=True):
        assert_within_bounds(name, got, exact, dtype)
