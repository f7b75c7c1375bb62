"""Random calls of every operator, well-formed and malformed, in processes that may die.

    python tools/fuzz_operators.py --calls 20000
    python tools/fuzz_operators.py --seed 0 --replay 1234    # one call again, in this process

A well-formed call must end in results of the right shapes and dtypes, a malformed one in these or in a TypeError or
ValueError (of the raw operators in torch.ops.gingham also a RuntimeError) whose text names the operator. Anything else,
a crash or a call without an end among it, is a failure: it is printed with the line that replays it, and the exit code
is 1. Where a call asks for more memory than a worker may have, running out of it is no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import inspect
import json
import math
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_arguments import TARGETS, Arguments, Draw, Expected, Target, as_array, size_of, spoil
from torch import Tensor

import gingham.array
import gingham.ops

MEMORY = 2**30  # bytes that a worker may take beyond what it has when it starts
LONGEST_CALL = 60.0  # seconds
HUGE = 2**32  # bytes of arguments, where nothing of them is shared, that may take longer: those are left after a while
MOST_FAILURES = 20  # after which the rest is not tried


# ------------------------------------------------------------------------------------------------ a call and its end


class Failure(Exception):
    """The call did not end as it must."""


def describe(value: Any) -> str:
    """An argument in a report."""
    if isinstance(value, Tensor):
        layout = str(value.layout).removeprefix("torch.")
        if value.is_nested or value.layout != torch.strided:
            return f"tensor({layout}, {value.dtype})"
        grad = ", requires_grad" if value.requires_grad else ""
        return f"tensor({list(value.shape)}, {value.dtype}, strides {list(value.stride())}, {value.device}{grad})"
    if isinstance(value, np.ndarray):
        return f"array({list(value.shape)}, {value.dtype}, strides {list(value.strides)}, {type(value).__name__})"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(describe(x) for x in value[:4]) + (", ..." if len(value) > 4 else "") + "]"
    if isinstance(value, int) and abs(value) > 10**30:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)[:80]


def asks_for_much(target: Target, arguments: Arguments) -> bool:
    """Whether the arguments explain that memory ran out."""
    total = sum(size_of(x) for x in arguments.values())
    with contextlib.suppress(Exception):
        total += sum(8.0 * math.prod(float(e) for e in shape) for shape, _ in target.results(**arguments))
    numbers = [x for value in arguments.values() for x in (value if isinstance(value, (list, tuple)) else [value])]
    return total > MEMORY / 128 or any(isinstance(x, int) and abs(x) > 2**20 for x in numbers)


def is_shortage(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or any(
        words in text
        for words in (
            "allocate",
            "bad_alloc",
            "enough memory",
            "overflowed",
            "array is too big",
            "temporarily unavailable",
        )
    )


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def check_results(results: Any, expected: Expected, *, compare_dtypes: bool = True) -> None:
    found = results if isinstance(results, (tuple, list)) else (results,)
    if len(found) != len(expected):
        raise Failure(f"{len(found)} results instead of {len(expected)}")
    for i, (result, (shape, dtype)) in enumerate(zip(found, expected, strict=True)):
        if not isinstance(result, (Tensor, np.ndarray)):
            raise Failure(f"result {i} is a {type(result).__name__}")
        if tuple(result.shape) != tuple(shape):
            raise Failure(f"result {i} has the shape {tuple(result.shape)} instead of {tuple(shape)}")
        if compare_dtypes and dtype_name(result.dtype) != dtype_name(dtype):
            raise Failure(f"result {i} is {result.dtype} instead of {dtype}")


def must_name(operator: str, error: BaseException, kinds: tuple[type[BaseException], ...]) -> None:
    if not isinstance(error, kinds):
        raise Failure(f"{type(error).__name__}: {str(error)[:300]}") from error
    if operator not in str(error):
        raise Failure(f"{type(error).__name__} does not name the operator: {str(error)[:300]}") from error


def all_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from all_tensors(x)


@dataclass
class Call:
    name: str
    arguments: Arguments
    spoilt: bool
    run: Callable[[], None]

    def text(self) -> str:
        return f"{self.name}({', '.join(f'{name}={describe(x)}' for name, x in self.arguments.items())})"


def _spoil_some(draw: Draw, arguments: Arguments, *, arrays: bool = False) -> bool:
    spoilt = draw.likely(0.65)
    for _ in range(draw.choice([1, 1, 1, 2, 3]) if spoilt else 0):
        name = draw.choice(list(arguments))
        arguments[name] = spoil(draw, arguments[name], arrays=arrays)
    return spoilt


def call_of_function(draw: Draw, name: str) -> Call:
    target, function = TARGETS[name], getattr(gingham.ops, name)
    arguments = target.draw(draw)
    names = inspect.signature(function).parameters
    arguments = {key: value for key, value in arguments.items() if key in names}
    for key, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point() and draw.likely(0.2):
            arguments[key] = value.detach().requires_grad_()
    spoilt = _spoil_some(draw, arguments)
    context = draw.choice(["none"] * 12 + ["autocast", "no_grad", "inference"])

    def run() -> None:
        contexts: dict[str, Callable[[], Any]] = {
            "none": contextlib.nullcontext,
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
            "no_grad": torch.no_grad,
            "inference": torch.inference_mode,
        }
        try:
            with contexts[context]():
                results = function(**arguments)
        except Exception as error:
            if is_shortage(error) and asks_for_much(target, arguments):
                return
            if not spoilt:
                raise Failure(f"a well-formed call raises {type(error).__name__}: {str(error)[:300]}") from error
            return must_name(name, error, (TypeError, ValueError))
        check_results(results, target.results(**arguments), compare_dtypes=context != "autocast")
        differentiable = [x for x in all_tensors(results) if x.requires_grad]
        leaves = [x for x in all_tensors(list(arguments.values())) if x.requires_grad]
        if differentiable and leaves and not any(x.is_meta for x in leaves):
            try:
                total = torch.stack([x.double().sum() for x in differentiable]).sum()
                gradients = torch.autograd.grad(total, leaves, allow_unused=True)
            except (RuntimeError, MemoryError) as error:
                if is_shortage(error) and asks_for_much(target, arguments):
                    return
                raise Failure(f"backward raises {type(error).__name__}: {str(error)[:300]}") from error
            for leaf, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None and gradient.shape != leaf.shape:
                    raise Failure(f"a gradient has the shape {list(gradient.shape)} instead of {list(leaf.shape)}")

    return Call(f"gingham.ops.{name}", arguments | ({"context": context} if context != "none" else {}), spoilt, run)


def call_on_arrays(draw: Draw, name: str) -> Call:
    target, function = TARGETS[name], getattr(gingham.array, name)
    arguments = target.draw(draw)
    while any(isinstance(value, list) for value in arguments.values()):  # these are for tensors alone
        arguments = target.draw(draw)
    names = inspect.signature(function).parameters
    arguments = {key: as_array(value) for key, value in arguments.items() if key in names}
    if draw.likely(0.4):
        arguments["threads"] = draw.choice([1, 2, 3, 7, None])
    if "out" in names and draw.likely(0.3):
        ((shape, dtype),) = target.results(**{k: as_tensor(v) for k, v in arguments.items()})
        arguments["out"] = as_array(draw.tensor(shape, dtype).clone())
    spoilt = _spoil_some(draw, arguments, arrays=True)

    def run() -> None:
        try:
            results = function(**arguments)
        except Exception as error:
            if is_shortage(error) and asks_for_much(target, arguments):
                return
            if not spoilt:
                raise Failure(f"a well-formed call raises {type(error).__name__}: {str(error)[:300]}") from error
            return must_name(name, error, (TypeError, ValueError))
        expected = target.results(**{key: as_tensor(value) for key, value in arguments.items()})
        check_results(results, expected)
        if arguments.get("out") is not None and results is not arguments["out"]:
            raise Failure("the result is not out")

    return Call(f"gingham.array.{name}", arguments, spoilt, run)


def as_tensor(value: Any) -> Any:
    """Shape and dtype of an array as those of a tensor without data."""
    if isinstance(value, np.ndarray) and hasattr(torch, value.dtype.name):
        return torch.empty(value.shape, dtype=getattr(torch, value.dtype.name), device="meta")
    return value


def raw_operators() -> list[str]:
    """Those registered, but for the halves of pairs that only differ in an underscore."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.removeprefix("gingham::") for name in names if name.startswith("gingham::")})


