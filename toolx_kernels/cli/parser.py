"""Argument parser with errors of one sentence, and flags for settings."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from toolx_kernels.errors import InputError
from toolx_kernels.settings import Settings, without_none

TRUTH = dict.fromkeys(("yes", "true", "y", "t", "1"), True) | dict.fromkeys(("no", "false", "n", "f", "0"), False)


class Parser(argparse.ArgumentParser):
    """Raises InputError, a sentence, where argparse prints a page of usage; no flag can be abbreviated."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help.")

    def flag(self, name: str, **options: Any) -> None:
        """Adds ``--some_name``, which is also spelled ``--some-name``."""
        self.add_argument(*spellings(name), **options)

    def settings_flags(self, settings: type[Settings], in_help: bool) -> None:
        """Adds a flag for each field of ``settings``, in groups by their sections. What is not typed is not in the
        namespace."""
        for section in reversed(settings.__bases__):
            kinds, group = get_type_hints(section), self.add_argument_group(str(section.__doc__).partition(".")[0])
            for each in fields(section):
                shown = each.metadata["help"] if in_help else argparse.SUPPRESS
                options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": shown}
                group.add_argument(*spellings(each.name), **options, **_reading(kinds[each.name]))
                if each.default is True:
                    negated = spellings(f"no_{each.name}")
                    group.add_argument(*negated, dest=each.name, action="store_false", **options)


def spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _reading(kind: Any) -> dict[str, Any]:
    """How argparse reads a field of this type."""
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    kind = without_none(kind)
    if get_origin(kind) is list:
        return {"nargs": "+", "type": get_args(kind)[0]}
    if kind is bool:
        return {"nargs": "?", "const": True, "type": _truth}
    return {"type": str if kind is dict else kind}  # ``Settings`` reads its JSON


def _truth(text: str) -> bool:
    if text.lower() not in TRUTH:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return TRUTH[text.lower()]
