"""Parsing of the text that a model printed into calls. Nothing printed can make this raise, hang, or be run as code."""

import json
import re
from typing import Any

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
MAX_DEPTH = 64  # deeper arguments count as malformed, so that whoever walks a parsed call may recurse

_TAG = re.compile(f"{OPEN}|{CLOSE}")
_NOT_SPACE = re.compile(r"\S")


def parse_calls(text: str) -> list[dict] | None:
    """The calls ``{"name", "arguments"}`` of all ``<tool_call>`` blocks in ``text``, in order.

    ``[]`` when there is no block; None when a block is malformed. A block holds one JSON object with exactly the keys
    ``name`` (a string) and ``arguments`` (an object), which is what Qwen's templates print and its tool prompt asks
    for. Malformed are: unbalanced or nested tags, invalid JSON (also NaN, Infinity and raw control characters in
    strings), a repeated key, a number that Python cannot hold (1e999, thousands of digits), other or missing keys,
    values of another type, and nesting deeper than ``MAX_DEPTH``. Tags inside a JSON string are text. Linear in the
    length of ``text``.
    """
    calls, _ = _scan(text)
    return calls


def only_calls(text: str) -> bool:
    """Whether ``text`` is well-formed blocks and white space, nothing else (true of blank text)."""
    calls, bare = _scan(text)
    return calls is not None and bare


def read_json(text: str) -> Any:
    """The value of a JSON text, read as strictly as calls are. Raises ValueError for what is not JSON, NaN, Infinity, a
    number that Python cannot hold and a repeated key; RecursionError for nesting beyond Python's limit."""
    return _DECODER.decode(text)


def is_shallow(value: dict | list | tuple) -> bool:
    """Whether at most ``MAX_DEPTH`` objects and arrays lie within each other in ``value``, itself counted."""
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


def skip_space(text: str, start: int) -> int:
    """Where the white space that begins at ``start`` ends."""
    found = _NOT_SPACE.search(text, start)
    return found.start() if found else len(text)


def _scan(text: str) -> tuple[list[dict] | None, bool]:
    """The calls, and whether only white space lies outside the blocks."""
    calls: list[dict] = []
    bare, end = True, 0
    while tag := _TAG.search(text, end):
        bare = bare and not text[end : tag.start()].strip()
        if tag.group() == CLOSE:
            return None, False
        try:
            call, stop = _DECODER.raw_decode(text, skip_space(text, tag.end()))
        except (ValueError, RecursionError):
            return None, False
        end = skip_space(text, stop)
        if not text.startswith(CLOSE, end) or not _is_call(call):
            return None, False
        end += len(CLOSE)
        calls.append(call)
    return calls, bare and not text[end:].strip()


def _is_call(call: Any) -> bool:
    return (
        isinstance(call, dict)
        and call.keys() == {"name", "arguments"}
        and isinstance(call["name"], str)
        and isinstance(call["arguments"], dict)
        and is_shallow(call)
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("repeated key")
    return unique


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError("number out of range")
    return number


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse)
