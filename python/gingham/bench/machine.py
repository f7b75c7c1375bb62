"""The machine that measures: what it is, and what it can do at best."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gingham.bench.results import Yardstick

_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def _cpu_fields() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _build() -> dict[str, str]:
    """Version, commit and instruction set of the native library; without it, the bench times the peers alone."""
    from gingham import __version__
    from gingham._library import NativeLibraryError, info

    try:
        report = info()
    except NativeLibraryError:
        return {"gingham": f"{__version__} without its native library"}
    return {"gingham": __version__, "commit": report["git commit"], "instruction set in use": report["instruction set"]}


def describe(device: torch.device) -> dict[str, str]:
    """Model, cores, instruction sets and versions, for the head of a report."""
    fields = _cpu_fields()
    flags = fields.get("flags", "").split()
    model = fields.get("model name", platform.processor() or platform.machine())
    if "cpu family" in fields:
        model += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    machine = {
        "cpu": model,
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "instruction sets": " ".join(name for name in _INSTRUCTION_SETS if name in flags) or "baseline",
        **_build(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if "GINGHAM_CPU" in os.environ:
        machine["GINGHAM_CPU"] = os.environ["GINGHAM_CPU"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        machine["cuda"] = str(torch.version.cuda)
    return machine


def load_warning() -> str | None:
    """A sentence when other programs keep the processor busy: with them, two threads can be slower than one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < 0.5 * cores:
        return None
    return (
        f"the machine was busy when the run began (load average {load:.1f} on {cores} cores): do not trust the figures"
    )


def cache_bytes(device: torch.device) -> int:
    """Size of the largest cache that inputs could stay in from one call to the next."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [32 * 2**20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * (2**10 if text.endswith("K") else 2**20))
    return max(sizes)


def clock(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes; on a GPU, between events on the current stream."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Keeps the device busy while the launches queue up, so that gaps between them are not counted.
        torch.cuda._sleep(2_000_000)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure_yardstick(dtype: torch.dtype, threads: int, device: torch.device, *, rounds: int = 5) -> Yardstick:
    """Time a large matrix product and a large copy, with torch's current number of threads."""
    size = 2048 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.zeros(2**28 if device.type == "cpu" else 2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def median(call: Callable[[], object]) -> float:
        call()
        return statistics.median(clock(call, device) for _ in range(rounds))

    matmul = 2 * size**3 / median(lambda: torch.mm(left, right, out=product))
    copy = 2 * source.numel() / median(lambda: target.copy_(source))
    return Yardstick(str(dtype).removeprefix("torch."), threads, matmul, copy)
