"""Gingham: native C++/CUDA operators of visual recognition, and the methods built on them.

Parts load on first use: `gingham.ops`, `gingham.nn`, `gingham.array`, `gingham.reference`, `gingham.data`,
`gingham.metrics`, `gingham.methods`, and the functions `create_model`, `list_models`, `model_class` and `info`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gingham import array, data, methods, metrics, nn, ops, reference
    from gingham._library import info
    from gingham.models import create_model, list_models, model_class

__version__ = "0.1.0"

_PARTS = ("array", "bench", "cli", "data", "errors", "methods", "metrics", "models", "nn", "ops", "reference")
_HOME = {"create_model": "models", "list_models": "models", "model_class": "models", "info": "_library"}

__all__ = [
    "array",
    "create_model",
    "data",
    "info",
    "list_models",
    "methods",
    "metrics",
    "model_class",
    "nn",
    "ops",
    "reference",
]


def __getattr__(name: str) -> object:
    if name in _PARTS:
        return importlib.import_module(f"gingham.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"gingham.{_HOME[name]}"), name)
    raise AttributeError(f"module 'gingham' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
