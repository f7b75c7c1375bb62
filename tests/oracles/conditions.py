"""Conditions that tests run under: a number of threads, another process with its own environment."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs with that many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_python(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script with these arguments, and environment variables beside the present ones."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def kernels_of(instruction_set: str, dtypes: Sequence[torch.dtype]) -> list[torch.dtype]:
    """Those of the types that the instruction set has kernels of its own for; the others are left to avx512."""
    of_bfloat16 = instruction_set in ("avx512_bf16", "amx")
    return [dtype for dtype in dtypes if not of_bfloat16 or dtype == torch.bfloat16]
