"""Shows the examples and the outlines of docstrings as code: Griffe knows sections named "Examples" only."""

import re
from typing import Any

import griffe


class CodeSections(griffe.Extension):
    """Names every section "Example" of a docstring "Examples", and puts fences around the outlines of methods.

    An outline is a paragraph of a module's docstring with indented lines, such as "for each step:".
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_module(self, *, mod: griffe.Module, **_: Any) -> None:
        if mod.docstring is not None:
            paragraphs = re.split(r"\n\s*?\n", mod.docstring.value)
            mod.docstring.value = "\n\n".join(
                f"```text\n{text}\n```" if re.search(r"^ +\S", text, re.MULTILINE) else text for text in paragraphs
            )
