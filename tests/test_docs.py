"""The site: that it has every operator and method, and that a link that leads nowhere stops its build."""

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("mkdocs", reason="the site needs the extra: pip install gingham[docs]")
pytest.importorskip("mkdocstrings", reason="the site needs the extra: pip install gingham[docs]")
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made() -> ModuleType:
    """docs/pages.py."""
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs/pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One operator and one method, with what the site of Gingham is built by."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    table = "<!-- bench:begin -->\n| operator | time |\n| --- | --- |\n| `twice` | 3 ms |\n<!-- bench:end -->\n"
    docstring = (
        '"""Doubles.\n\n    Args:\n        x: a number.\n\n    Example:\n        >>> twice(2)\n        4\n    """'
    )
    outline = '"""The moon.\n\nfor each night:\n    wax\n    wane\n\nThen a day.\n"""\n\n'
    contents = {
        "README.md": f"# Cloth\n\n[Moon](python/gingham/methods/moon/README.md)\n\n{table}",
        "bench/README.md": "# Measuring\n",
        "bench/results/moon/results.md": "Full.\n",
        "python/gingham/__init__.py": "",
        "python/gingham/models.py": "",
        "python/gingham/errors.py": "",
        "python/gingham/methods/__init__.py": "",
        "python/gingham/methods/moon/README.md": "# Moon\n\n[network](network.py)\n",
        "python/gingham/methods/moon/__init__.py": "",
        "python/gingham/methods/moon/network.py": f'{outline}class Moon:\n    """A network."""\n',
        "python/gingham/data/__init__.py": "",
        "python/gingham/metrics/__init__.py": "",
        "python/gingham/nn/__init__.py": "",
    }
    for room in ("ops", "array", "reference"):
        contents[f"python/gingham/{room}/__init__.py"] = f"from gingham.{room}.twice import twice\n"
        contents[f"python/gingham/{room}/twice.py"] = f"def twice(x: int) -> int:\n    {docstring}\n    return 2 * x\n"
    for path, text in contents.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def build_site(repository: Path) -> Path:
    config: Any = load_config(str(repository / "mkdocs.yml"), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    try:
        build(config)
    finally:
        config.plugins.on_shutdown()
    return Path(config.site_dir)


def write_readme(repository: Path, text: str) -> None:
    (repository / "python/gingham/methods/moon/README.md").write_text(f"# Moon\n\n{text}\n")


def test_what_every_room_exports_has_a_place(made: ModuleType) -> None:
    import gingham

    pages = made.pages(ROOT)
    for room in ("ops", "nn", "array", "reference"):
        of_room = "\n".join(text for path, text in pages.items() if path.startswith("operators/"))
        for name in getattr(gingham, room).__all__:
            assert f'heading: "gingham.{room}.{name}"' in of_room


def test_every_method_has_a_page_with_all_of_its_modules(made: ModuleType) -> None:
    pages = made.pages(ROOT)
    folders = [file.parent for file in (ROOT / "python/gingham/methods").glob("*/__init__.py")]
    assert len(folders) >= 7
    for folder in folders:
        page = pages[f"python/gingham/methods/{folder.name}/README.md"]
        for file in folder.glob("[!_]*.py"):
            assert f"\n::: gingham.methods.{folder.name}.{file.stem}\n" in page


def test_a_page_comes_of_each_operator_and_method(repository: Path) -> None:
    write_readme(repository, "[All figures](../../../../bench/results/moon/results.md), [network](network.py)")
    site = build_site(repository)
    operator = (site / "operators/twice/index.html").read_text()
    for expected in ("gingham.ops.twice", "gingham.array.twice", "gingham.reference.twice", "3 ms", "Examples:"):
        assert expected in operator
    method = (site / "methods/moon/index.html").read_text()
    assert 'href="../../bench/results/moon/results/"' in method
    assert "gingham.methods.moon.network.Moon" in method
    (code,) = re.findall(r"<pre.*?</pre>", method, re.DOTALL)
    assert re.sub("<[^>]*>", "", code) == "for each night:\n    wax\n    wane\n"
    assert "<p>Then a day.</p>" in method
    assert 'href="methods/moon/"' in (site / "index.html").read_text()


def test_links_that_lead_nowhere_stop_the_build(repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    targets = {
        "a file": "../../nn/none.py",
        "a page": "../sun/README.md",
        "a folder": "../../../../bench/results/moon",
        "a section": "../../../../bench/README.md#none",
        "a picture": "none.png",
    }
    links = [f"[{what}]({target})" for what, target in targets.items()]
    write_readme(repository, "\n".join([*links[:-1], f"!{links[-1]}", "[what there is](network.py)"]))
    with pytest.raises(Abort):
        build_site(repository)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == len(targets)
    for what, target in targets.items():
        assert any(f"link '{target}'" in text for text in warnings), what


def test_parameters_documented_together_stop_the_build(repository: Path) -> None:
    file = repository / "python/gingham/ops/twice.py"
    file.write_text(file.read_text().replace("x: a number", "x, y: numbers").replace("x: int", "x: int, y: int"))
    with pytest.raises(Abort):
        build_site(repository)
