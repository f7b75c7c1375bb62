"""A few hundred of the random calls of `make fuzz`, and that the fuzzer sees what it is there to see."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import gingham.array
import gingham.ops

SCRIPT = Path(__file__).parents[1] / "tools" / "fuzz_operators.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of its processes as Linux does")


@pytest.fixture
def fuzzer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    specification = importlib.util.spec_from_file_location("fuzz_operators", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "fuzz_operators", module)
    specification.loader.exec_module(module)
    return module


def test_random_calls_end_as_they_must() -> None:
    command = [sys.executable, str(SCRIPT), "--calls", "500", "--seed", "1", "--workers", "2"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert re.search(r"500 calls of \d+ functions in \d+ s, 0 failures", finished.stdout)


def test_every_function_has_arguments_drawn_for_it(fuzzer: ModuleType) -> None:
    assert set(gingham.ops.__all__) | set(gingham.array.__all__) <= set(fuzzer.TARGETS)
    assert {fuzzer.target_of(name) for name in fuzzer.raw_operators()} <= set(fuzzer.TARGETS)


def test_a_call_is_the_same_again(fuzzer: ModuleType) -> None:
    texts = [fuzzer.draw_call(3, index).text() for index in range(40)]
    assert texts == [fuzzer.draw_call(3, index).text() for index in range(40)]
    assert len(set(texts)) == 40


PRETENDED = {
    "a crash": ("import ctypes; ctypes.string_at(0)", "the process died: exit code -11"),
    "another exception": ("raise KeyError('q')", "KeyError"),
    "no name": ("raise ValueError('no')", "does not name the operator"),
    "a wrong shape": ("return features", "result 0 has the shape"),
    "no end": ("import time; time.sleep(100)", "no end within 3 s"),
}

PRETENCE = """
import sys
sys.path.insert(0, {folder!r})
import fuzz_operators

def cosine_similarity_map(features, prototypes, *, eps=1e-8, torch_compat=False):
    {body}

fuzz_operators.gingham.ops.cosine_similarity_map = cosine_similarity_map
fuzz_operators.gingham.ops.__all__ = ["cosine_similarity_map"]
fuzz_operators.gingham.array.__all__ = ["cosine_similarity_map"]
fuzz_operators.LONGEST_CALL = {longest}
fuzz_operators.MOST_FAILURES = {most}
fuzz_operators.__file__ = __file__
sys.exit(fuzz_operators.main())
"""


@pytest.mark.parametrize("kind", PRETENDED)
def test_what_ends_otherwise_is_reported_with_the_line_that_replays_it(kind: str, tmp_path: Path) -> None:
    body, report = PRETENDED[kind]
    script = tmp_path / "pretend.py"
    most = 2 if kind in ("a crash", "no end") else 20
    longest = 3.0 if kind == "no end" else 60.0  # the worker's start is in it, which a busy machine makes long
    script.write_text(PRETENCE.format(folder=str(SCRIPT.parent), body=body, most=most, longest=longest))
    command = [sys.executable, str(script), "--calls", "60", "--workers", "1"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert report in finished.stdout
    replay = re.search(r"--seed (\d+) --replay (\d+)", finished.stdout)
    assert replay
    if kind != "no end":
        again = [sys.executable, str(script), "--seed", replay[1], "--replay", replay[2]]
        replayed = subprocess.run(again, capture_output=True, text=True, timeout=120, check=False)
        assert replayed.returncode != 0
        assert "gingham.ops.cosine_similarity_map(" in replayed.stdout
