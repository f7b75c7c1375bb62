"""The ``gingham`` command. Everything heavy is imported by the subcommand that needs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

_COMMANDS = {
    "info": "version, compiler, instruction sets, CUDA architectures, torch",
    "methods": "the models and the packaged configurations",
    "bench": "time the operators against what you would use instead, on this machine",
    "demo": "train a method and its baseline on the embedded world, and compare them",
    "fit": "train: gingham fit --config ccnet_cityscapes --data.root DIR",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the test split",
    "predict": "write masks, attention, boxes or classes, and pictures of them, for an image or a folder of images",
    "check-data": "read every item of a data set and list what is wrong with it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 if something was skipped, 2 for an error of the user."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="gingham",
        description="Fast vision operators, and the methods built on them.",
        epilog="commands:\n" + "\n".join(f"  {name:<11} {text}" for name, text in _COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    parser.add_argument("command", nargs="?", choices=[*_COMMANDS], metavar="command", help="see below")
    split = next((i for i, word in enumerate(words) if word in _COMMANDS), len(words))
    options = parser.parse_args(words[: split + 1])
    rest = words[split + 1 :]
    debug = options.debug or "--debug" in rest
    rest = [word for word in rest if word != "--debug"]
    if options.version:
        from gingham import __version__

        print(__version__)
        return 0
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return _run(options.command, rest)
    except KeyboardInterrupt:
        print("gingham: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from gingham.errors import GinghamError

        users = (GinghamError, OSError, ImportError)
        if debug or not isinstance(error, users):
            raise
        print("gingham: error: " + _one_line(str(error)), file=sys.stderr)
        return 2


def _one_line(text: str) -> str:
    if "Original Traceback" in text:  # of a worker process, whose last line is "<type>: <text>"
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def _run(command: str, rest: list[str]) -> int:
    if command == "info":
        argparse.ArgumentParser(prog="gingham info", description=_COMMANDS[command]).parse_args(rest)
        from gingham import info

        report = info()
        width = max(len(name) for name in report)
        for name, text in report.items():
            print(f"{name:<{width}}  {text}")
        return 0
    if command == "methods":
        argparse.ArgumentParser(prog="gingham methods", description=_COMMANDS[command]).parse_args(rest)
        from gingham.cli.training import packaged_configs
        from gingham.models import list_models

        print("models:  " + ", ".join(list_models()))
        print("configs: " + ", ".join(packaged_configs()))
        return 0
    if command == "bench":
        from gingham.bench import main as bench

        return int(bench(rest) or 0)
    if command == "demo":
        from gingham.cli.demo import main as demo

        return demo(rest)
    if command == "predict":
        from gingham.cli.predict import main as predict

        return predict(rest)
    from gingham.cli.training import main as train

    return train(command, rest)
