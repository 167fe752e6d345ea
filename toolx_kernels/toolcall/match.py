"""Exact match of calls with an answer."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from toolx_kernels.toolcall.schema import whole_numbers


def exact_match(calls: list[dict] | None, answer: list[dict], tools: Sequence[dict] | None = None) -> bool:
    """Whether ``calls`` and ``answer`` are the same multiset of (name, arguments).

    Types are JSON's and strict: True is not 1, and 1 is not 1.0, but -0.0 is 0.0. Order matters inside lists, not
    between calls or keys. None (malformed output) never matches.

    With ``tools``, those of the row, 1 and 1.0 are the same where a tool's schema has a number or, as JSON Schema
    means it, an integer; also inside arrays and objects, and in one of several alternatives. Their values are compared
    exactly: 2**53 + 1 is not 2.0**53. Where the schema says nothing, and in tools that are no JSON-schema functions,
    they stay different.
    """
    if calls is None:
        return False
    if _keys(calls) == _keys(answer):
        return True
    if tools is None or _keys(calls, loose_key) != _keys(answer, loose_key):
        return False  # most wrong calls, without a look at their schemas
    return _keys(alike(calls, tools)) == _keys(alike(answer, tools))


def call_key(call: dict) -> str:
    """A string that two calls share exactly if ``exact_match`` considers them equal without tools."""
    text = json.dumps([call["name"], call["arguments"]], sort_keys=True)
    if "-0.0" not in text:
        return text
    return json.dumps([call["name"], _with_floats(call["arguments"], lambda number: number or 0.0)], sort_keys=True)


def loose_key(call: dict) -> str:
    """A string that two calls share if ``exact_match`` considers them equal with any tools."""
    return json.dumps([call["name"], _with_floats(call["arguments"], _whole)], sort_keys=True)


def alike(calls: Sequence[dict], tools: Sequence[dict]) -> list[dict]:
    """``calls`` with 1 instead of 1.0 where ``exact_match`` with ``tools`` considers them equal."""
    schemas: dict[str, Any] = {}
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            schemas[function["name"]] = function.get("parameters")
    return [{**call, "arguments": whole_numbers(call["arguments"], schemas.get(call["name"]))} for call in calls]


def _with_floats(value: Any, change: Callable[[float], float]) -> Any:
    """``value`` with ``change`` of each float in it."""
    if isinstance(value, dict):
        return {key: _with_floats(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_floats(item, change) for item in value]
    return change(value) if isinstance(value, float) else value


def _whole(number: float) -> float:
    return int(number) if number.is_integer() else number


def _keys(calls: Sequence[dict], key: Callable[[dict], str] = call_key) -> list[str]:
    return sorted(map(key, calls))
