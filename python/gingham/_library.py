"""Finds and loads the native libraries, and says what they are."""

from __future__ import annotations

import functools
import importlib
import platform
import sys
from pathlib import Path
from typing import Any

from gingham.errors import SettingError


class NativeLibraryError(ImportError):
    """The compiled part of Gingham is missing or does not fit this machine."""


@functools.cache
def native() -> Any:
    """The pybind11 module, which needs no torch.

    Raises:
        NativeLibraryError: it is missing or cannot be loaded; the text says what to do.
    """
    try:
        return importlib.import_module("gingham._native")
    except ImportError as error:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise NativeLibraryError(
            f"gingham's native library cannot be loaded ({error}). It is compiled for one Python version and platform; "
            f"this is Python {python} on {platform.system()} {platform.machine()}. Reinstall it here with "
            "'pip install --force-reinstall --no-deps gingham' or, from a clone, 'pip install .'"
        ) from error


@functools.cache
def load_torch_operators() -> None:
    """Registers ``torch.ops.gingham`` with the torch that is imported.

    Raises:
        NativeLibraryError: the library is missing, or torch is older than 2.10.
    """
    import torch

    # Beside the module and not beside this file: an editable install keeps its libraries elsewhere.
    path = Path(str(native().__file__)).with_name("libgingham_torch.so")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise NativeLibraryError(
            f"gingham's operators cannot be loaded into torch {torch.__version__}: {error}. "
            "Gingham needs torch 2.10 or newer ('pip install --upgrade torch') and the libraries of its own wheel "
            "('pip install --force-reinstall --no-deps gingham')"
        ) from error


def info() -> dict[str, str]:
    """Version, commit, compiler, instruction sets, CUDA architectures, and what torch sees of the operators.

    Raises:
        NativeLibraryError: the native library is missing or cannot be loaded.
        SettingError: ``GINGHAM_CPU`` names an instruction set that is unknown or that this machine has not.

    Example:
        >>> from gingham import info
        >>> info()["torch operators"]
        'registered'
    """
    library = native()
    available = ", ".join(library.available_instruction_sets())
    try:
        instruction_set = library.instruction_set()
    except RuntimeError as error:
        raise SettingError(f"{error}; available on this machine: {available}") from error
    report = {
        "version": library.version,
        "git commit": library.git_commit,
        "compiler": library.compiler,
        "instruction set": instruction_set,
        "instruction sets available": available,
        "cuda architectures": library.cuda_architectures or "none (built without CUDA)",
        "python": platform.python_version(),
    }
    try:
        import torch
    except ImportError:
        report["torch"] = "not installed"
        return report
    report["torch"] = torch.__version__
    try:
        load_torch_operators()
        report["torch operators"] = "registered"
    except NativeLibraryError as error:
        report["torch operators"] = f"not registered: {error}"
    report["cuda device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return report
