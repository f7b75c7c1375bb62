"""What the operators on arrays share: checks, memory orders, threads, and the call of a CUDA kernel."""

from __future__ import annotations

import contextlib
import numbers
import operator
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from gingham._library import native

FLOATING = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}  # gingham::DType
_MOST_WORK = 10_000  # for numpy.shares_memory, which decides for slices of one array at once
_MOST_THREADS = 1024  # of those that can have work, each gets memory and a thread of the system


# ------------------------------------------------------------------------------------------------ checks


def module_of(operator_name: str, arrays: dict[str, Any]) -> Any:
    """numpy or cupy; cupy is not imported for anyone who has not imported it."""
    cupy = sys.modules.get("cupy")
    kinds = []
    for name, x in arrays.items():
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(
                f"{operator_name}: {name} must be an array without a mask, got MaskedArray (its filled() gives one)"
            )
        if isinstance(x, np.ndarray):
            kinds.append(np)
        elif cupy is not None and isinstance(x, cupy.ndarray):
            kinds.append(cupy)
        else:
            raise TypeError(f"{operator_name}: {name} must be a NumPy or CuPy array, got {type(x).__name__}")
    if any(kind is not kinds[0] for kind in kinds):
        found = ", ".join(f"{name} {type(x).__module__.split('.')[0]}" for name, x in arrays.items())
        raise TypeError(f"{operator_name}: the arrays must be all NumPy or all CuPy, got {found}")
    return kinds[0]


def check_dtype(operator_name: str, name: str, x: Any, dtypes: Sequence[str] = tuple(FLOATING)) -> None:
    """Raises TypeError unless the array has one of the dtypes, in the machine's byte order."""
    if x.dtype.name not in dtypes or not x.dtype.isnative:
        known = dtypes[0] if len(dtypes) == 1 else f"{', '.join(dtypes[:-1])} or {dtypes[-1]}"
        raise TypeError(f"{operator_name}: {name} must be {known} in the machine's byte order, got {x.dtype}")


def check_same_dtype(operator_name: str, name: str, x: Any, like_name: str, like: Any) -> None:
    """Raises TypeError unless the arrays have one dtype."""
    if x.dtype != like.dtype:
        raise TypeError(
            f"{operator_name}: {name} must have the dtype of {like_name}, got {x.dtype} and {like_name} {like.dtype}"
        )


def check_same_device(operator_name: str, module: Any, name: str, x: Any, like_name: str, like: Any) -> None:
    """Raises ValueError unless arrays of CuPy are on one device."""
    if module is not np and x.device.id != like.device.id:
        raise ValueError(
            f"{operator_name}: {name} must be on the device of {like_name}, got {x.device} "
            f"and {like_name} {like.device}"
        )