def target_of(name: str) -> str:
    """The function that a raw operator belongs to: the longest that its name begins with."""
    return max((target for target in TARGETS if name.removeprefix("_").startswith(target)), key=len)


def call_of_raw(draw: Draw, name: str) -> Call:
    operator = getattr(torch.ops.gingham, name).default
    backward = name.endswith("_backward")
    public = target_of(name)
    target = TARGETS[public]
    schema = [argument.name for argument in operator._schema.arguments]
    forward_arguments = target.raw(target.draw(draw))
    if backward:
        forward = getattr(torch.ops.gingham, name.removeprefix("_").removesuffix("_backward")).default
        taken = {argument.name for argument in forward._schema.arguments}
        with torch.no_grad():
            outputs = forward(**{key: value for key, value in forward_arguments.items() if key in taken})
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        kinds = {argument.name: str(argument.type) for argument in operator._schema.arguments}
        kept = [key for key in schema if key not in taken and kinds[key] == "Tensor" and not key.startswith("grad_")]
        arguments: Arguments = {}
        for i, key in zip(target.gradients or (), (k for k in schema if k.startswith("grad_")), strict=False):
            arguments[key] = draw.laid_out(torch.ones_like(outputs[i]))
        arguments |= dict(zip(kept, outputs[len(outputs) - len(kept) :], strict=True))
        arguments |= {key: value for key, value in forward_arguments.items() if key in schema}
        if "wanted" in schema:
            tensors = [arguments[key] for key in schema if key in taken and isinstance(arguments.get(key), Tensor)]
            arguments["wanted"] = sum(
                1 << i for i, x in enumerate(tensors) if x.is_floating_point() and draw.likely(0.7)
            )
    else:
        arguments = {key: value for key, value in forward_arguments.items() if key in schema}
    spoilt = _spoil_some(draw, arguments)
    for argument in operator._schema.arguments:  # a tensor for a number is torch's to refuse, or to read
        if "Tensor" not in str(argument.type) and isinstance(arguments.get(argument.name), Tensor):
            arguments[argument.name] = None

    def run() -> None:
        try:
            with torch.no_grad():
                results = operator(**arguments)
        except Exception as error:
            if is_shortage(error) and (asks_for_much(target, arguments) or asks_for_much(target, forward_arguments)):
                return
            if not spoilt:
                raise Failure(f"a well-formed call raises {type(error).__name__}: {str(error)[:300]}") from error
            # The dispatcher lets None through for a tensor: enough if that raises at all.
            if not any(value is None for value in arguments.values()):
                must_name(public, error, (TypeError, ValueError, RuntimeError))
            return
        found = results if isinstance(results, (tuple, list)) else (results,)
        if not all(isinstance(x, Tensor) for x in found):
            raise Failure("a result is no tensor")

    return Call(f"torch.ops.gingham.{name}", arguments, spoilt, run)


