"""The real parsers of command lines, stopped when they have read the arguments."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import NoReturn
from unittest import mock

from packaging.requirements import Requirement

from tests.docs.markdown import ROOT
from toolx_kernels.cli.commands import COMMANDS, main
from toolx_kernels.cli.train import parse_train

FLAG = re.compile(r'"(--[a-z][\w-]*)"')


class _ParsedError(BaseException):
    """The arguments are parsed; nothing else is to happen, and nobody is to catch this."""


def parse(
    work: Callable[[], object],
    parsers: list[argparse.ArgumentParser] | None = None,
    rest: Callable[[list[str]], object] | None = None,
) -> None:
    """Calls ``work`` until its argparse parser has read all arguments; ``parsers`` takes in each that reads any.
    ``rest`` is called with the arguments that it leaves to another parser.

    Raises AssertionError with what the parser says of them.
    """
    original, depth = argparse.ArgumentParser.parse_known_args, 0

    def parse_known_args(self, args=None, namespace=None):
        nonlocal depth, rest
        if parsers is not None:
            parsers.append(self)
        depth += 1
        try:
            found, unknown = original(self, args, namespace)
        finally:
            depth -= 1
        if depth == 0:  # not the parser of a subcommand
            if unknown and rest:
                other, rest = rest, None
                other(unknown)
            elif unknown:
                self.error(f"unrecognized arguments: {' '.join(unknown)}")
            raise _ParsedError
        return found, unknown

    said = io.StringIO()
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", parse_known_args),
        mock.patch.dict(os.environ),
        redirect_stdout(said),
        redirect_stderr(said),
    ):
        try:
            code = work()
        except _ParsedError:
            return
        except SystemExit as stop:  # --help, or argparse's own errors
            code = stop.code
    assert code == 0, (said.getvalue().strip() or "its parser was not asked").splitlines()[-1]


def parse_toolx(words: Sequence[str]) -> None:
    parse(lambda: main(words))


def file_of(module: str) -> Path:
    """What ``python -m module`` runs."""
    assert module.partition(".")[0] in ("bench", "tests", "toolx_kernels"), f"unknown module {module}"
    try:
        spec = importlib.util.find_spec(module)
        if spec and spec.submodule_search_locations:
            spec = importlib.util.find_spec(f"{module}.__main__")
    except ModuleNotFoundError:
        spec = None
    assert spec and spec.origin, f"there is no module {module}"
    return Path(spec.origin)


def parse_module(name: str, words: Sequence[str]) -> None:
    """``python -m name words``; one that has no parser takes no flags, and what else it takes is not checked."""
    file = file_of(name)
    source = file.read_text(encoding="utf-8")
    if not re.search(r"ArgumentParser\(|REPORT\.main\(|cli import main", source):
        assert not [word for word in words if word.startswith("-")], f"{name} has no flags"
        return
    with mock.patch.object(sys, "argv", [name, *words]):
        rest = parse_train if "parse_known_args" in source else None  # such modules take the flags of toolx train too
        parse(lambda: runpy.run_path(str(file), run_name="__main__"), rest=rest)


class _Others(argparse.ArgumentParser):
    """Stands for the parser of another project's command, whose flags are those that pages use."""

    def error(self, message: str) -> NoReturn:
        raise AssertionError(f"{self.prog}: {message}")


def parse_pytest(words: Sequence[str]) -> None:
    """With pytest-benchmark's flags, which need not be installed here."""
    parser = _Others(prog="pytest", allow_abbrev=False)
    for flag in ("-k", "-m", "-n", "--maxprocesses", "--dist", "--benchmark-json", "--benchmark-group-by"):
        parser.add_argument(flag)
    parser.add_argument("-q", action="store_true")
    parser.add_argument("paths", nargs="*")
    for path in parser.parse_intermixed_args(words).paths:
        assert (ROOT / path.partition("::")[0]).exists(), f"there is no {path}"


def parse_pip(words: Sequence[str]) -> None:
    parser = _Others(prog="pip", allow_abbrev=False)
    for flag in ("--disable-pip-version-check", "--no-build-isolation", "--no-deps", "--quiet", "-v"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("-c")
    parser.add_argument("-e", action="append", default=[])
    parser.add_argument("command", choices=["install"])
    parser.add_argument("packages", nargs="*")
    given = parser.parse_intermixed_args(words)
    for package in [*given.e, *given.packages]:
        asked = Requirement(re.sub(r"^\.(?=\[|$)", "toolx_kernels", package))
        unknown = asked.extras - extras() if asked.name == "toolx_kernels" else ()
        assert not unknown, f"there is no extra {', '.join(unknown)}"


def extras() -> set[str]:
    table = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]\n")[2]
    return set(re.findall(r"^([\w-]+) = ", table.partition("\n[")[0], re.MULTILINE))


@cache
def flags_of(command: str) -> frozenset[str]:
    """The flags of a command of toolx."""
    parsers: list[argparse.ArgumentParser] = []
    try:
        parse(lambda: main([command]), parsers)
    except AssertionError:  # it lacks an argument
        pass
    return frozenset(word for parser in parsers for word in parser._option_string_actions)


@cache
def all_flags() -> frozenset[str]:
    """The flags of all parsers: of toolx, and of all that is in ``bench`` and ``tests``."""
    sources = [
        path.read_text(encoding="utf-8") for folder in ("bench", "tests") for path in (ROOT / folder).rglob("*.py")
    ]
    of_modules = {flag for source in sources if "ArgumentParser(" in source for flag in FLAG.findall(source)}
    return frozenset(of_modules).union(*map(flags_of, COMMANDS))