def check_out(operator_name: str, module: Any, arrays: dict[str, Any], shape: tuple[int, ...], of: str) -> None:
    """Raises ValueError unless arrays["out"] has the shape (which is that of the argument `of`, or of the result where
    `of` is empty) and can be written to without touching the other arrays."""
    out = arrays["out"]
    if out.shape != shape:
        expected = f"have the shape of {of} {shape}" if of else f"have the shape {shape}"
        raise ValueError(f"{operator_name}: out must {expected}, got {out.shape}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError(f"{operator_name}: out must be writeable, got a read-only array")
    if _may_overlap_itself(out):
        raise ValueError(
            f"{operator_name}: out must not overlap itself, got strides {out.strides} bytes for shape {out.shape}"
        )
    for name, x in arrays.items():
        if name != "out" and _may_share_memory(module, out, x):
            raise ValueError(f"{operator_name}: out must share no memory with the inputs, got that of {name}")


def _may_share_memory(module: Any, x: Any, y: Any) -> bool:
    if module is not np:
        return bool(module.may_share_memory(x, y))  # cupy compares bounds only
    try:
        return np.shares_memory(x, y, max_work=_MOST_WORK)  # type: ignore[arg-type]  # its stub knows two values only
    except np.exceptions.TooHardError:
        return True


def _may_overlap_itself(x: Any) -> bool:
    """Whether an axis steps into what the axes of smaller steps span: always so where elements share memory."""
    span = x.itemsize
    for step, extent in sorted((abs(stride), extent) for stride, extent in zip(x.strides, x.shape, strict=True)):
        if extent > 1 and step < span:
            return x.size > 0
        span += (extent - 1) * step
    return False


def as_float(operator_name: str, name: str, value: Any) -> float:
    """A real number as a float."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{operator_name}: {name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{operator_name}: {name} must be in the range of float64, got a number beyond") from None


def sums_dtype(dtype: Any) -> Any:
    """In which an operator holds the sums of elements of that dtype."""
    return np.float64 if dtype == np.float64 else np.float32


def check_divisor(operator_name: str, eps: float, dtype: Any) -> None:
    """Raises ValueError where `eps`, by which sums of elements of that dtype are divided, would underflow there."""
    sums = np.dtype(sums_dtype(dtype))
    least = float(np.finfo(sums).tiny)
    if 0 < eps < least:
        raise ValueError(
            f"{operator_name}: eps must be at least {least}, the smallest normal number of {sums}, in which sums are "
            f"divided by it, got {eps}"
        )


def thread_count(operator_name: str, threads: int | None, module: Any = np) -> int:
    """How many CPU threads to use; 0 for CuPy, which takes none."""
    if module is not np:
        if threads is not None:
            raise ValueError(f"{operator_name}: threads must be None for CuPy arrays, got {threads!r}")
        return 0
    if threads is None:
        text = os.environ.get("GINGHAM_NUM_THREADS", "")
        if not text:
            return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"GINGHAM_NUM_THREADS must be a positive whole number, got {text!r}")
        return min(int(text), _MOST_THREADS)
    try:
        count = 0 if isinstance(threads, bool) else operator.index(threads)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{operator_name}: threads must be a positive whole number, got {threads!r}")
    return min(count, _MOST_THREADS)


# ------------------------------------------------------------------------------------------------ memory


def is_channels_last(x: Any, channel: int = 1) -> bool:
    """Whether a map's channels, not its columns, are adjacent in memory."""
    return bool(x.strides[channel] == x.itemsize and x.strides[-1] != x.itemsize)


def fits(x: Any, channels_last: bool, channel: int = 1) -> bool:
    """Whether the kernels can read or write the map in place."""
    axis = channel if channels_last else -1
    adjacent = x.strides[axis] == x.itemsize or x.shape[axis] <= 1
    return adjacent and all(stride % x.itemsize == 0 for stride in x.strides)


def native_map(module: Any, x: Any, channels_last: bool, channel: int = 1) -> Any:
    """The map itself when it fits, otherwise a copy."""
    if fits(x, channels_last, channel):
        return x
    copy = empty_map(module, x.shape, x.dtype, channels_last, channel)
    copy[...] = x
    return copy


def empty_map(module: Any, shape: Sequence[int], dtype: Any, channels_last: bool, channel: int = 1) -> Any:
    """A new map in either memory order."""
    if not channels_last:
        return module.empty(tuple(shape), dtype=dtype)
    rest = [extent for axis, extent in enumerate(shape) if axis != channel]
    return module.moveaxis(module.empty((*rest, shape[channel]), dtype=dtype), -1, channel)


def address_of(module: Any, x: Any) -> int:
    """Where the array begins."""
    address: int = x.ctypes.data if module is np else x.data.ptr
    return address


def view_of(module: Any, x: Any) -> tuple[int, tuple[int, ...]]:
    """Address and byte strides of [batch, channel, frame, row, column]; maps of four axes have one frame."""
    strides = x.strides if x.ndim == 5 else (*x.strides[:2], 0, *x.strides[2:])
    return address_of(module, x), strides


# ------------------------------------------------------------------------------------------------ CUDA


def on_device_of(module: Any, x: Any) -> contextlib.AbstractContextManager[Any]:
    """Makes the array's device CuPy's current one; nothing for NumPy."""
    return contextlib.nullcontext() if module is np else module.cuda.Device(x.device.id)


def run_cuda(module: Any, operator_name: str, size_arguments: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
    """Calls the operator's kernel with workspace of the size that it asks for, on CuPy's current stream."""
    library = native()
    if not hasattr(library, f"{operator_name}_cuda"):
        raise RuntimeError(
            f"{operator_name}: got CuPy arrays, but this gingham was built without CUDA; "
            "rebuild it with GINGHAM_WITH_CUDA=ON and nvcc on PATH"
        )
    size = getattr(library, f"{operator_name}_cuda_workspace")(*size_arguments)
    workspace = module.empty(size, dtype=np.uint8)
    stream = module.cuda.get_current_stream().ptr
    getattr(library, f"{operator_name}_cuda")(*arguments, workspace.data.ptr, stream)