def draw_call(seed: int, index: int) -> Call:
    """The call number `index` of a seed."""
    warnings.simplefilter("ignore")
    draw = Draw(f"{seed}.{index}")
    kinds = [(call_of_function, gingham.ops.__all__)] * 4 + [(call_on_arrays, gingham.array.__all__)] * 3
    make, names = draw.choice([*kinds, *[(call_of_raw, raw_operators())] * 3])
    return make(draw, draw.choice(sorted(names)))


def outcome(call: Call) -> str | None:
    """What is wrong with how the call ended; None when nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call.run()
        except Failure as failure:
            return str(failure)
        except Exception as error:
            return f"{type(error).__name__} from what the result was checked against: {error}"
    return None


# ------------------------------------------------------------------------------------------------ processes


def work(seed: int, begin: int, end: int, step: int) -> None:
    """A worker: says on standard output what it begins, and how it ended where it failed."""
    faulthandler.enable()
    torch.set_num_threads(2)
    torch.ones(1 << 16).add(1).sum()  # starts torch's threads, whose stacks are not to count
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for index in range(begin, end, step):
        print(json.dumps({"begin": index}), flush=True)
        call = draw_call(seed, index)
        huge = sum(size_of(x) for x in call.arguments.values()) > HUGE
        print(json.dumps({"call": call.text(), "huge": huge}), flush=True)
        failure = outcome(call)
        if failure is not None:
            print(json.dumps({"failed": index, "what": failure, "call": call.text()}), flush=True)
    print(json.dumps({"begin": None}), flush=True)


class Worker:
    """A process that takes every `step`-th call, and another one from where it died."""

    def __init__(self, seed: int, begin: int, end: int, step: int) -> None:
        self.seed, self.end, self.step = seed, end, step
        self.current: int | None = begin
        self.call, self.huge = "", False
        self.start(begin)

    def start(self, begin: int) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close
        words = ["--seed", str(self.seed), "--worker", str(begin), str(self.end), str(self.step)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words], stdout=subprocess.PIPE, stderr=self.errors, bufsize=0
        )
        self.buffer, self.heard = b"", time.monotonic()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self.errors.close()

    def listen(self) -> Iterator[dict[str, Any]]:
        """What the worker says next; its death too."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], 0.05)[0]:
            waited = time.monotonic() - self.heard
            if self.huge and waited > LONGEST_CALL / 10:
                self.lost("no end, which takes its time")
            elif waited > LONGEST_CALL:
                yield self.lost(f"no end within {LONGEST_CALL:.0f} s")
            return
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        self.heard = time.monotonic()
        if not data:
            code = self.process.wait()
            if self.current is not None:
                yield self.lost(f"the process died: exit code {code}")
            return
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            said = json.loads(line)
            if "begin" in said:
                self.current, self.call, self.huge = said["begin"], "a call that was not drawn to its end", False
            elif "failed" not in said:
                self.call, self.huge = said["call"], said["huge"]
            else:
                yield said

    def lost(self, what: str) -> dict[str, Any]:
        """A failure of the present call, and a new process for those after it."""
        index = self.current
        assert index is not None
        self.errors.seek(0)
        tail = self.errors.read()[-2000:].decode(errors="replace").strip()
        self.close()
        self.current = index + self.step if index + self.step < self.end else None
        if self.current is not None:
            self.start(self.current)
        return {"failed": index, "what": f"{what}\n{tail}", "call": self.call}


