"""Shows the examples of docstrings as code: Griffe knows sections named "Examples" only."""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Names every section "Example" of a docstring "Examples"."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
