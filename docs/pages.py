"""What MkDocs builds the site of: the repository's own pages, and a page for each operator, method and package.

Pages keep the paths that they have in the repository, so that a link in a README leads to the same file on the site,
and a strict build finds those that lead nowhere. Nothing here names an operator or a method: new ones appear by
themselves.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# What pages may link to.
REPOSITORY = (
    "*.md",
    "LICENSE",
    "bench/**/*",
    "csrc/include/**/*.h",
    "docs/*.md",
    "docs/*.svg",
    "python/gingham/configs/*.yaml",
    "python/gingham/**/*.md",
    "python/gingham/**/*.py",
)
ROOMS = {
    "ops": "On tensors",
    "nn": "As a module",
    "array": "On NumPy and CuPy arrays",
    "reference": "What it is",
}
PACKAGES = {
    "models": "Networks by name",
    "nn": "Modules",
    "data": "Data sets",
    "metrics": "Metrics",
    "methods": "What methods share",
    "errors": "Errors",
}
BENCHMARKS = "docs/benchmarks.md"


def operators(root: Path) -> list[str]:
    """The names of all operators."""
    return sorted(file.stem for file in (root / "python/gingham/ops").glob("[!_]*.py"))


def methods(root: Path) -> list[str]:
    """The folders of all methods that have a README."""
    return sorted(file.parent.name for file in (root / "python/gingham/methods").glob("*/README.md"))


def exports(root: Path, room: str, operator: str) -> list[str]:
    """What a room exports of an operator's file."""
    tree = ast.parse((root / "python/gingham" / room / "__init__.py").read_text())
    module = f"gingham.{room}.{operator}"
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == module]
    return [name.name for node in imports for name in node.names]


def modules(root: Path, path: str) -> list[str]:
    """The public modules of a package, or the module itself, by their dotted names, methods and operators left out."""
    package = root / "python/gingham" / path
    files = sorted(package.rglob("*.py")) if package.is_dir() else [package.with_suffix(".py")]
    left_out = {*operators(root), *methods(root)} if path in ("nn", "methods") else set()
    names = []
    for file in files:
        inside = file.relative_to(root / "python").with_suffix("").parts
        if not any(part.startswith("_") or part in left_out for part in inside[1:]):
            names.append(".".join(inside))
    return names


def operator_page(root: Path, operator: str) -> str:
    """An operator in every room that it lives in, and what was measured of it."""
    parts = [f"# {operator}"]
    for room, title in ROOMS.items():
        names = exports(root, room, operator)
        if names:
            parts.append(f"## {title}")
        for name in names:
            options = {"heading": f"gingham.{room}.{name}", "show_source": room == "reference"}
            parts.append(directive(f"gingham.{room}.{operator}.{name}", **options))
    rows = measured(root, operator)
    if rows:
        more = f"All sizes, and on what they were measured: [Benchmarks](../{BENCHMARKS})."
        parts += ["## How fast it is", "\n".join(rows), more]
    return "\n\n".join(parts) + "\n"


def measured(root: Path, operator: str) -> list[str]:
    """The rows of the README's table of measurements that are about an operator, under the table's head."""
    lines = (root / "README.md").read_text().splitlines()
    table = lines[lines.index("<!-- bench:begin -->") + 1 : lines.index("<!-- bench:end -->")]
    rows = [line for line in table if line.startswith(f"| `{operator}` |")]
    return [*table[:2], *rows] if rows else []


def method_page(root: Path, method: str) -> str:
    """A method's README, and the reference of its folder."""
    readme = (root / "python/gingham/methods" / method / "README.md").read_text()
    return reference_page(readme.rstrip() + "\n\n## Reference", modules(root, f"methods/{method}"))


def reference_page(head: str, names: list[str]) -> str:
    """A page with the reference of these modules, under its head."""
    return "\n\n".join([head, *(directive(name) for name in names)]) + "\n"


def directive(name: str, **options: Any) -> str:
    """What mkdocstrings puts the documentation of an object for."""
    lines = [f"::: {name}", "    options:", "      heading_level: 3"]
    return "\n".join([*lines, *(f"      {option}: {json.dumps(value)}" for option, value in options.items())])


def pages(root: Path) -> dict[str, str]:
    """The pages that are written here, by their paths."""
    made = {f"operators/{name}.md": operator_page(root, name) for name in operators(root)}
    made |= {f"python/gingham/methods/{name}/README.md": method_page(root, name) for name in methods(root)}
    for path, title in PACKAGES.items():
        made[f"packages/{path}.md"] = reference_page(f"# {title}", modules(root, path))
    return made


def repository(root: Path) -> Iterator[str]:
    """The files of the repository that pages may link to."""
    for pattern in REPOSITORY:
        for file in root.glob(pattern):
            if file.is_file() and "__pycache__" not in file.parts:
                yield file.relative_to(root).as_posix()


def address(path: str) -> str | None:
    """Where a page appears on the site, if not where it lies in the repository."""
    parts = PurePosixPath(path)
    if parts.match("python/gingham/methods/*/README.md"):
        return f"methods/{parts.parent.name}/index.html"
    return "benchmarks/index.html" if path == BENCHMARKS else None


# ------------------------------------------------------------------------------------------------ called by MkDocs


def on_config(config: MkDocsConfig) -> None:
    """Lists the pages."""
    config.nav = [
        "README.md",
        {"Operators": [f"operators/{name}.md" for name in operators(ROOT)]},
        {"Methods": [f"python/gingham/methods/{name}/README.md" for name in methods(ROOT)]},
        {"Packages": [f"packages/{path}.md" for path in PACKAGES]},
        {"Measurements": ["bench/README.md", BENCHMARKS]},
    ]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Puts the repository's files and the pages written here in the place of those of `docs_dir`."""
    from mkdocs.structure.files import File

    def add(path: str, **content: str) -> None:
        file: File = File.generated(config, path, **content)
        file.dest_uri = address(path) or file.dest_uri
        files.append(file)

    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    made = pages(ROOT)
    for path in sorted({*repository(ROOT)} - made.keys()):
        add(path, abs_src_path=str(ROOT / path))
    for path, text in made.items():
        add(path, content=text)