def fuzz(seed: int, calls: int, workers: int) -> int:
    """Makes the calls in that many processes; returns the exit code."""
    began = time.monotonic()
    pool = [Worker(seed, i, calls, workers) for i in range(min(workers, calls))]
    failures = 0
    try:
        while any(worker.current is not None for worker in pool) and failures < MOST_FAILURES:
            for worker in pool:
                if worker.current is None:
                    continue
                for failure in worker.listen():
                    failures += 1
                    print(f"FAILED {failure['call']}\n  {failure['what']}")
                    print(f"  python tools/fuzz_operators.py --seed {seed} --replay {failure['failed']}", flush=True)
    finally:
        for worker in pool:
            worker.close()
    seconds = time.monotonic() - began
    if failures >= MOST_FAILURES:
        print(f"{failures} failures; the rest was not tried")
    else:
        names = len(gingham.ops.__all__) + len(gingham.array.__all__) + len(raw_operators())
        print(f"{calls} calls of {names} functions in {seconds:.0f} s, {failures} failures")
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--replay", type=int, metavar="CALL", help="make this one call of the seed, here")
    parser.add_argument("--worker", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.seed, *options.worker)
        return 0
    if options.replay is not None:
        call = draw_call(options.seed, options.replay)
        print(call.text(), flush=True)
        faulthandler.enable()
        failure = outcome(call)
        print(failure or "ends as it must")
        return 1 if failure else 0
    return fuzz(options.seed, options.calls, max(1, options.workers))


if __name__ == "__main__":
    sys.exit(main())
