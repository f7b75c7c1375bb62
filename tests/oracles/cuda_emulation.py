"""The CUDA kernels without a GPU: compiled by g++ against tests/cuda_emulation, and memory that tells of overruns.

What this can show: indices, fragment layouts, masks, barriers (threads run in random order between them), accesses past
the end of global and shared memory, alignment, and the arithmetic of each type. What it cannot: speed, and that nvcc
and the hardware agree with the emulation.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")

DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CODES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}  # gingham::DType
EPSILON = {"float32": 2.0**-23, "tf32": 2.0**-10, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def compile_operator(name: str, folder: Path) -> ctypes.CDLL:
    """Compiles csrc/cuda/<name>.cu and tests/cuda_emulation/<name>.cpp into `folder` and loads them."""
    library = folder / f"{name}.so"
    include = [f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'tests/cuda_emulation'}"]
    sources = [str(ROOT / f"csrc/cuda/{name}.cu"), str(ROOT / f"tests/cuda_emulation/{name}.cpp")]
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
    command = [str(COMPILER), *options, "-DGINGHAM_CUDA_EMULATION", *include, "-x", "c++", *sources, "-o", str(library)]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.allocate_guarded.restype = ctypes.c_void_p
    loaded.allocate_guarded.argtypes = (ctypes.c_size_t,)
    loaded.free_guarded.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return loaded


class Map(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 5))


class Arena:
    """Arrays that end at an unmapped page, so that a kernel that goes past the end stops the process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.owned: list[tuple[int, int]] = []

    def array(self, shape: tuple[int, ...], dtype: Any, memory_axes: tuple[int, ...], extra: int = 0) -> np.ndarray:
        """An array of `shape` whose axes lie in memory as `memory_axes` says; the last is `extra` elements longer."""
        stored = [shape[axis] for axis in memory_axes]
        stored[-1] += extra
        count = int(np.prod(stored))
        size = max(count, 1) * np.dtype(dtype).itemsize
        address = self.library.allocate_guarded(size)
        self.owned.append((address, size))
        flat = np.frombuffer((ctypes.c_char * size).from_address(address), dtype=np.uint8).view(dtype)[:count]
        flat[...] = np.iinfo(flat.dtype).max if np.issubdtype(flat.dtype, np.integer) else np.nan
        whole = flat.reshape(stored).transpose(np.argsort(memory_axes))
        return whole[tuple(slice(0, s) for s in shape)]

    def free(self) -> None:
        for address, size in self.owned:
            self.library.free_guarded(address, size)


CHANNELS_FIRST, CHANNELS_LAST = (0, 1, 2, 3, 4), (0, 2, 3, 4, 1)


def view_of(array: np.ndarray) -> Map:
    strides = [s // array.itemsize for s in array.strides]
    return Map(array.ctypes.data, (ctypes.c_int64 * 5)(*(strides[i] for i in (0, 1, 2, 3, 4))))
