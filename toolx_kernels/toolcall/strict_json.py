"""Strict JSON, as calls and files are read: each text has one meaning, and its nesting is bounded."""

import json
import math
import re
import zlib
from collections.abc import Iterator
from gzip import GzipFile
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from toolx_kernels.errors import InputError, first_line, short

MAX_DEPTH = 64  # deeper arguments are malformed, so that code may recurse through a parsed call
_MOST_BITS = 14_000  # Python writes and reads no number of more than 4,300 digits

_NOT_SPACE = re.compile(r"\S")


def read_json(text: str) -> Any:
    """Parses a JSON text. Raises ValueError for what is not JSON, NaN, Infinity, a number that Python cannot represent
    and a repeated key; RecursionError for nesting beyond Python's limit."""
    return _DECODER.decode(text)


def json_at(text: str, start: int) -> tuple[Any, int] | None:
    """The JSON value that begins at ``start``, and its end. None if ``read_json`` would raise, or for nesting deeper
    than ``MAX_DEPTH``."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return None if isinstance(value, dict | list) and not is_shallow(value) else (value, end)


def encodable(text: str) -> str:
    """``text`` with "?" for lone surrogates, which JSON can express but no tokenizer accepts."""
    return text.encode(errors="replace").decode()


def is_shallow(value: dict | list | tuple) -> bool:
    """Whether ``value`` nests at most ``MAX_DEPTH`` objects and arrays, itself included."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list | tuple)
        ]
        if not level:
            return True
    return False


def json_fault(value: Any, path: str) -> str | None:
    """Describes why ``value`` is not JSON that a prompt can show, or returns None. Faults are a number that is not
    finite or has thousands of digits, a key that is not a string, a lone surrogate, a value of another type, and more
    than ``MAX_DEPTH`` levels. ``path`` names the value."""
    if isinstance(value, dict | list | tuple) and not is_shallow(value):
        return f"{path} is nested deeper than {MAX_DEPTH} levels"
    return _json_fault(value, path)


def json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yields (line number, value) for each line that is not blank in a file of JSON values; or (place from 0, value)
    for each value of a file that is one JSON array. The file may be packed by gzip.

    Raises InputError, naming file and line, if the file cannot be read or is not UTF-8 text, or a line is not JSON.
    """
    remedy = "write one JSON object per line, or all in one array"
    try:
        with Path(path).open("rb") as file:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            # Windows editors may write a byte order mark
            lines = TextIOWrapper(GzipFile(fileobj=file) if packed else file, encoding="utf-8-sig")
            begun = False
            for number, line in enumerate(lines, 1):
                if not begun and line.lstrip().startswith("["):
                    yield from enumerate(json_value(line + lines.read(), str(path), remedy))
                elif line.strip():
                    yield number, json_value(line, f"{path}:{number}", remedy)
                begun = begun or bool(line.strip())
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"cannot read the dataset file {path} ({reason}): name a readable file.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the dataset file {path} is not UTF-8 text ({error.reason}): save it as UTF-8.") from error


def json_value(text: str, name: str, remedy: str) -> Any:
    """Parses ``text`` with ``read_json``. Raises InputError, with ``name``, if it is not JSON; ``remedy`` is for a text
    that is not written as JSON at all."""
    try:
        return read_json(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is not JSON ({error}): {remedy}.") from error
    except (ValueError, RecursionError) as error:  # Python's words go on about its settings
        reason = str(error).partition(":")[0]
        raise InputError(f"{name} is not JSON that can be used ({reason}): change or remove this value.") from error


def skip_space(text: str, start: int) -> int:
    """The end of the white space that begins at ``start``."""
    found = _NOT_SPACE.search(text, start)
    return found.start() if found else len(text)


def unique(pairs: list[tuple[str, Any]]) -> dict:
    """A dict of ``pairs``. Raises ValueError for a repeated key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"repeated key {short(next(name for name in names if names.count(name) > 1))}")
    return found


def finite(digits: str) -> float:
    """``float(digits)``. Raises ValueError for a number that is too large for one."""
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError("number out of range")
    return number


def _json_fault(value: Any, path: str) -> str | None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"{path} holds the lone surrogate {value[error.start]!r}, which is not a character"
    elif isinstance(value, float):
        if not math.isfinite(value):
            return f"{path} is {value!r}, which is not a JSON number"
    elif isinstance(value, list | tuple):
        inner = ((item, f"{path}[{n}]") for n, item in enumerate(value))
        return next((fault for item, where in inner if (fault := _json_fault(item, where))), None)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"{path} has the key {key!r}, which is not a string"
            if fault := _json_fault(key, f"a key of {path}") or _json_fault(item, f"{path}.{key}"):
                return fault
    elif isinstance(value, int):
        if value.bit_length() > _MOST_BITS:
            return f"{path} is a number with too many digits to be written"
    elif value is not None:
        return f"{path} is of type {type(value).__name__}, which is not JSON"
    return None


def _refuse(constant: str) -> float:
    raise ValueError(f"the constant {constant}")


_DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_float=finite, parse_constant=_refuse)
