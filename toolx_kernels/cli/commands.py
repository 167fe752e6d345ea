"""``toolx train | eval | compare | plan | doctor``. Bad input prints one sentence to stderr and exits with 2."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from toolx_kernels.cli.parser import Parser
from toolx_kernels.errors import MEMORY_ERRORS, InputError, first_line, out_of_memory

# Two OpenMP pools that spin while waiting slow each other down many times; this must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# transformers loads torchao, where it is installed, and that complains of parts for other machines and of torch.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Command(NamedTuple):
    """The module of a command in ``toolx_kernels.cli``, with ``add_flags(parser)`` and ``run(args)``; its help."""

    module: str
    help: str


COMMANDS = {
    "train": Command("train", "train a model to call tools; without flags: the built-in task, in minutes on a laptop"),
    "eval": Command("evaluate", "score a model or checkpoint on datasets"),
    "compare": Command("compare", "put learning curves and final figures of several runs side by side"),
    "plan": Command(
        "plan", "the memory that a run would take, before anything is loaded, and what to change if it does not fit"
    ),
    "doctor": Command("doctor", "what is installed here, and which backend each op uses"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = " ".join(["toolx", *(word for word in argv[:1] if word in COMMANDS)])
    try:
        return _run(argv)
    except InputError as error:
        message = str(error)
    except OSError as error:  # a folder that cannot be written, a full disk
        message = f"{error.filename or 'file'}: {error.strerror or error}."
    except MEMORY_ERRORS as error:
        if not out_of_memory(error):
            raise
        message = (
            f"memory ran out ({first_line(error)}): toolx plan tells what a run needs and what to change; a run goes "
            "on from its last checkpoint with --resume."
        )
    except KeyboardInterrupt:
        remedy = "; the same command with --resume goes on from the last checkpoint" if argv[0] == "train" else ""
        print(f"{prog}: interrupted{remedy}.", file=sys.stderr)
        return 130
    print(f"{prog}: {message}", file=sys.stderr)
    return 2


def _run(argv: list[str]) -> int:
    parser = Parser(prog="toolx", epilog="toolx <command> --help lists its flags.")
    commands = parser.add_subparsers(metavar="<command>", required=True)
    parsers = {name: commands.add_parser(name, help=command.help) for name, command in COMMANDS.items()}
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        raise InputError(f"unknown command {argv[0]!r}: use one of {', '.join(COMMANDS)}.")
    command = import_module(f"toolx_kernels.cli.{COMMANDS[argv[0]].module}")  # alone, since it loads what it needs
    command.add_flags(parsers[argv[0]])
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parsers[argv[0]].error(f"unrecognized arguments: {' '.join(unknown)}")
    return command.run(args)
