"""Peak of the memory that a call takes beyond its inputs, outputs and gradients, each peer in a process of its own.

On the CPU it is the process's peak resident size during the call (VmHWM of Linux, reset just before) less what was
resident before and less the results; on a GPU it is the caching allocator's peak.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from gingham.bench.definition import OURS, CannotRun, Case, Level, Operator, Pass, load_operator
from gingham.bench.measure import Setting, bind, draw, grad_mode
from gingham.bench.results import Memory

# Blocks above this size go back to the system when they are freed, so that the resident size is what is in use.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def _extra_bytes(operator: Operator, case: Case, peer: str, setting: Setting) -> int:
    run = bind(operator, operator.peer(peer).build(case, setting.device), setting.direction)
    arguments = draw(operator, case, setting, seed=0)
    on_gpu = setting.device.type == "cuda"

    def peak_of_one_call() -> int:
        gc.collect()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            results = run(arguments)
            peak = torch.cuda.max_memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            before = _status("VmRSS")
            results = run(arguments)
            peak = _status("VmHWM")
        return peak - before - sum(tensor.numel() * tensor.element_size() for tensor in results)

    with grad_mode(setting.direction):
        run(arguments)  # compiles what is compiled, and starts the threads
        # The least of a few: what the process does beside the call only adds.
        return max(0, min(peak_of_one_call() for _ in range(5)))


def measure_memory(operator: Operator, case: Case, setting: Setting, level: Level) -> list[Memory]:
    """Extra memory of Gingham's operator and of the baseline, for each pass of the case; of the rest above QUICK.

    Raises:
        CannotRun: on a system without Linux's /proc, when the device is the CPU.
    """
    if setting.device.type == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
        raise CannotRun("extra memory is measured on Linux only")
    peers = [OURS, operator.baseline]
    if level > Level.QUICK:
        peers += [peer.name for peer in operator.peers if peer.name not in peers and peer.operations is None]
    extra: dict[Pass, dict[str, int]] = {direction: {} for direction in case.passes}
    for peer in peers:
        request = {
            "operator": operator.name,
            "case": case.label,
            "peer": peer,
            "dtype": setting.dtype_name,
            "layout": setting.layout,
            "threads": setting.threads,
            "device": str(setting.device),
        }
        command = [sys.executable, "-m", "gingham.bench.memory", json.dumps(request)]
        finished = subprocess.run(command, capture_output=True, text=True, env=os.environ | _MALLOC, check=False)
        if finished.returncode == 0:
            for direction, size in json.loads(finished.stdout.splitlines()[-1]).items():
                extra[Pass(direction)][peer] = size
    name, layout, threads = setting.dtype_name, setting.layout, setting.threads
    return [
        Memory(case.label, name, layout, threads, direction.value, sizes, operator.baseline)
        for direction, sizes in extra.items()
        if sizes
    ]


def _answer(request: dict[str, str]) -> dict[str, int]:
    operator = load_operator(request["operator"])
    case = operator.case(request["case"])
    threads = int(request["threads"])
    torch.set_num_threads(threads)
    dtype, device = getattr(torch, request["dtype"]), torch.device(request["device"])
    return {
        direction.value: _extra_bytes(
            operator, case, request["peer"], Setting(dtype, request["layout"], threads, direction, device)
        )
        for direction in case.passes
    }


if __name__ == "__main__":
    print(json.dumps(_answer(json.loads(sys.argv[1]))))
