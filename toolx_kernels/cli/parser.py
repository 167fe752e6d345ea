"""Argument parser: errors of one sentence, defaults in the help, and flags for settings in groups."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from itertools import zip_longest
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from toolx_kernels.cli.trl import SEE, is_trls
from toolx_kernels.errors import InputError, did_you_mean, short
from toolx_kernels.files import expanded
from toolx_kernels.settings import Settings, without_none

# argparse takes any other word that begins with a dash for a flag: also -1e-4, which is a value
_NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)
TRUTH = dict.fromkeys(("yes", "true", "y", "t", "1"), True) | dict.fromkeys(("no", "false", "n", "f", "0"), False)


class Parser(argparse.ArgumentParser):
    """Raises InputError, a sentence, where argparse prints its usage. No flag can be abbreviated, and ``--some-name``
    is ``--some_name``."""

    def __init__(self, **options: Any):
        # "resolve": the --help of grouped settings replaces argparse's
        super().__init__(**{"formatter_class": Texts} | options, allow_abbrev=False, conflict_handler="resolve")
        self.register("type", None, _text)
        self.register("type", str, _text)
        self.register("type", int, _whole_number)
        self.register("type", float, _number)
        self._negative_number_matcher = _NEGATIVE
        self.names: list[str] = []
        self.groups: dict[str, type[Settings]] = {}
        self.defaults: Mapping[str, str] = {}

    def flag(self, name: str, *, help: str, **options: Any) -> None:
        """Adds ``--name``; its help ends with its default, if it has one."""
        self.names.append(f"--{name}")
        self.add_argument(f"--{name}", help=_help(help, options.get("default")), **options)

    def settings_flags(self, settings: type[Settings], defaults: Mapping[str, str]) -> None:
        """Adds a flag for each field of ``settings``, which ``--help GROUP`` explains; a group is a section. A flag
        that is not typed is not in the namespace. ``defaults`` are those that the command sets itself, in words.
        """
        self.groups, self.defaults = {group_name(base): base for base in reversed(settings.__bases__)}, defaults
        for section in self.groups.values():
            kinds = get_type_hints(section)
            for each in fields(section):
                options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
                self.names.append(f"--{each.name}")
                self.add_argument(f"--{each.name}", **options, **_reading(kinds[each.name]))
                if each.default is True:
                    self.add_argument(f"--no_{each.name}", dest=each.name, action="store_false", **options)
        self.add_argument(
            "-h",
            "--help",
            nargs="?",
            metavar="GROUP",
            action=_GroupHelp,
            default=argparse.SUPPRESS,
            help="this overview; or explain the flags of one group, or of all",
        )

    def overview(self) -> str:
        """The groups with their flags and defaults, in 80 columns."""
        lines = []
        for name, section in self.groups.items():
            cells = [f"--{each.name} {_shown(self._default(each))}" for each in fields(section)]
            lines += ["", f"{name}: {_headline(section)}"]
            lines += [
                f"  {left:<38}{right}".rstrip() for left, right in zip_longest(cells[::2], cells[1::2], fillvalue="")
            ]
        return "\n".join(lines)

    def explained(self, names: Sequence[str]) -> str:
        """All about the flags of these groups."""
        shown = Parser(usage=argparse.SUPPRESS, add_help=False)
        for name in names:
            section = self.groups[name]
            kinds, group = get_type_hints(section), shown.add_argument_group(name, f"{_headline(section)}.")
            for each in fields(section):
                help = _help(each.metadata["help"], self._default(each))
                group.add_argument(f"--{each.name}", help=help, **_reading(kinds[each.name]))
        return shown.format_help()

    def _default(self, each: Field) -> Any:
        return self.defaults.get(each.name, each.default)

    def parse_known_args(self, args, namespace=None):  # type: ignore[override]
        """Refuses unknown flags here, where the known ones are; argparse would leave them to the parser above."""
        found, unknown = super().parse_known_args([_underscored(word) for word in args], namespace)
        if unknown and unknown[0].startswith("-"):
            name = unknown[0].partition("=")[0]
            see = f"see {self.prog} --help."
            remedy = SEE if is_trls(name[2:]) else did_you_mean(name, self.names, see)
            raise InputError(f"unknown flag {name}: {remedy}")
        if unknown:
            self.error(f"{unknown[0]!r} follows no flag")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = action.option_strings[0] if action.option_strings else str(action.metavar).strip("<>")
            known = list(action.choices)
            raise InputError(f"unknown {what} {value!r}: {did_you_mean(value, known, f'use one of {_listed(known)}.')}")

    def error(self, message: str) -> NoReturn:
        said = message.removeprefix("argument ")
        raise InputError(said if said.endswith(".") else f"{said}; see {self.prog} --help.")


class Texts(argparse.RawDescriptionHelpFormatter):
    """Help in at most 80 columns, with the text of each flag below it."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=6, width=min(shutil.get_terminal_size().columns, 80) - 2)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # names such as sft-grpo can be copied


class _GroupHelp(argparse.Action):
    """``--help``, ``--help GROUP`` and ``--help all``."""

    def __call__(self, parser, namespace, value, option_string=None) -> None:
        name = value and value.replace("_", "-")
        if name and name not in (*parser.groups, "all"):
            groups = [*parser.groups, "all"]
            otherwise = f"choose one of {_listed(groups)}."
            raise InputError(f"there is no group {value!r}: {did_you_mean(name, groups, otherwise)}")
        names = list(parser.groups) if name == "all" else [name]
        print(parser.explained(names) if name else parser.format_help(), end="")
        parser.exit()


def group_name(section: type[Settings]) -> str:
    """``cold-start`` of ``ColdStartSettings``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", section.__name__.removesuffix("Settings")).lower()


def _headline(section: type[Settings]) -> str:
    return str(section.__doc__).partition(".")[0]


def _help(text: str, default: Any) -> str:
    shown = _shown(default)
    return (f"{text} (default: {shown})" if shown else text).replace("%", "%%")  # argparse fills in what follows a %


def _shown(default: Any) -> str:
    """A default as it would be typed; empty for one that is off or not set."""
    if any(default is off for off in (None, False, argparse.SUPPRESS)) or default == []:
        return ""
    return "true" if default is True else _listed(default) if isinstance(default, list) else str(default)


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words)


def _underscored(word: str) -> str:
    return re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word)


def _reading(kind: Any) -> dict[str, Any]:
    """How argparse reads a field of this type; ``Settings`` checks the value."""
    if get_origin(kind) is Literal:
        return {"metavar": "NAME"}
    kind = without_none(kind)
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
        return {"nargs": "+", "type": kind, "metavar": _METAVARS[kind]}
    if kind is bool:
        return {"nargs": "?", "const": True, "type": _truth, "metavar": "true|false"}
    return {"type": _json if kind is dict else kind, "metavar": _METAVARS[kind]}


_METAVARS = {int: "N", float: "X", str: "NAME", dict: "JSON"}


def _text(text: str) -> str:
    try:
        return expanded(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _json(text: str) -> str:
    return text  # which ``Settings`` reads


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{short(text)} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{short(text)} is not a number") from None


def _truth(text: str) -> bool:
    if text.lower() not in TRUTH:
        raise argparse.ArgumentTypeError(f"{short(text)} is neither true nor false")
    return TRUTH[text.lower()]
