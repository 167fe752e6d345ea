"""Rows of ToolACE."""

import json
from collections.abc import Mapping
from typing import Any

from toolx_kernels.errors import InputError, short
from toolx_kernels.toolcall.datasets.conversations import Converted
from toolx_kernels.toolcall.datasets.offered import LeftOutError, each_once
from toolx_kernels.toolcall.datasets.type_names import json_schema
from toolx_kernels.toolcall.pythonic import read_arguments

_ROLES = {"human": "user", "gpt": "assistant"}


def from_toolace(raw: Mapping, place: str) -> Converted:
    """Converts a row of ToolACE's format that has one user turn to ours.

    The system text contains the tools as a JSON list; the assistant's first reply is ``[name(arg=value, ...), ...]``,
    or prose if no call is right. What follows is cut.

    Raises:
        InputError: beginning with ``place``, if the row is not in that format.
        LeftOutError: it has more than one user turn, no list of tools, two different tools of one name, or calls that
            cannot be read.
    """
    system, turns = _fields(raw, place)
    roles = [_ROLES.get(turn["from"], turn["from"]) for turn in turns]
    if roles.count("user") != 1 or roles[:2] != ["user", "assistant"]:
        raise LeftOutError("more than one user turn")
    tools = _tools(system)
    if tools is None:
        raise LeftOutError("no list of tools in the system text")
    answer = _calls(turns[1]["value"], [tool["name"] for tool in tools])
    if answer is None:
        raise LeftOutError("calls that cannot be read")
    columns = {key: value for key, value in raw.items() if key not in ("system", "conversations")}
    return Converted({**columns, "prompt": turns[0]["value"], "tools": tools, "answer": answer}, len(turns) > 2)


def _fields(raw: Any, place: str) -> tuple[str, list]:
    """Checks a row and returns its system text and its turns."""
    system, turns = (raw.get("system"), raw.get("conversations")) if isinstance(raw, Mapping) else (None, None)
    if not isinstance(system, str) or not isinstance(turns, list):
        raise InputError(
            f"{place}: a row in ToolACE's format has a string 'system' and a list 'conversations', not {short(raw)}."
        )
    for turn in turns:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            raise InputError(
                f"{place}: a turn of field 'conversations' must have a 'from' and a 'value' that are strings, not"
                f" {short(turn)}."
            )
    return system, turns


def _tools(system: str) -> list[dict] | None:
    decoder, start = json.JSONDecoder(), system.find("[{")
    while start >= 0:
        try:
            tools, _ = decoder.raw_decode(system, start)
        except (ValueError, RecursionError):
            start = system.find("[{", start + 1)
            continue
        if all(isinstance(tool, dict) and isinstance(tool.get("name"), str) for tool in tools):
            return each_once(
                {
                    "name": tool["name"],
                    "description": tool.get("description") or "",
                    "parameters": json_schema(parameters, any_as="string")
                    if isinstance(parameters, dict)
                    else parameters,
                }
                for tool in tools
                for parameters in [tool.get("parameters") or {"type": "object", "properties": {}}]
            )
        start = system.find("[{", start + 1)
    return None


def _calls(text: str, names: list[str]) -> list[dict] | None:
    """Reads calls with Python literals as keyword arguments. Tool names may contain any signs, so only the names that
    the row offers are recognized."""
    rest = text.strip()
    if not rest.startswith("["):
        return []
    calls, rest = [], rest[1:].lstrip()
    while True:
        name = max((name for name in names if rest.startswith(name + "(")), key=len, default=None)
        if name is None:
            return None
        try:
            arguments, end = read_arguments(rest, len(name) + 1)
        except ValueError:
            return None
        rest = rest[end:].lstrip()
        calls.append({"name": name, "arguments": arguments})
        if rest == "]":
            return calls
        if not rest.startswith(","):
            return None
        rest = rest[1:].lstrip()
