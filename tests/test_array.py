"""gingham.array: the operators on NumPy arrays, without torch."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gingham.array import criss_cross_attention
from gingham.array._arrays import _may_overlap_itself
from oracles.dense_attention import dense_attention

Array = np.ndarray[Any, Any]

# Largest error, relative to the largest value: a few epsilons of the dtype.
BOUNDS = {
    np.dtype(np.float64): 1e-14,
    np.dtype(np.float32): 5e-6,
    np.dtype(np.float16): 2e-3,
    np.dtype(ml_dtypes.bfloat16): 2e-2,
}
DTYPES = list(BOUNDS)


def maps(
    *size: int, batch: int = 2, channels: tuple[int, int] = (5, 7), dtype: Any = np.float32, seed: int = 0
) -> list[Array]:
    """Query, key and value."""
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((batch, c, *size)).astype(dtype) for c in (channels[0], channels[0], channels[1])]


def exact(query: Array, key: Array, value: Array, scale: float = 1.0) -> Array:
    tensors = (torch.from_numpy(np.ascontiguousarray(x.astype(np.float64))) for x in (query, key, value))
    return dense_attention(*tensors, scale=scale).numpy()


def assert_agrees(got: Array, query: Array, key: Array, value: Array, scale: float = 1.0) -> None:
    assert got.shape == value.shape
    assert got.dtype == value.dtype
    bound = BOUNDS[value.dtype] * float(np.abs(value.astype(np.float64)).max(initial=0))
    error = np.abs(got.astype(np.float64) - exact(query, key, value, scale))
    assert bool((error <= bound).all()), f"off by {error.max()}, allowed are {bound}"


def contiguous(x: Array) -> Array:
    return np.ascontiguousarray(x)


def channels_last(x: Array) -> Array:
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def sliced(x: Array) -> Array:
    room = np.full([extent + 3 for extent in x.shape], np.nan, dtype=x.dtype)
    view = room[tuple(slice(1, 1 + extent) for extent in x.shape)]
    view[...] = x
    return view


def reversed_rows(x: Array) -> Array:
    return np.ascontiguousarray(x[..., ::-1, :])[..., ::-1, :]


def reversed_everywhere(x: Array) -> Array:
    backwards = (slice(None, None, -1),) * x.ndim
    return np.ascontiguousarray(x[backwards])[backwards]


def transposed(x: Array) -> Array:
    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)


def fortran(x: Array) -> Array:
    return np.asfortranarray(x)


def broadcast(x: Array) -> Array:
    return np.broadcast_to(x[:1, :1], x.shape)


def unaligned(x: Array) -> Array:
    """Elements that do not start at multiples of their size, as in packed records."""
    records = np.zeros(x.shape, dtype=[("pad", np.uint8), ("x", x.dtype)])
    records["x"] = x
    return records["x"]


def read_only(x: Array) -> Array:
    x.flags.writeable = False
    return x


LAYOUTS = [
    contiguous,
    channels_last,
    sliced,
    reversed_rows,
    reversed_everywhere,
    transposed,
    fortran,
    broadcast,
    unaligned,
    read_only,
]


def test_uniform_attention_gives_the_golden_values() -> None:
    value = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3)
    none = np.zeros((1, 2, 2, 3), dtype=np.float32)
    golden = [[1.5, 2.75, 4.0], [6.0, 7.25, 8.5]]
    np.testing.assert_allclose((criss_cross_attention(none, none, value) + value)[0, 0], golden, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(5, 6), (1, 7), (7, 1), (1, 1), (31, 33), (4, 5, 6), (1, 5, 6), (33, 2, 3)])
def test_agrees_with_dense_attention(size: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    arguments = maps(*size, dtype=dtype)
    assert_agrees(criss_cross_attention(*arguments, scale=0.5), *arguments, 0.5)


@settings(max_examples=150)
@given(data=st.data())
def test_agrees_with_dense_attention_whatever_the_arguments(data: st.DataObject) -> None:
    size = data.draw(
        st.lists(st.integers(1, 17), min_size=2, max_size=3).filter(lambda s: np.prod(s) <= 300), label="size"
    )
    plain = maps(
        *size,
        batch=data.draw(st.integers(1, 3), label="batch"),
        channels=data.draw(st.tuples(st.integers(1, 19), st.integers(1, 19)), label="channels"),
        dtype=data.draw(st.sampled_from(DTYPES), label="dtype"),
    )
    arguments = [data.draw(st.sampled_from(LAYOUTS), label="layout")(x) for x in plain]
    threads = data.draw(st.integers(1, 3), label="threads")
    assert_agrees(criss_cross_attention(*arguments, scale=0.5, threads=threads), *arguments, 0.5)


def test_agrees_with_the_torch_operator_bit_for_bit() -> None:
    from gingham.ops import criss_cross_attention as torch_attention

    arguments = maps(9, 33)
    expected = torch_attention(*(torch.from_numpy(x) for x in arguments)).numpy()
    assert np.array_equal(criss_cross_attention(*arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_no_bit(dtype: np.dtype[Any]) -> None:
    arguments = maps(17, 33, batch=3, dtype=dtype)
    alone = criss_cross_attention(*arguments, threads=1)
    for threads in (2, 3, 8, None):
        assert criss_cross_attention(*arguments, threads=threads).tobytes() == alone.tobytes()


def test_results_have_the_memory_order_of_value() -> None:
    query, key, value = maps(5, 6)
    assert criss_cross_attention(query, key, value).flags.c_contiguous
    assert np.moveaxis(criss_cross_attention(query, key, channels_last(value)), 1, -1).flags.c_contiguous


@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced, reversed_everywhere, transposed, unaligned])
@pytest.mark.parametrize("value_layout", [contiguous, channels_last])
def test_out_takes_the_result_and_nothing_beside_it(
    layout: Callable[[Array], Array], value_layout: Callable[[Array], Array]
) -> None:
    query, key, value = (value_layout(x) for x in maps(5, 6))
    out = layout(np.full_like(np.ascontiguousarray(value), np.nan))
    room = out
    while isinstance(room.base, np.ndarray):
        room = room.base
    assert criss_cross_attention(query, key, value, out=out) is out
    np.testing.assert_array_equal(out, criss_cross_attention(query, key, value))
    if layout is sliced:
        assert int(np.isfinite(room).sum()) == out.size


def test_empty_arrays() -> None:
    for batch, size, channels in ((0, (4, 5), (5, 7)), (2, (0, 5), (5, 7)), (2, (4, 0), (5, 7)), (2, (4, 5), (5, 0))):
        arguments = maps(*size, batch=batch, channels=channels)
        assert criss_cross_attention(*arguments).shape == arguments[2].shape
        assert criss_cross_attention(*arguments, out=np.empty_like(arguments[2])).shape == arguments[2].shape


def test_calls_from_several_threads_at_once() -> None:
    arguments = [maps(17, 16, seed=seed) for seed in range(8)]
    expected = [criss_cross_attention(*x, threads=1) for x in arguments]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = list(pool.map(lambda x: criss_cross_attention(*x, threads=2), arguments))
            assert all(np.array_equal(a, b) for a, b in zip(results, expected, strict=True))


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_needs_no_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"  # importing it now raises
        "import numpy as np, gingham\n"
        "x = np.ones((1, 2, 3, 4), dtype=np.float32)\n"
        "assert gingham.array.criss_cross_attention(x, x, x).sum() == 24\n"
        "assert gingham.info()['torch'] == 'not installed'\n"
    )
    finished = run_python(script)
    assert finished.returncode == 0, finished.stderr


def test_works_in_a_forked_child() -> None:
    script = (
        "import os, numpy as np\n"
        "from gingham.array import criss_cross_attention as f\n"
        "x = np.random.rand(4, 8, 17, 16)\n"
        "expected = f(x, x, x, threads=2)\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if np.array_equal(f(x, x, x, threads=2), expected) else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    finished = run_python(script)
    assert finished.returncode == 0, finished.stderr


def test_works_in_several_threads_of_a_forked_child() -> None:
    script = (
        "import os, threading, numpy as np\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from gingham.array import criss_cross_attention as f\n"
        "x = np.random.rand(4, 8, 17, 16)\n"
        "expected = f(x, x, x, threads=2)\n"
        "def works(barrier):\n"
        "    barrier.wait()\n"
        "    return np.array_equal(f(x, x, x, threads=2), expected)\n"
        "def child():\n"
        "    barrier = threading.Barrier(8)\n"
        "    with ThreadPoolExecutor(8) as pool: return all(pool.map(works, [barrier] * 8))\n"
        "for _ in range(20):\n"
        "    process = os.fork()\n"
        "    if process == 0: os._exit(0 if child() else 1)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0\n"
    )
    finished = run_python(script)
    assert finished.returncode == 0, finished.stderr


def test_threads_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = maps(5, 6)
    expected = criss_cross_attention(*arguments)
    monkeypatch.setenv("GINGHAM_NUM_THREADS", "2")
    assert np.array_equal(criss_cross_attention(*arguments), expected)
    for wrong in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv("GINGHAM_NUM_THREADS", wrong)
        with pytest.raises(ValueError, match=f"GINGHAM_NUM_THREADS must be a positive whole number, got '{wrong}'"):
            criss_cross_attention(*arguments)
        assert np.array_equal(criss_cross_attention(*arguments, threads=1), expected)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_wrong_threads(threads: Any) -> None:
    for batch in (0, 2):
        with pytest.raises(ValueError, match="threads must be a positive whole number, got"):
            criss_cross_attention(*maps(5, 6, batch=batch), threads=threads)


@pytest.mark.parametrize("threads", [10**6, 2**31, 10**30])
def test_more_threads_than_any_machine_has(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = maps(5, 6)
    expected = criss_cross_attention(*arguments)
    assert np.array_equal(criss_cross_attention(*arguments, threads=threads), expected)
    monkeypatch.setenv("GINGHAM_NUM_THREADS", str(threads))
    assert np.array_equal(criss_cross_attention(*arguments), expected)


def ones(*shape: int, dtype: Any = np.float32) -> Array:
    return np.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a NumPy or CuPy array, got list"),
        ({"value": torch.ones(2, 7, 4, 5)}, TypeError, "value must be a NumPy or CuPy array, got Tensor"),
        ({"query": ones(2, 5, 4, 5, dtype=np.int32)}, TypeError, "query must be float32.*got int32"),
        ({"query": ones(2, 5, 4, 5, dtype=">f4")}, TypeError, "query must be .* in the machine's byte order, got >f4"),
        ({"key": ones(2, 5, 4, 5, dtype=np.float64)}, TypeError, "key must have the dtype of query, got float64"),
        ({"query": ones(2, 5, 4)}, ValueError, r"query must be \[B, Ck, H, W\] or .*got shape \(2, 5, 4\)"),
        ({"query": ones(2, 0, 4, 5), "key": ones(2, 0, 4, 5)}, ValueError, "query must have at least one channel"),
        ({"key": ones(2, 6, 4, 5)}, ValueError, r"key must have the shape of query \(2, 5, 4, 5\), got \(2, 6, 4, 5\)"),
        ({"key": ones(2, 5, 5, 4)}, ValueError, "key must have the shape of query"),
        ({"value": ones(2, 7, 5, 4)}, ValueError, r"value must be \[2, Cv, 4, 5\] to match query"),
        ({"value": ones(1, 7, 4, 5)}, ValueError, r"value must be \[2, Cv, 4, 5\]"),
        ({"value": ones(2, 7, 1, 4, 5)}, ValueError, r"value must be \[2, Cv, 4, 5\]"),
        ({"out": ones(2, 6, 4, 5)}, ValueError, "out must have the shape of value"),
        ({"out": ones(2, 7, 4, 5, dtype=np.float64)}, TypeError, "out must have the dtype of query, got float64"),
        ({"out": read_only(ones(2, 7, 4, 5))}, ValueError, "out must be writeable"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"scale": np.ones(1)}, TypeError, "scale must be a number, got ndarray"),
        ({"scale": None}, TypeError, "scale must be a number, got NoneType"),
        ({"scale": 1j}, TypeError, "scale must be a number, got complex"),
        ({"scale": torch.tensor(1.0)}, TypeError, "scale must be a number, got Tensor"),
        ({"scale": 10**400}, ValueError, "scale must be in the range of float64"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(zip(("query", "key", "value"), maps(4, 5), strict=True)) | changes
    with pytest.raises(error, match=f"criss_cross_attention: {message}"):
        criss_cross_attention(**arguments)


@pytest.mark.parametrize("name", ["query", "key", "value", "out"])
def test_masked_arrays_are_refused(name: str) -> None:
    arguments = dict(zip(("query", "key", "value"), maps(4, 5), strict=True)) | {"out": ones(2, 7, 4, 5)}
    arguments[name] = np.ma.masked_greater(arguments[name], 0.5)
    with pytest.raises(TypeError, match=f"{name} must be an array without a mask, got MaskedArray"):
        criss_cross_attention(**arguments)


@pytest.mark.parametrize(
    "strides", [(0, 80, 20, 4), (560, 80, 16, 4), (560, 0, 20, 4), (140, 20, 5, 1), (-560, 80, -16, 4), (4, 4, 4, 4)]
)
def test_out_must_not_overlap_itself(strides: tuple[int, ...]) -> None:
    room = np.zeros(4000, dtype=np.uint8)[2000:].view(np.float32)
    out = np.lib.stride_tricks.as_strided(room, (2, 7, 4, 5), strides)
    with pytest.raises(ValueError, match="out must not overlap itself, got strides"):
        criss_cross_attention(*maps(4, 5), out=out)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-24, 24)), min_size=1, max_size=4))
def test_whether_an_array_overlaps_itself(axes: list[tuple[int, int]]) -> None:
    shape, strides = zip(*axes, strict=True)
    x = np.lib.stride_tricks.as_strided(np.zeros(800, dtype=np.uint8)[400:].view(np.float32), shape, strides)
    starts = sum(
        np.arange(extent).reshape(-1, *[1] * (len(axes) - 1 - axis)) * stride
        for axis, (extent, stride) in enumerate(axes)
    )
    addresses = np.sort(np.ravel(starts))
    if bool((np.diff(addresses) < x.itemsize).any()):
        assert _may_overlap_itself(x)
    order = np.argsort(np.abs(strides))
    nested = all(abs(strides[b]) >= abs(strides[a]) * shape[a] for a, b in itertools.pairwise(order))
    if not x.size or (nested and abs(strides[order[0]]) >= x.itemsize):
        assert not _may_overlap_itself(x)


def test_out_must_not_be_an_input() -> None:
    query, key, value = maps(4, 5)
    with pytest.raises(ValueError, match="out must share no memory with the inputs, got that of value"):
        criss_cross_attention(query, key, value, out=value)
    room = ones(2, 9, 4, 5)
    with pytest.raises(ValueError, match="out must share no memory with the inputs, got that of query"):
        criss_cross_attention(room[:, :5], key, value, out=room[:, 2:])


@pytest.mark.parametrize("order", [contiguous, channels_last])
@pytest.mark.parametrize(
    "part", [np.s_[:, 5:], np.s_[:, 5:, ::-1], np.s_[:, 10:4:-1]], ids=["after", "reversed rows", "reversed channels"]
)
def test_out_may_lie_beside_the_inputs_in_one_array(part: Any, order: Callable[[Array], Array]) -> None:
    room = order(ones(2, 11, 4, 5))
    room[:, :5] = maps(4, 5)[0]
    inputs, out = room[:, :5], room[part][:, :5]
    expected = criss_cross_attention(*(x.copy() for x in (inputs, inputs, inputs)))
    assert criss_cross_attention(inputs, inputs, inputs, out=out) is out
    np.testing.assert_array_equal(out, expected)


def test_out_is_refused_where_it_is_too_hard_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_hard(*_: Any, **__: Any) -> bool:
        raise np.exceptions.TooHardError

    monkeypatch.setattr(np, "shares_memory", too_hard)
    with pytest.raises(ValueError, match="out must share no memory with the inputs, got that of query"):
        criss_cross_attention(*maps(4, 5), out=ones(2, 7, 4, 5))


# ------------------------------------------------------------------------------------------------ CuPy


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_cupy_agrees_with_dense_attention(layout: Callable[[Array], Array], dtype: Any) -> None:
    cupy = pytest.importorskip("cupy")
    arrays = [layout(x) for x in maps(9, 14, dtype=dtype)]
    on_device = [cupy.asarray(x, order="K") for x in arrays]
    assert_agrees(criss_cross_attention(*on_device, scale=0.5).get(), *arrays, scale=0.5)
    out = cupy.full_like(on_device[2], np.nan)
    assert criss_cross_attention(*on_device, scale=0.5, out=out) is out
    assert_agrees(out.get(), *arrays, scale=0.5)


@pytest.mark.cuda
def test_cupy_runs_on_the_current_stream() -> None:
    cupy = pytest.importorskip("cupy")
    arrays = maps(33, 31)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        query, key, value = (cupy.asarray(x) * 2 for x in arrays)  # queued on the stream, as the operator must be
        got = criss_cross_attention(query, key, value)
    stream.synchronize()
    assert_agrees(got.get(), *(2 * x for x in arrays))


@pytest.mark.cuda
def test_cupy_takes_no_threads() -> None:
    cupy = pytest.importorskip("cupy")
    with pytest.raises(ValueError, match="threads must be None for CuPy arrays, got 2"):
        criss_cross_attention(*(cupy.asarray(x) for x in maps(4, 5)), threads=2)


@pytest.mark.cuda
def test_cupy_and_numpy_do_not_mix() -> None:
    cupy = pytest.importorskip("cupy")
    query, key, value = maps(4, 5)
    with pytest.raises(TypeError, match="the arrays must be all NumPy or all CuPy, got query numpy, key cupy"):
        criss_cross_attention(query, cupy.asarray(key), value)
    query, key, value = (cupy.asarray(x) for x in (query, key, value))
    with pytest.raises(ValueError, match="out must share no memory with the inputs, got that of value"):
        criss_cross_attention(query, key, value, out=value)
