"""JSON calls within any text: ``{"name": ..., "arguments": ...}`` and related objects."""

import re
from typing import Any, NamedTuple

from toolx_kernels.toolcall.strict_json import is_shallow, json_at, read_json, skip_space

# The beginning of an object, or of a list of objects, that may be a call: its first key, however quoted.
_START = r"""(?:\[\s*)?\{\s*["']?(?:(?:name|arguments|parameters|function|id)["']?\s*:|type["']?\s*:\s*["']?function)"""
# Or the arguments in an object that begins differently, and so is not a call.
OPENER = rf"""{_START}|["'](?:arguments|parameters)["']\s*:\s*\{{"""
_STARTS = re.compile(_START)


class Block(NamedTuple):
    """Adjacent calls in a text.

    >>> json_block('Yes: {"name": "f", "arguments": {}}!', 5)
    Block(calls=[{'name': 'f', 'arguments': {}}], end=35, bare=True)
    """

    calls: list[dict]  # each {"name", "arguments"}; empty: what looked like calls is text
    end: int  # the end of the block in the text
    bare: bool = True  # whether it holds only the calls and what the format puts around them


def json_block(text: str, start: int, with_id: bool = False) -> Block | None:
    """Reads the calls in consecutive JSON values from ``start`` on, where ``OPENER`` matches.

    The values are objects or lists of objects, separated by white space and at most one comma or semicolon. Returns
    None if one is not JSON, or is meant as a call and is malformed.

    A call is an object with exactly ``name`` (a string) and either ``arguments`` or ``parameters`` (an object),
    optionally ``"type": "function"`` and, ``with_id``, an ``id``; or OpenAI's ``{"type": "function", "function":
    {"name", "arguments"}}``, optionally with an ``id``, whose arguments may be JSON text. Calls nested in other values
    count too, but then the block is not ``bare``.
    """
    calls: list[dict] = []
    bare, at, end = True, start, start
    while _STARTS.match(text, at):
        found = json_at(text, at)
        inside = found and _calls_in(found[0], with_id)
        if found is None or inside is None:
            return None
        value, end = found
        calls += inside
        bare = bare and all(map(_is_meant, value if isinstance(value, list) else [value]))
        at = skip_space(text, end)
        if text.startswith((",", ";"), at):
            at = skip_space(text, at + 1)
    return Block(calls, end, bare) if end > start else None


def hermes_call(value: Any) -> dict | None:
    """``value`` if it is a call with exactly the keys ``name`` and ``arguments``, else None."""
    well_formed = (
        isinstance(value, dict)
        and value.keys() == {"name", "arguments"}
        and isinstance(value["name"], str)
        and isinstance(value["arguments"], dict)
    )
    return value if well_formed else None


def _calls_in(value: Any, with_id: bool) -> list[dict] | None:
    """The calls in ``value``, which is shallow, in order; None if one that is meant as a call is malformed."""
    if _is_meant(value):
        call = _call(value, with_id)
        return None if call is None else [call]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    calls: list[dict] = []
    for part in inner:
        found = _calls_in(part, with_id)
        if found is None:
            return None
        calls += found
    return calls


def _is_meant(value: Any) -> bool:
    """Whether a value is a call, or so close to one that it cannot be meant as anything else."""
    if not isinstance(value, dict):
        return False
    named = isinstance(value.get("name"), str)
    return (
        "arguments" in value
        or value.get("type") == "function"
        or isinstance(value.get("function"), dict)
        or ("parameters" in value and (named or "function" in value))
        or (named and len(value) == 1)
    )


def _call(value: dict, with_id: bool) -> dict | None:
    if isinstance(function := value.get("function"), dict):
        if not value.keys() <= {"type", "function", "id"} or not _is_plain(value):
            return None
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                function = {**function, "arguments": read_json(arguments)}
            except (ValueError, RecursionError):
                return None
        call = hermes_call(function)
        return call if call is not None and is_shallow(call) else None
    extra = value.keys() - {"name", "arguments", "parameters"}
    if not extra <= ({"type", "id"} if with_id else {"type"}) or not _is_plain(value):
        return None
    parts = [value[key] for key in ("arguments", "parameters") if key in value]
    return hermes_call({"name": value.get("name"), "arguments": parts[0]}) if len(parts) == 1 else None


def _is_plain(value: dict) -> bool:
    """Whether the optional members of a call have valid values."""
    return value.get("type", "function") == "function" and isinstance(value.get("id", ""), str)
