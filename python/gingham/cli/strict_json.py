"""Scores as JSON that every program reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def strict_json(content: Any) -> str:
    """Text of a report; a number that is not finite, such as one at a recall that was not reached, becomes null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: finite(entry) for name, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(content), indent=2, allow_nan=False) + "\n"
