"""``toolx train | eval | compare | plan | doctor``. Bad input prints one sentence to stderr and exits with 2."""

from __future__ import annotations

import logging
import os
import sys
from argparse import HelpFormatter
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from toolx_kernels.cli.parser import Parser
from toolx_kernels.errors import MEMORY_ERRORS, InputError, first_line, out_of_memory
from toolx_kernels.versions import version_of

# OpenMP threads that spin while they wait slow each other down many times; this must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class Command(NamedTuple):
    """A command's module in ``toolx_kernels.cli``, with ``add_flags(parser)`` and ``run(args)``, and its help."""

    module: str
    help: str


COMMANDS = {
    "train": Command("train", "train a model to call tools; without flags: the built-in task, in minutes on a laptop"),
    "eval": Command("evaluate", "score a model or checkpoint on datasets"),
    "compare": Command("compare", "compare runs: learning curves in one picture, final scores in tables"),
    "plan": Command("plan", "estimate the memory of a run before it starts, and suggest settings that fit"),
    "doctor": Command("doctor", "show what is installed, and which backend each op uses"),
}


class _Notes(logging.Handler):
    """Prints what the package logs, such as the form of a dataset's rows, to stderr as it is at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


_LOGGER = logging.getLogger("toolx_kernels")
_LOGGER.setLevel(logging.INFO)
_LOGGER.addHandler(_Notes())


class CommandParser(Parser):
    """The parser of one command. It imports the command's module only when that command is called, because each module
    loads what it needs."""

    def __init__(self, module: str, **options: Any):
        super().__init__(**options)
        self.module = module

    def parse_known_args(self, args, namespace=None):  # type: ignore[override]
        command = import_module(f"toolx_kernels.cli.{self.module}")
        command.add_flags(self)
        self.set_defaults(run=command.run)
        return super().parse_known_args(args, namespace)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = " ".join(["toolx", *(word for word in argv[:1] if word in COMMANDS)])
    try:
        return _run(argv)
    except InputError as error:
        message = str(error)
    except OSError as error:  # a folder that is not writable, a full disk
        message = f"{error.filename or 'file'}: {error.strerror or error}."
    except MEMORY_ERRORS as error:
        if not out_of_memory(error):
            raise
        message = (
            f"memory ran out ({first_line(error)}): toolx plan says what a run needs and what to change; --resume "
            "continues a run from its last checkpoint."
        )
    except KeyboardInterrupt:
        print(f"{prog}: interrupted.", file=sys.stderr)
        return 130
    print(f"{prog}: {message}", file=sys.stderr)
    return 2


def _run(argv: list[str]) -> int:
    parser = Parser(prog="toolx", epilog="toolx <command> --help shows its flags.", formatter_class=HelpFormatter)
    package, torch, transformers = map(version_of, ("toolx_kernels", "torch", "transformers"))
    parser.flag(
        "version",
        help="versions of toolx_kernels, torch and transformers",
        action="version",
        version=f"toolx_kernels {package}, torch {torch}, transformers {transformers}",
    )
    parser.register("type", None, str)  # the words after a command are for its own parser to check
    commands = parser.add_subparsers(metavar="<command>", parser_class=CommandParser)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, module=command.module)
    args = parser.parse_args(argv)
    run = vars(args).pop("run", None)
    if run is None:
        parser.print_help()
        return 2
    return run(args)
