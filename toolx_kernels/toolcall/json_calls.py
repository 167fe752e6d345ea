"""Calls as JSON objects within any text, ``{"name": ..., "arguments": ...}`` and its kin."""

import re
from typing import Any, NamedTuple

from toolx_kernels.toolcall.strict_json import is_shallow, json_at, read_json, skip_space

# Where an object, or a list of them, begins that may be a call: by its first key, however that is quoted.
_START = r"""(?:\[\s*)?\{\s*["']?(?:(?:name|arguments|parameters|function|id)["']?\s*:|type["']?\s*:\s*["']?function)"""
# Or where arguments stand in an object that begins otherwise, and so is no call.
OPENER = rf"""{_START}|["'](?:arguments|parameters)["']\s*:\s*\{{"""
_STARTS = re.compile(_START)


class Block(NamedTuple):
    """Calls that stand together in a text.

    >>> json_block('Yes: {"name": "f", "arguments": {}}!', 5)
    Block(calls=[{'name': 'f', 'arguments': {}}], end=35, bare=True)
    """

    calls: list[dict]  # each {"name", "arguments"}; none: what looked like calls is text
    end: int  # where the block ends in the text
    bare: bool = True  # whether it is the calls and what the form puts around them, nothing else


def json_block(text: str, start: int, with_id: bool = False) -> Block | None:
    """The calls in the JSON values that stand one after another from ``start`` on, where ``OPENER`` matches: objects
    and lists of them, between them white space and at most one comma or semicolon. None when one is no JSON, or is
    meant as a call and is none.

    A call is an object with exactly ``name`` (a string) and one of ``arguments`` and ``parameters`` (an object),
    perhaps ``"type": "function"``, and, ``with_id``, perhaps an ``id``; or one of OpenAI's, ``{"type": "function",
    "function": {"name", "arguments"}}``, perhaps with an ``id``, whose arguments may be JSON text. Calls deeper in a
    value that is no call and no list of calls count too; ``bare`` says that there are none such.
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
    """``value`` where it is a call with exactly the keys ``name`` and ``arguments``, else None."""
    well_formed = (
        isinstance(value, dict)
        and value.keys() == {"name", "arguments"}
        and isinstance(value["name"], str)
        and isinstance(value["arguments"], dict)
    )
    return value if well_formed else None


def _calls_in(value: Any, with_id: bool) -> list[dict] | None:
    """The calls in ``value``, which is shallow, in order; None when one that is meant as a call is none."""
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
    """Whether a value is a call, or comes so near to one that it cannot be meant as anything else."""
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
    """Whether what a call may have besides its parts is as it should be."""
    return value.get("type", "function") == "function" and isinstance(value.get("id", ""), str)
