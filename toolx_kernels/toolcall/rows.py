"""Dataset rows: one prompt, the tools it offers, the calls that answer it. Checked once, here."""

import copy
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from toolx_kernels.errors import InputError, first_line, short
from toolx_kernels.toolcall.bfcl_match import possible_fault
from toolx_kernels.toolcall.pythonic import read_value
from toolx_kernels.toolcall.schema import schema_fault
from toolx_kernels.toolcall.strict_json import is_shallow, json_at, json_fault, json_value, read_json

_RESERVED = ("prompts", "completions", "completion_ids")


class _ToolNotOfferedError(InputError):
    """A row's answer calls a tool that it does not offer. Counted over the whole dataset, because many such rows mean a
    wrong conversion."""


@dataclass(frozen=True, slots=True)
class Row:
    """One checked sample.

    ``tools`` are JSON-schema functions, ``{"type": "function", "function": {"name", "description"?, "parameters"}}``;
    ``answer`` is the list of expected calls, ``{"name", "arguments"}``, empty if no call should be made; ``columns``
    holds all other fields of the dataset, which reward functions receive as keyword arguments.
    """

    id: str
    prompt: str | list[dict]
    tools: list[dict]
    answer: list[dict]
    columns: dict = field(default_factory=dict)

    @property
    def messages(self) -> list[dict]:
        """The prompt as chat messages; a string prompt is one user message."""
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt

    @property
    def user_text(self) -> str:
        """The user's last message."""
        return next(message["content"] for message in reversed(self.messages) if message["role"] == "user")

    @property
    def tool_names(self) -> list[str]:
        """Names of the offered tools, in order."""
        return [tool["function"]["name"] for tool in self.tools]


def check_row(raw: Mapping, where: str, index: int) -> Row:
    """Checks ``raw``, a mapping with ``prompt``, ``tools``, ``answer``, optionally ``id``, and free columns.

    The prompt is text or a list of chat messages (``chat_message``), which may be written as text (``messages_in``).

    Tools and calls may be in OpenAI's form, ``{"type": "function", "function": {...}}``, or bare, as ``{"name",
    "parameters"}`` and ``{"name", "arguments"}``; ``tools`` and ``answer`` may be JSON text. ``where`` (a file, a
    dataset name) and ``index`` (line or position) name the row in messages, and if it has no id its last name and
    ``index`` are the id, which therefore stays the same if folders are moved. The free column ``possible_answers`` (see
    ``bfcl_match``) requires ``category``; ``tier`` and ``category`` name the parts of a score. A column of None counts
    as absent.

    Raises InputError, naming row and field, for a missing or empty prompt, missing tools, tools that are not JSON
    schemas or share a name, an answer that is missing, not a list of calls or calls a tool that is not offered, values
    that are not JSON (``json_fault``), a column whose name is not text or is reserved for reward functions, a column
    that is nested too deep or cannot be copied, possible answers that ``bfcl_match`` cannot use, or a tier or
    category that is not a string or is "accuracy", the name of the total score.
    """
    place = f"{where}:{index}"
    if not isinstance(raw, Mapping):
        raise InputError(f"{place}: a row must be an object with prompt, tools and answer, not {short(raw)}.")
    if isinstance(raw.get("id"), int | list | dict):  # before it is written
        _check_json(raw["id"], "id", place)
    row_id = f"{where.rpartition('/')[2]}:{index}"
    if raw.get("id") is not None:
        row_id = str(raw["id"])
        place += f" (id {row_id!r})"
        _check_json(row_id, "id", place)
    if odd := [name for name in raw if not isinstance(name, str)]:
        raise InputError(f"{place}: the name of a column must be text, not {short(odd[0])}: rename the column.")
    for name in _RESERVED:
        if name in raw:
            raise InputError(f"{place}: the column name {name!r} is reserved for reward functions: rename the column.")
    prompt = _prompt(raw.get("prompt"), place)
    tools = [_tool(tool, place, n) for n, tool in enumerate(_list(raw, "tools", place))]
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{place}: field 'tools' offers {twice!r} twice: give each tool of a row a different name.")
    answer = [_call(call, place, n, names) for n, call in enumerate(_list(raw, "answer", place))]
    columns = {key: value for key, value in raw.items() if key not in ("id", "prompt", "tools", "answer")}
    _check_columns(columns, tools, place)
    return Row(row_id, prompt, tools, answer, columns)


def check_rows(raws: Iterable[Mapping | Row], where: str) -> list[Row]:
    """Checks each row (``check_row``, numbered from 0; a ``Row`` passes unchanged) and all of them together.

    Raises InputError for an invalid row, an empty dataset, or an id that occurs twice. Rows that call a tool which they
    do not offer are counted over the whole dataset.
    """
    return check_numbered(enumerate(raws), where)


