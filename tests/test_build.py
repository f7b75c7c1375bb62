"""What is built and installed: the native libraries, what they say of themselves, and what importing them pulls in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gingham
from gingham._library import native

SOURCES = Path(__file__).parents[1]
SHIM = SOURCES / "csrc" / "torch" / "shim.h"


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_info_says_what_was_built_and_what_runs() -> None:
    info = gingham.info()
    assert set(info) == {
        "version",
        "git commit",
        "compiler",
        "instruction set",
        "instruction sets available",
        "cuda architectures",
        "python",
        "torch",
        "torch operators",
        "cuda device",
    }
    assert info["version"] == gingham.__version__
    assert info["instruction set"] in info["instruction sets available"].split(", ")
    assert info["instruction sets available"].startswith("baseline")
    assert info["torch"] == torch.__version__
    assert info["torch operators"] == "registered"
    assert all(info.values())


def test_instruction_set_by_environment() -> None:
    finished = run_python("import gingham; print(gingham.info()['instruction set'])", GINGHAM_CPU="baseline")
    assert finished.stdout.strip() == "baseline", finished.stderr


def test_import_is_light() -> None:
    heavy = "('torch', 'lightning', 'matplotlib', 'torchvision', 'timm', 'numpy')"
    finished = run_python(f"import sys, gingham; print([name for name in {heavy} if name in sys.modules])")
    assert finished.stdout.strip() == "[]", finished.stderr


def test_operators_import_only_torch() -> None:
    heavy = "('lightning', 'matplotlib', 'torchvision', 'timm', 'torchmetrics', 'triton')"
    finished = run_python(f"import sys, gingham.ops; print([name for name in {heavy} if name in sys.modules])")
    assert finished.stdout.strip() == "[]", finished.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'gingham' has no attribute 'nonsense'"):
        _ = gingham.nonsense


BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "gingham._native":
            raise ImportError("no such file")

sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.parametrize(
    "use", ["import gingham.ops", "import gingham; gingham.info()", "import gingham._library as m; m.native()"]
)
def test_a_missing_native_library_says_what_to_do(use: str) -> None:
    finished = run_python(BLOCK + use)
    assert finished.returncode == 1
    last = finished.stderr.strip().splitlines()[-1]
    assert re.search(r"NativeLibraryError: gingham's native library cannot be loaded \(no such file\)", last), last
    assert f"this is Python {sys.version_info.major}.{sys.version_info.minor} on " in last
    assert "pip install --force-reinstall --no-deps gingham" in last


def test_the_plain_pytorch_parts_need_no_native_library() -> None:
    script = BLOCK + (
        "import torch, gingham\n"
        "x = torch.ones(1, 2, 3, 4)\n"
        "assert gingham.reference.criss_cross_attention(x, x, x).sum() == 24\n"
    )
    finished = run_python(script)
    assert finished.returncode == 0, finished.stderr


def test_torch_symbols_are_those_that_the_shim_declares() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm on PATH")
    if not SHIM.exists():
        pytest.skip("needs the sources")
    library = Path(str(native().__file__)).with_name("libgingham_torch.so")
    listing = subprocess.run([nm, "-D", "-C", library], capture_output=True, text=True, check=True).stdout
    undefined = set(re.findall(r"^\s+[Uw] (.+?)(?:@.*)?$", listing, flags=re.MULTILINE))
    torch_symbols = {name for name in undefined if re.search(r"torch|c10|\bat::", name)}
    declared = set(re.findall(r"\b(?:aoti_)?torch_\w+(?=\()", SHIM.read_text()))
    assert "torch_get_const_data_ptr" in torch_symbols
    assert torch_symbols <= declared


def test_the_native_module_knows_neither_torch_nor_cuda() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm on PATH")
    listing = subprocess.run(
        [nm, "-D", "-C", str(native().__file__)], capture_output=True, text=True, check=True
    ).stdout
    assert not re.search(r" U .*(torch|c10::)", listing)


def test_objects_of_an_instruction_set_share_no_code_with_others() -> None:
    """What is visible beyond one such object is in a namespace of its own.

    Of functions with one name, such as the standard library's inline ones, the linker keeps any one for all: of AVX-512
    perhaps, for machines that do not have it.
    """
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm on PATH")
    objects = []
    for path in (SOURCES / "build").glob("*/CMakeFiles/*.dir/csrc/cpu/*.o"):
        target, source = path.parents[2].name.removesuffix(".dir"), path.name.partition(".")[0]
        if target.startswith(f"{source}_"):
            objects.append((path, target.removeprefix(f"{source}_")))
    if not objects:
        pytest.skip("needs the objects of a build in the sources")
    for path, instruction_set in objects:
        listing = subprocess.run([nm, "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        visible = re.findall(r"^[0-9a-f]+ [A-Zuvw] (.*)", listing, flags=re.MULTILINE)
        own = f"gingham::cpu::{instruction_set}::"
        assert any(name.startswith(f"{own}run(") for name in visible), path
        assert [name for name in visible if not name.startswith(own)] == [], path


def test_the_commit_is_that_of_the_sources(tmp_path: Path) -> None:
    cmake, git = shutil.which("cmake"), shutil.which("git")
    if cmake is None or git is None or not SHIM.exists():
        pytest.skip("needs cmake, git and the sources")
    unpacked = tmp_path / "gingham-0.1.0"
    unpacked.mkdir()

    def run(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    def commit_of(folder: Path) -> str:
        script = tmp_path / "say.cmake"
        script.write_text(
            f'set(CMAKE_CURRENT_SOURCE_DIR "{folder}")\n'
            f'include("{SOURCES / "cmake" / "BuildInfo.cmake"}")\n'
            'file(WRITE "said" "${commit}")\n'
        )
        run(cmake, "-P", str(script))
        return (tmp_path / "said").read_text()

    run(git, "init", "--quiet")
    nobody = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")
    run(git, *nobody, "commit", "--quiet", "--allow-empty", "--message", "first")
    commit = run(git, "rev-parse", "--short=12", "HEAD")
    assert commit_of(tmp_path) == commit
    assert commit_of(unpacked) == "unknown"  # of the release, whatever it was unpacked in
    (tmp_path / "changed").touch()
    run(git, "add", "changed")
    assert commit_of(tmp_path) == f"{commit}-dirty"
