"""What the READMEs tell to type exists: commands, configurations, options, and the names that examples import."""

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="the commands need the extra: pip install gingham[train]")
import lightning
import yaml

from gingham.bench.command import OPERATORS
from gingham.cli import _COMMANDS
from gingham.cli.demo import _arms
from gingham.cli.demos import DEMOS
from gingham.cli.options import config_file, packaged_configs
from gingham.models import list_models

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "python/gingham"
PAGES = [
    "README.md",
    "bench/README.md",
    *sorted(f"methods/{x.parent.name}" for x in SOURCE.glob("methods/*/README.md")),
]


def text_of(page: str) -> str:
    return (SOURCE / page / "README.md" if page.startswith("methods/") else ROOT / page).read_text()


def commands(text: str) -> list[list[str]]:
    """The words of every command, of indented lines and of what stands between backticks."""
    text = text.replace("\\\n", " ")
    found = re.findall(r"^    (gingham .*)$", text, re.MULTILINE) + re.findall(r"`(gingham [a-z][^`]+)`", text)
    return [shlex.split(line, comments=True) for line in found]


def examples(text: str) -> list[str]:
    """The Python code of a page."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def options_of(kind: type) -> set[str]:
    """The arguments of a class and of those that it passes further arguments to."""
    return {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}


def parts(configs: list[str]) -> dict[str, list[type]]:
    """The classes of model and data that these configurations name."""
    found: dict[str, list[type]] = {"model": [], "data": []}
    for name in configs:
        content = yaml.safe_load(Path(config_file(name)).read_text())
        for part, classes in found.items():
            module, _, kind = content[part]["class_path"].rpartition(".")
            classes.append(getattr(importlib.import_module(module), kind))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    found = commands(text_of(page))
    assert found
    for _, command, *words in found:
        line = " ".join([command, *words])
        assert command in _COMMANDS, line
        options = {word.partition("=")[0] for word in words if word.startswith("--") and "." not in word}
        if command in ("demo", "predict", "bench"):
            file = SOURCE / ("bench/command.py" if command == "bench" else f"cli/{command}.py")
            assert all(f'"{option}"' in file.read_text() for option in options), line
            assert not any(re.match(r"--\w+\.", word) for word in words), line
        else:
            known = {"--config", "--run_dir", "--ckpt_path", "--overwrite", "--check_data", "--checkpoint_every"}
            assert options <= {*known, "--help"}, line
        if "--config" in words:
            name = words[words.index("--config") + 1]
            assert name in packaged_configs() or "/" in name or name.isupper(), line
        if command == "demo" and words and words[0] != "--all":
            assert words[0] in DEMOS, line
            _arms(DEMOS[words[0]], (*words[words.index("--arms") + 1 :],) if "--arms" in words else ())
        if command == "bench" and words and not words[0].startswith("--"):
            assert words[0] in OPERATORS, line


@pytest.mark.parametrize("page", PAGES)
def test_options_exist(page: str) -> None:
    text = text_of(page)
    configs = [name for name in packaged_configs() if page == "README.md" or re.search(rf"\b{name}\b", text)]
    classes = parts(configs)
    known = {part: set[str]().union(*map(options_of, kinds)) for part, kinds in classes.items()}
    known["trainer"] = {*inspect.signature(lightning.Trainer).parameters}
    networks = [importlib.import_module(kind.__module__.replace("recipe", "network")) for kind in classes["model"]]
    of_networks = {
        x for file in networks for _, kind in inspect.getmembers(file, inspect.isclass) for x in options_of(kind)
    }
    for part, option, inner in re.findall(r"--(model|data|trainer)\.(\w+)(?:\.(\w+))?", text):
        assert option in known[part], f"--{part}.{option}"
        if option == "network":
            assert inner in of_networks, f"--{part}.{option}.{inner}"


@pytest.mark.parametrize("page", PAGES)
def test_examples_use_what_there_is(page: str) -> None:
    for code in examples(text_of(page)):
        tree = ast.parse(code)
        names: dict[str, Any] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                module = importlib.import_module(node.module)
                names |= {alias.name: getattr(module, alias.name) for alias in node.names}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or any(isinstance(word, ast.Starred) for word in node.args):
                continue
            called = ast.unparse(node.func)
            if called in names:
                given = dict.fromkeys(word.arg for word in node.keywords if word.arg is not None)
                inspect.signature(names[called]).bind(*node.args, **given)
            if called == "gingham.create_model":
                assert ast.literal_eval(node.args[0]) in list_models()


def test_examples_of_operators_run() -> None:
    run = [code for code in examples(text_of("README.md")) if "gingham.ops" in code or "gingham.array" in code]
    assert len(run) == 2
    for code in run:
        exec(code, {})
