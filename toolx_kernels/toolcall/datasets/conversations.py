"""Conversations as rows: OpenAI's messages, TRL's prompt and completion, and ShareGPT's turns, as Hermes has them.

The calls of the assistant's first turn with calls are the answer, what comes before it is the prompt, and what follows
is cut. Of a conversation without calls, the answer is [] and the prompt ends before the assistant's first turn.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from toolx_kernels.errors import InputError, short
from toolx_kernels.toolcall.datasets.offered import LeftOutError, read_tools, values_in
from toolx_kernels.toolcall.datasets.queries import TOOLS, named
from toolx_kernels.toolcall.parse import read
from toolx_kernels.toolcall.rows import Row, chat_message, messages_in, read_call
from toolx_kernels.toolcall.strict_json import json_value
from toolx_kernels.toolcall.tool_format import FORMATS

CALLS = "function_call"  # a turn whose text is a call, or a list of calls
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
    **dict.fromkeys((CALLS, "function-call", "tool_call", "tool_calls"), CALLS),
    **dict.fromkeys(
        ("tool", "function", "observation", "ipython", "function_response", "function-response", "tool_response"),
        "tool",
    ),
}
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_TOOLS = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)


class Converted(NamedTuple):
    """A row in our form, and whether a part of its conversation was cut."""

    row: Mapping | Row
    cut: bool = False


def from_openai(raw: Mapping, place: str) -> Converted:
    """Converts a row with ``messages`` and ``tools`` to ours; see ``read_tools`` for tools, ``chat_message`` for
    messages, and ``conversation_row``."""
    return conversation_row(raw, _messages(raw, "messages", place), place, ["messages"])


def from_trl(raw: Mapping, place: str) -> Converted:
    """Converts a row with ``prompt``, ``completion`` (each text or messages, which may be written as text) and
    ``tools``: the answer is in the completion."""
    prompt, completion = _messages(raw, "prompt", place), _messages(raw, "completion", place)
    return conversation_row(raw, [*prompt, *completion], place, ["prompt", "completion"], len(prompt))


def from_sharegpt(raw: Mapping, place: str) -> Converted:
    """Converts a row with ``conversations`` (each turn ``from`` and ``value``, or ``role`` and ``content``), optionally
    ``system``, and ``tools``, or else a system text that lists the tools between <tools> tags."""
    messages, system = _messages(raw, "conversations", place), raw.get("system")
    if system:
        messages.insert(0, _message({"role": "system", "content": system}, f"{place}: field 'system'"))
    return conversation_row(raw, messages, place, ["conversations", "system"])


def conversation_row(raw: Mapping, messages: list[dict], place: str, used: list[str], start: int = 0) -> Converted:
    """Converts ``messages``, whose answer comes at ``start`` or later, to a row. Fields of ``raw`` that are not among
    those ``used`` become columns.

    A system text with tools between <tools> tags asks for calls in a format of its own, so it does not become part of
    the prompt; these tools are offered unless there is a field of tools.

    Raises:
        InputError: beginning with ``place``, if the tools are no list of functions.
        LeftOutError: there are no tools or no turn of the assistant, or its calls cannot be read or are of other tools.
    """
    field = named(raw, TOOLS)
    tools = read_tools(raw[field] if field else _listed(messages), place)
    if not tools:
        raise LeftOutError("no tools")
    turns = [n for n, message in enumerate(messages) if n >= start and message["role"] in ("assistant", CALLS)]
    calls = {n: found for n in turns if (found := _calls(messages[n]))}
    if not turns:
        raise LeftOutError("no turn of the assistant")
    begin = end = next(iter(calls), turns[0])
    names = {name for tool in tools if isinstance(name := tool.get("name"), str)}
    if not calls and _mentions(messages[begin]["content"], names):
        raise LeftOutError("calls that cannot be read")
    answer: list[dict] = []
    while end in calls:  # calls in parallel may each have a turn
        answer += calls[end]
        end += 1
    if any(call["name"] not in names for call in answer):
        raise LeftOutError("a call of a tool that the row does not offer")
    prompt = [m for m in messages[:begin] if m["role"] != "system" or not _TOOLS.search(m["content"])]
    if not any(message["role"] == "user" for message in prompt):
        raise LeftOutError("no turn of the user before the assistant's")
    columns = {key: value for key, value in raw.items() if key not in (*used, field)}
    return Converted(
        {**columns, "prompt": prompt, "tools": tools, "answer": answer}, max(end, begin + 1) < len(messages)
    )


def _messages(raw: Mapping, name: str, place: str) -> list[dict]:
    turns: Any = raw.get(name)
    if isinstance(turns, str) and name in ("prompt", "completion"):
        turns = messages_in(turns) or [{"role": "user" if name == "prompt" else "assistant", "content": turns}]
    if isinstance(turns, str):
        turns = json_value(turns, f"{place}: field {name!r}", "write it as a list")
    if not isinstance(turns, list):
        raise InputError(f"{place}: field {name!r} must be a list of messages, not {short(turns)}.")
    return [_message(turn, f"{place}: message {n} of field {name!r}") for n, turn in enumerate(turns)]


def _message(turn: Any, place: str) -> dict:
    if isinstance(turn, Mapping) and "from" in turn:
        turn = {"role": turn["from"], "content": turn.get("value")}
    message = chat_message(turn, place)
    if message["role"] not in _ROLES:
        raise InputError(f"{place} has the unknown role {message['role']!r}: use one of {', '.join(_ROLES)}.")
    return {**message, "role": _ROLES[message["role"]]}


def _listed(messages: list[dict]) -> list[Any]:
    """The tools between the tags of a system text."""
    texts = [text for m in messages if m["role"] == "system" for text in _TOOLS.findall(m["content"]) if text.strip()]
    found = [values_in(text) for text in texts]
    if None in found:
        raise LeftOutError("tools that cannot be read")
    return [tool for tools in found for tool in tools or ()]


def _calls(message: Mapping) -> list[dict]:
    """The calls of an assistant's turn, in its ``tool_calls`` or its text; [] without any."""
    if "tool_calls" in message:
        return [call["function"] for call in message["tool_calls"]]
    text = message["content"]
    if message["role"] != CALLS and "<tool_call>" not in text:
        readings = (read(text, form) for form in FORMATS.values())
        return next((reading.calls for reading in readings if reading.calls and reading.bare), [])
    blocks = _CALL.findall(text)
    if len(blocks) != text.count("<tool_call>"):
        raise LeftOutError("calls that cannot be read")
    found = [values_in(block) for block in blocks or [text]]
    calls = [read_call(value) for values in found for value in values or [None]]
    if None in calls:
        raise LeftOutError("calls that cannot be read")
    return [call for call in calls if call]


def _mentions(text: str, names: set) -> bool:
    """Whether a text has one of ``names`` in quotes or before a parenthesis, as calls in some other notation would."""
    return any(re.search(rf"""(["']){re.escape(str(name))}\1|\b{re.escape(str(name))}\(""", text) for name in names)
