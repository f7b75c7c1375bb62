"""Which configurations there are, and what is wrong with the options that were given, in one line."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gingham.errors import GinghamError

_CONFIGS = Path(__file__).parent.parent / "configs"


class ConfigError(GinghamError, ValueError):
    """A configuration that does not exist, or options that do not fit together."""


def packaged_configs() -> list[str]:
    """Names of the configurations in the package."""
    return sorted(path.stem for path in _CONFIGS.glob("*.yaml"))


def config_file(name: str) -> str:
    """The file of a configuration: a path, or the bare name of a packaged one."""
    if Path(name).is_file():
        return name
    if name in packaged_configs():
        return str(_CONFIGS / f"{name}.yaml")
    raise ConfigError(f"no config {name!r}: neither a file nor one of {', '.join(packaged_configs())}")


def read_config(file: str) -> dict[str, Any]:
    """The content of a configuration's file.

    Raises:
        ConfigError: it is no YAML, or holds no options.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: no YAML ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: a configuration needs the entries model and data")
    return content


def with_config_files(words: list[str]) -> list[str]:
    """The words of a command line, with the files in place of the names of configurations."""
    result = list(words)
    for i, word in enumerate(result):
        if word.startswith("--config="):
            result[i] = "--config=" + config_file(word.removeprefix("--config="))
        elif i and result[i - 1] in ("--config", "-c"):
            result[i] = config_file(word)
    return result


def with_whole_network(words: list[str], parser: Any) -> list[str]:
    """The words of a command line, with the options of the network that they give one by one in a single value.

    The value holds the options of the configuration too. jsonargparse alone would replace dictionaries within the
    network's by what is given of them, and make the word "None" of null.

    Args:
        words: with files in place of the names of configurations; ``--model.network.NAME VALUE`` changes an option,
            ``--model.network.NAME.INNER VALUE`` one within it.
        parser: of these words.

    Raises:
        ConfigError: an option within one that holds no options.
    """
    rest: list[str] = []
    given: list[tuple[list[str], Any]] = []
    left = iter(range(len(words)))
    for i in left:
        option, separator, value = words[i].partition("=")
        name = _NETWORK_OPTION.fullmatch(option)
        if name is not None and not separator and i + 1 < len(words) and not words[i + 1].startswith("--"):
            separator, value = "=", words[next(left)]
        if name is None or not separator:
            rest.append(words[i])
        else:
            given.append((name[1].split("."), _value(value)))
    if not given:
        return words
    try:
        network = parser.parse_args([word for word in rest if not word.startswith("--print_config")])[_NETWORK]
    except (ArgumentError, KeyError, TypeError):
        return words  # parsing all of them says what is wrong
    if not isinstance(network, Mapping):
        return words
    for path, value in given:
        network = _changed(network, path, value)
    return [*rest, f"--{_NETWORK}={json.dumps(network)}"]


_NETWORK = "model.init_args.network"
_NETWORK_OPTION = re.compile(r"--model\.(?:init_args\.)?network\.([^=]+)")


def _value(text: str) -> Any:
    from jsonargparse import get_loader
    from yaml import YAMLError

    try:
        return get_loader("yaml")(text) if text.strip() else text
    except YAMLError:
        return text


def _changed(options: Mapping[str, Any], name: list[str], value: Any, before: str = "network") -> dict[str, Any]:
    first, *inner = name
    if inner:
        own = options.get(first)
        if own is not None and not isinstance(own, Mapping):
            raise ConfigError(f"no option --model.{before}.{'.'.join(name)}: {first} is {own!r}, which has no options")
        value = _changed(own or {}, inner, value, f"{before}.{first}")
    return {**options, first: value}


def instantiate(config: Mapping[str, Any], *, source: str) -> Any:
    """The parts that a configuration's content describes: `model`, `data` and the list `callbacks` of its trainer.

    Args:
        config: with the entries "model" and "data", and perhaps "trainer" with "callbacks".
        source: what errors call it.

    Raises:
        ConfigError: a class or an option that does not exist or does not fit.
    """
    from jsonargparse import ArgumentParser
    from lightning.pytorch.callbacks import Callback

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=lightning.LightningModule, required=True)
    parser.add_argument("--data", type=lightning.LightningDataModule, required=True)
    parser.add_argument("--callbacks", type=list[Callback], default=[])
    content = {name: config[name] for name in ("model", "data")}
    content["callbacks"] = config.get("trainer", {}).get("callbacks") or []
    try:
        # A copy: parsing puts objects of its own into what it is given.
        return parser.instantiate_classes(parser.parse_object(deepcopy(content)))
    except (ArgumentError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{source}: {error}") from error


@contextmanager
def one_line_errors(*, running: bool = False) -> Iterator[None]:
    """Turns what users cause into a `ConfigError`: everything while the parts are made, less while they run."""
    try:
        yield
    except GinghamError:
        raise
    except ArgumentError as error:
        raise ConfigError(_parsing_problem(str(error))) from error
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error
    except (ValueError, TypeError, AttributeError) as error:
        cause: BaseException = error
        while "Does not validate" in str(cause) and cause.__cause__ is not None:
            cause = cause.__cause__  # jsonargparse wraps what a constructor raises
        if running and not _raised_by_lightning(error):
            raise
        if isinstance(cause, GinghamError):
            raise cause from None
        raise ConfigError(str(cause)) from error


def _raised_by_lightning(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("lightning.")


def _parsing_problem(text: str) -> str:
    """What jsonargparse says in many lines, in one that names the option."""
    if unknown := re.search(r"unrecognized arguments: (\S+)", text):
        return _unknown_option(unknown[1].partition("=")[0])
    if unknown := re.search(r"Option '(.+?)' is not accepted", text):
        part = re.search(r'Parser key "(\w+)', text)
        owner = re.search(r"class_path '(.+?)'", text)
        prefix = f"--{part[1]}." if part else ""
        return f"no option {prefix}{unknown[1]}" + (f": there are {_options_of(owner[1])}" if owner else "")
    if missing := re.search(r"arguments are required: (.*)", text):
        return f"the configuration has no {missing[1]}; packaged ones are {', '.join(packaged_configs())}"
    noise = ("Does not validate", "Subtypes:", "Errors:", "Problem with given class_path", "Given value")
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    lines = [x for x in lines if x and not x.startswith(noise) and not x.startswith("Expected a <class 'NoneType'>")]
    names = [name for line in lines for name in re.findall(r'^Parser key "(.+?)":', line)]
    rest = " ".join(re.sub(r'^Parser key ".+?":\s*', "", line) for line in lines).strip()
    return f"--{'.'.join(names)}: {rest}" if names else rest


def _unknown_option(option: str) -> str:
    if not option.startswith("--"):
        return f"unexpected word {option!r}: options begin with --"
    trainer = [f"--trainer.{name}" for name in inspect.signature(lightning.Trainer).parameters]
    ours = ["--config", "--run_dir", "--checkpoint_every", "--ckpt_path", "--overwrite", "--check_data"]
    ours.append("--seed_everything")
    known = trainer if option.startswith("--trainer.") else [*ours, "--model.*", "--data.*", "--trainer.*"]
    close = difflib.get_close_matches(option, known, n=3)
    rest = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
    return f"no option {option}: {rest}"


def _options_of(class_path: str) -> str:
    module, _, name = class_path.rpartition(".")
    return ", ".join(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
