"""Pythonic calls, ``[f(x=1), g()]``: a reader, which does not run them, and a writer."""

import json
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.strict_json import MAX_DEPTH, finite, is_shallow, skip_space, unique

# Names as in datasets: get_weather, api.news, /v1/users, Get Flight Details. The first word contains a letter.
_WORD = r"[\d./\-]*[^\W\d][\w./\-]*"
_MORE_WORDS = r" +[\w./\-]+"
NAME = rf"{_WORD}(?:{_MORE_WORDS})*"
_KEYWORD = r"[\w.\-]+"
# The beginning of a list of calls. A name of several words needs arguments like a call's: "[the item(s)]" is prose.
LIST = rf"\[\s*{_WORD}(?:\(|(?:{_MORE_WORDS})+\((?=\s*(?:\)|{_KEYWORD}\s*=)))"

_CALL = re.compile(rf"({NAME})\(")
_ARGUMENT = re.compile(rf"({_KEYWORD})\s*=\s*")
_NAME, _ARGUMENT_NAME = re.compile(NAME), re.compile(_KEYWORD)
_CONSTANTS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_VALUE = re.compile(
    rf"""(?P<constant>{"|".join(_CONSTANTS)})
    |(?P<string>"[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*')
    |(?P<number>[+-]?(?:(?:0|[1-9](?:_?[0-9])*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
    |(?P<opening>[\[({{])""",
    re.VERBOSE | re.DOTALL,
)
_INTEGER = re.compile(r"[+-]?[0-9_]+")
_ESCAPE = re.compile(
    r"""\\(?:(?P<pair>u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})
    |x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|U(?P<U>[0-9a-fA-F]{8})
    |N\{(?P<named>[\w\ \-]+)\}|(?P<octal>[0-7]{1,3})|(?P<plain>[^xuUN])|)""",
    re.VERBOSE | re.DOTALL,
)
_PLAIN = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "b": "\b",
    "f": "\f",
    "v": "\v",
    "a": "\a",
    "\n": "",
    **{c: c for c in "\\'\""},
}
_T = TypeVar("_T")


def read_calls(text: str, start: int) -> tuple[list[dict], int] | None:
    """Reads the list of calls that begins at ``start``; returns the calls and the list's end, or None if it is
    malformed.

    Arguments are keywords without repetition. Values are literals of Python and JSON: strings in single or double
    quotes with Python's escapes, finite numbers, lists, tuples (read as lists), mappings with unique string keys,
    ``True`` or ``true``, ``None`` or ``null``. Anything else is malformed, and so is nesting deeper than ``MAX_DEPTH``.
    """
    try:
        calls, end = _items(text, start + 1, "]", _call)
    except ValueError:
        return None
    return calls, end


def read_arguments(text: str, start: int) -> tuple[dict, int]:
    """Reads the arguments of the call whose parenthesis opens just before ``start``; returns them and the call's end.

    Raises ValueError for what ``read_calls`` considers malformed.
    """
    pairs, end = _items(text, start, ")", _argument)
    return unique(pairs), end


def read_value(text: str, start: int = 0) -> tuple[Any, int]:
    """Reads the literal of Python or JSON that begins at ``start``, after white space; returns it and its end.

    Raises ValueError for what ``read_calls`` considers malformed.
    """
    return _value(text, skip_space(text, start))


def write_calls(calls: Sequence[dict]) -> str:
    """Writes a list of calls that ``read_calls`` reads back, with strings in double quotes.

    Raises InputError for a name of a function or an argument that this format cannot express.
    """
    return f"[{', '.join(map(_write_call, calls))}]"


def _write_call(call: dict) -> str:
    name, arguments = call["name"], call["arguments"]
    if not _NAME.fullmatch(name):
        raise InputError(
            f"the function name {name!r} cannot be written as a call in Python syntax: rename it with letters, digits,"
            " '_', '.', '-', '/' and inner spaces only, or choose a format that quotes names, such as json."
        )
    for key in arguments:
        if not _ARGUMENT_NAME.fullmatch(key):
            raise InputError(
                f"the argument {key!r} of {name} cannot be written as a keyword in Python syntax: rename it with"
                " letters, digits, '_', '.' and '-' only, or choose a format that quotes names, such as json."
            )
    return f"{name}({', '.join(f'{key}={_write(value)}' for key, value in arguments.items())})"


def _write(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_write(key)}: {_write(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_write, value))}]"
    return repr(value)


def _items(text: str, at: int, close: str, read: Callable[[str, int], tuple[_T, int]]) -> tuple[list[_T], int]:
    """Reads items, separated by commas, with ``read`` up to ``close``; returns them and the end. The last item may have
    a comma too."""
    items: list[_T] = []
    at = skip_space(text, at)
    while not text.startswith(close, at):
        item, at = read(text, at)
        items.append(item)
        at = skip_space(text, at)
        if text.startswith(",", at):
            at = skip_space(text, at + 1)
        elif not text.startswith(close, at):
            raise ValueError("no comma")
    return items, at + 1


def _call(text: str, at: int) -> tuple[dict, int]:
    found = _CALL.match(text, at)
    if not found:
        raise ValueError("no call")
    arguments, end = read_arguments(text, found.end())
    call = {"name": found[1], "arguments": arguments}
    if not is_shallow(call):
        raise ValueError("nested too deep")
    return call, end


def _argument(text: str, at: int) -> tuple[tuple[str, Any], int]:
    found = _ARGUMENT.match(text, at)
    if not found:
        raise ValueError("no keyword")
    value, end = _value(text, found.end())
    return (found[1], value), end


def _value(text: str, at: int, depth: int = 1) -> tuple[Any, int]:
    found = _VALUE.match(text, at)
    if not found or depth > MAX_DEPTH:
        raise ValueError("no literal")
    written, end = found.group(), found.end()
    if found["constant"]:
        return _CONSTANTS[written], end
    if found["string"]:
        return _string(written), end
    if found["number"]:
        return int(written) if _INTEGER.fullmatch(written) else finite(written), end
    inner = partial(_value, depth=depth + 1)
    if written == "{":
        pairs, end = _items(text, end, "}", partial(_pair, read=inner))
        return unique(pairs), end
    items, after = _items(text, end, "]" if written == "[" else ")", inner)
    if written == "(" and len(items) == 1 and not text[end : after - 1].rstrip().endswith(","):
        return items[0], after  # only a pair of parentheses
    return items, after


def _pair(text: str, at: int, read: Callable[[str, int], tuple[Any, int]]) -> tuple[tuple[str, Any], int]:
    key, at = read(text, at)
    at = skip_space(text, at)
    if not isinstance(key, str) or not text.startswith(":", at):
        raise ValueError("no key")
    value, at = read(text, skip_space(text, at + 1))
    return (key, value), at


def _string(written: str) -> str:
    inside = written[1:-1]
    return _ESCAPE.sub(_unescaped, inside) if "\\" in inside else inside


def _unescaped(found: re.Match[str]) -> str:
    kind = found.lastgroup
    if kind is None:
        raise ValueError("no escape")
    code = found[kind]
    if kind == "plain":
        return _PLAIN.get(code, found.group())
    if kind == "named":
        try:
            return unicodedata.lookup(code)
        except KeyError as error:
            raise ValueError("no character's name") from error
    if kind == "pair":  # JSON's escape of a character beyond U+FFFF
        high, low = (int(half, 16) for half in code[1:].split("\\u"))
        return chr(0x10000 + ((high & 0x3FF) << 10 | low & 0x3FF))
    number = int(code, 8 if kind == "octal" else 16)
    if number > sys.maxunicode:
        raise ValueError("no character")
    return chr(number)