def check_numbered(numbered: Iterable[tuple[int, Mapping | Row]], where: str) -> list[Row]:
    """``check_rows`` for numbered rows, such as the lines of a file."""
    rows, unoffered, total = [], [], 0
    for number, raw in numbered:
        total += 1
        try:
            rows.append(raw if isinstance(raw, Row) else check_row(raw, where, number))
        except _ToolNotOfferedError as error:
            unoffered.append(error)
    if unoffered:
        raise InputError(
            f"{where}: the answers of {len(unoffered)} of {total} rows call a tool that the row does not offer; the"
            f" first: {unoffered[0]}"
        ) from unoffered[0]
    return check_set(rows, where)


def check_set(rows: list[Row], where: str) -> list[Row]:
    """Returns ``rows``. Raises InputError if there are none or two share an id."""
    if not rows:
        raise InputError(f"{where} holds no rows: give a dataset with at least one.")
    seen = set()
    for row in rows:
        if row.id in seen:
            raise InputError(
                f"{where}: the id {row.id!r} occurs twice: give each row an id of its own, or leave ids out and give"
                " each file a name of its own."
            )
        seen.add(row.id)
    return rows


def with_calls(rows: Iterable[Row], calls: int) -> list[Row]:
    """The rows whose answer has exactly ``calls`` calls. Raises InputError, which lists the numbers that occur, if
    there are none."""
    rows = list(rows)
    kept = [row for row in rows if len(row.answer) == calls]
    if not kept:
        there = sorted(Counter(len(row.answer) for row in rows).items())
        raise InputError(
            f"none of {len(rows)} rows has {calls} calls in its answer: give one of the numbers that occur,"
            f" {', '.join(f'{number} ({count} rows)' for number, count in there)}."
        )
    return kept


def messages_in(text: str) -> list[dict] | None:
    """The chat messages that a text writes as a list of objects with a ``role``, in JSON or, as pandas writes lists
    into a CSV file, Python's notation. None for any other text."""
    text = text.strip()
    try:
        value, end = (json_at(text, 0) or read_value(text)) if text.startswith("[") else (None, 0)
    except ValueError:
        return None
    is_chat = isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value)
    return value if is_chat and end == len(text) else None


def chat_message(raw: Any, place: str) -> dict:
    """The chat message ``raw`` as templates expect it: a ``role``, a ``content`` that is text, and other keys.

    Keys of None are dropped. The text parts of a content are joined, and a tool's result that is no text becomes JSON.
    ``tool_calls``, or without any OpenAI's older ``function_call``, become a list of ``{"type": "function", "function":
    {"name", "arguments": object}}``. Beside either of these, even an empty list, the content may be absent, and becomes
    "".

    Raises InputError, with ``place``, for anything else.
    """
    message = {key: value for key, value in raw.items() if value is not None} if isinstance(raw, Mapping) else {}
    older = [message.pop("function_call")] if "function_call" in message else None
    listed: Any = message.pop("tool_calls", older)
    calls = listed or older
    parts = message.get("content", None if listed is None else "")
    if isinstance(parts, list) and all(map(_is_text, parts)):
        parts = "".join(part.get("text") or "" for part in parts)
    elif message.get("role") == "tool" and not isinstance(parts, str):  # the value that a tool returned
        parts = json.dumps(parts, ensure_ascii=False)
    if not isinstance(message.get("role"), str) or not isinstance(parts, str):
        raise InputError(
            f"{place} must have a 'role' and a 'content' that are strings (beside 'tool_calls', the content may be"
            f" null), not {short(raw)}."
        )
    message["content"] = parts
    if calls:
        read = [read_call(call) for call in calls] if isinstance(calls, list) else [None]
        if None in read:
            raise InputError(
                f"{place} has 'tool_calls' that are not a list of calls with a name and arguments (an object, or JSON"
                f" text of one): {short(calls)}: fix them."
            )
        ids = [{"id": call["id"]} if call.get("id") is not None else {} for call in calls]
        message["tool_calls"] = [
            {**named, "type": "function", "function": call} for named, call in zip(ids, read, strict=True)
        ]
    return message


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str | None)


def read_call(value: Any) -> dict | None:
    """The call ``{"name", "arguments": object}`` in ``value``, which has these keys or OpenAI's form, ``{"function":
    {"name", "arguments"}}``; None if it is no call. The arguments may be JSON text, or null for none."""
    call = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or "arguments" not in call:
        return None
    arguments = {} if call["arguments"] in (None, "") else call["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = read_json(arguments)
        except (ValueError, RecursionError):
            return None
    return {"name": call["name"], "arguments": dict(arguments)} if isinstance(arguments, Mapping) else None


def _check_json(value: Any, name: str, place: str) -> None:
    if fault := json_fault(value, name):
        raise InputError(f"{place}: {fault}: fix field {name!r} or leave the row out.")


def _check_columns(columns: dict, tools: list[dict], place: str) -> None:
    for name, value in columns.items():
        if isinstance(value, dict | list | tuple) and not is_shallow(value):
            _check_json(value, name, place)
        if json_fault(value, name):  # reward functions may take more than JSON, but receive a copy
            try:
                copy.deepcopy(value)
            except Exception as error:  # of whatever class the column holds
                raise InputError(
                    f"{place}: field {name!r} is {short(value)}, which cannot be copied for reward functions"
                    f" ({first_line(error)}): give values such as text and numbers, or leave the column out."
                ) from error
    for name in ("tier", "category"):
        part = columns.get(name)
        if part is not None and (not isinstance(part, str) or part == "accuracy"):
            raise InputError(
                f"{place}: field {name!r} is {short(part)}, which cannot name a part of the score: give a string other"
                " than 'accuracy'."
            )
    possible = columns.get("possible_answers")
    if possible is None:
        return
    if columns.get("category") is None:
        raise InputError(
            f"{place}: field 'possible_answers' needs a field 'category': add a BFCL category such as 'multiple'."
        )
    _check_json(possible, "possible_answers", place)
    if fault := possible_fault(tools, possible, columns["category"]):
        raise InputError(f"{place}: field 'possible_answers' cannot be used ({fault}): fix it or leave it out.")


def _prompt(prompt: Any, place: str) -> str | list[dict]:
    if not prompt or isinstance(prompt, str) and not prompt.strip():
        raise InputError(f"{place}: field 'prompt' is missing or empty: give a string or a list of chat messages.")
    if isinstance(prompt, str):
        prompt = messages_in(prompt) or prompt
    _check_json(prompt, "prompt", place)
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise InputError(f"{place}: field 'prompt' must be a string or a list of chat messages, not {short(prompt)}.")
    messages = [chat_message(message, f"{place}: message {n} of field 'prompt'") for n, message in enumerate(prompt)]
    if not any(message["role"] == "user" for message in messages):
        raise InputError(f"{place}: field 'prompt' holds no message of role 'user': add one.")
    return messages


def _list(raw: Mapping, name: str, place: str) -> list:
    value = raw.get(name)
    if value is None:
        wanted = "a list of JSON-schema functions" if name == "tools" else "a list of calls ([] if none is right)"
        raise InputError(f"{place}: field {name!r} is missing: give {wanted}.")
    if isinstance(value, str):
        value = json_value(value, f"{place}: field {name!r}", "write it as a list")
    if not isinstance(value, list):
        raise InputError(f"{place}: field {name!r} must be a list, not {short(value)}.")
    _check_json(value, name, place)
    return value


def _tool(tool: Any, place: str, n: int) -> dict:
    function: Any = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{place}: tool {n} of field 'tools' must be a function with 'name' and 'parameters', not {short(tool)}."
        )
    if "parameters" not in function:
        raise InputError(f"{place}: tool {name!r} has no 'parameters': give it a JSON schema of type 'object'.")
    parameters = function["parameters"]
    if isinstance(parameters, str) and parameters.lstrip().startswith("{"):
        parameters = json_value(parameters, f"{place}: field 'parameters' of tool {name!r}", "write it as an object")
        _check_json(parameters, "tools", place)
    fault = schema_fault(parameters, "parameters")
    if fault is None and parameters.get("type", "object") != "object":
        fault = f"parameters.type is {parameters['type']!r}, not 'object'"
    if fault:
        raise InputError(f"{place}: tool {name!r} of field 'tools' is not a JSON schema ({fault}): fix it.")
    return {"type": "function", "function": {**function, "parameters": parameters}}


def _call(call: Any, place: str, n: int, offered: list[str]) -> dict:
    if isinstance(call, Mapping) and "function" in call:  # OpenAI's form
        call = read_call(call) or call
    well_formed = (
        isinstance(call, Mapping)
        and set(call) == {"name", "arguments"}
        and isinstance(call["name"], str)
        and isinstance(call["arguments"], Mapping)
    )
    if not well_formed:
        raise InputError(
            f"{place}: call {n} of field 'answer' must be {{'name': text, 'arguments': object}}, not {short(call)}."
        )
    if call["name"] not in offered:
        raise _ToolNotOfferedError(
            f"{place}: call {n} of field 'answer' is of {call['name']!r}, a tool that the row does not offer: add it to"
            " 'tools' or fix the answer."
        )
    return {"name": call["name"], "arguments": dict(call["arguments"])}
