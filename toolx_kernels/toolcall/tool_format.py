"""Tool formats of models' calls: how each format is found in a text, read, requested and written."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import pythonic
from toolx_kernels.toolcall.json_calls import OPENER, Block, hermes_call, json_block
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.strict_json import is_shallow, json_at, skip_space

_BARE_NAME = r"[^\[\]{}\"\s](?:[^\[\]{}\"\n]*[^\[\]{}\"\s])?"  # a name before [ARGS]
_NAMED = re.compile(rf"({_BARE_NAME})(?:\[CALL_ID\][\w\-]*)?(?:\s*\[ARGS\])?\s*(?=\{{)")
_LIST = re.compile(pythonic.LIST)
_PYTHONIC = re.compile(rf"<\|tool_call_(?:start|end)\|>|{pythonic.LIST}")
_MISTRAL = re.compile(rf"\[(?:TOOL_CALLS|ARGS|CALL_ID)\]|{OPENER}")


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One format of calls. docs/tool_calls.md says what each counts as a call, as malformed and as bare.

    >>> PYTHONIC.render([{"name": "f", "arguments": {"x": 1}}])
    '[f(x=1)]'
    """

    name: str
    markers: tuple[str, ...]  # its strings that may be single tokens of a vocabulary
    opener: re.Pattern[str]  # the beginning of what is, or looks like, calls
    request: str  # the end of the tool prompt in a system message
    answer: str  # a description of an answer, as part of a sentence
    reader: Callable[[str, re.Match[str]], Block | None]
    writer: Callable[[list[dict]], str]

    def block(self, text: str, found: re.Match[str]) -> Block | None:
        """Reads the calls that begin at ``found``, a match of ``opener`` in ``text``; None if they are malformed. Takes
        time linear in what it reads."""
        return self.reader(text, found)

    def render(self, calls: Sequence[dict]) -> str:
        """Writes ``calls`` in one of the variants that are read; no calls give the empty string.

        Raises InputError for a name that the format cannot express.
        """
        return self.writer([{"name": c["name"], "arguments": c["arguments"]} for c in calls]) if calls else ""


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _read_hermes(text: str, found: re.Match[str]) -> Block | None:
    if found.group() != "<tool_call>":
        return None
    read = json_at(text, skip_space(text, found.end()))
    if read is None or hermes_call(read[0]) is None:
        return None
    end = skip_space(text, read[1])
    return Block([read[0]], end + len("</tool_call>")) if text.startswith("</tool_call>", end) else None


def _read_json(text: str, found: re.Match[str]) -> Block | None:
    if not found["fence"]:
        return json_block(text, found.start())
    block = json_block(text, found.end("fence"))
    if block is None:
        return None
    close = skip_space(text, block.end)
    return block._replace(end=close + 3) if text.startswith("```", close) else block._replace(bare=False)


def _read_llama3(text: str, found: re.Match[str]) -> Block | None:
    if found.group() != "<|python_tag|>":
        return json_block(text, found.start())
    return _all_calls(text, skip_space(text, found.end()))


def _read_mistral(text: str, found: re.Match[str]) -> Block | None:
    if found.group() in ("[ARGS]", "[CALL_ID]"):
        return None
    if found.group() != "[TOOL_CALLS]":
        block = json_block(text, found.start(), with_id=True)
        return block and block._replace(bare=False)
    start = skip_space(text, found.end())
    named = _NAMED.match(text, start)
    if not named:
        return _all_calls(text, start, with_id=True)
    read = json_at(text, named.end())
    call = read and hermes_call({"name": named[1], "arguments": read[0]})
    return Block([call], read[1]) if read and call and is_shallow(call) else None


def _read_pythonic(text: str, found: re.Match[str]) -> Block | None:
    if found.group() == "<|tool_call_end|>":
        return None
    if found.group() != "<|tool_call_start|>":
        return _read_list(text, found.start())
    start = skip_space(text, found.end())
    inside = _read_list(text, start) if _LIST.match(text, start) else _all_calls(text, start)
    if inside is None:
        return None
    end = skip_space(text, inside.end)
    return Block(inside.calls, end + len("<|tool_call_end|>")) if text.startswith("<|tool_call_end|>", end) else None


def _read_list(text: str, start: int) -> Block | None:
    read = pythonic.read_calls(text, start)
    return read and Block(*read)


def _all_calls(text: str, start: int, with_id: bool = False) -> Block | None:
    """The JSON calls at ``start``, where nothing else is allowed."""
    block = json_block(text, start, with_id)
    return block if block and block.bare else None


def _write_hermes(calls: list[dict]) -> str:
    return "\n".join(f"<tool_call>\n{_json(call)}\n</tool_call>" for call in calls)


def _write_json(calls: list[dict]) -> str:
    return _json(calls[0] if len(calls) == 1 else calls)


def _write_llama3(calls: list[dict]) -> str:
    return "; ".join(_json({"name": call["name"], "parameters": call["arguments"]}) for call in calls)


def _write_mistral(calls: list[dict]) -> str:
    return f"[TOOL_CALLS] {_json(calls)}"


def _write_mistral_args(calls: list[dict]) -> str:
    for call in calls:
        if not re.fullmatch(_BARE_NAME, call["name"]):
            raise InputError(
                f"the function name {call['name']!r} cannot stand before [ARGS] in the format mistral_args: rename it,"
                " or choose a format that quotes names, such as json."
            )
    return "".join(f"[TOOL_CALLS]{call['name']}[ARGS]{_json(call['arguments'])}" for call in calls)


def _write_lfm2(calls: list[dict]) -> str:
    return f"<|tool_call_start|>{pythonic.write_calls(calls)}<|tool_call_end|>"


HERMES = ToolFormat(
    name="hermes",
    markers=("<tool_call>", "</tool_call>"),
    opener=re.compile("</?tool_call>"),
    # Byte for byte the official Qwen2.5 and Qwen3 templates, because models know this text.
    request="For each function call, return a json object with function name and arguments within"
    ' <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>",
    answer="one <tool_call></tool_call> block with one JSON object for each call",
    reader=_read_hermes,
    writer=_write_hermes,
)
MISTRAL_ARGS = ToolFormat(
    name="mistral_args",
    markers=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    opener=_MISTRAL,
    request="For each function call, return [TOOL_CALLS], the function name, [ARGS] and the arguments as a json"
    " object, and nothing else:\n[TOOL_CALLS]<function-name>[ARGS]<args-json-object>\nSeveral calls follow one"
    " another.",
    answer="one [TOOL_CALLS]<function-name>[ARGS]<args-json-object> for each call",
    reader=_read_mistral,
    writer=_write_mistral_args,
)
MISTRAL = ToolFormat(
    name="mistral",
    markers=("[TOOL_CALLS]",),
    opener=_MISTRAL,
    request="For function calls, return [TOOL_CALLS] and a json list with one object with function name and arguments"
    ' for each call, and nothing else:\n[TOOL_CALLS] [{"name": <function-name>, "arguments": <args-json-object>}]',
    answer="[TOOL_CALLS] and one JSON list with one object for each call",
    reader=_read_mistral,
    writer=_write_mistral,
)
LFM2 = ToolFormat(
    name="lfm2",
    markers=("<|tool_call_start|>", "<|tool_call_end|>"),
    opener=_PYTHONIC,
    request="For function calls, return one list of them in Python syntax, each with keyword arguments, within"
    " <|tool_call_start|> and <|tool_call_end|>:\n"
    "<|tool_call_start|>[<function-name>(<argument-name>=<value>, ...), ...]<|tool_call_end|>",
    answer="one list [<function-name>(<argument-name>=<value>, ...), ...] of all calls, within <|tool_call_start|> and"
    " <|tool_call_end|>",
    reader=_read_pythonic,
    writer=_write_lfm2,
)
PYTHONIC = ToolFormat(
    name="pythonic",
    markers=(),
    opener=_PYTHONIC,
    request="For function calls, return one list of them in Python syntax, each with keyword arguments, and nothing"
    " else, without a code fence:\n[<function-name>(<argument-name>=<value>, ...), ...]",
    answer="one list [<function-name>(<argument-name>=<value>, ...), ...] of all calls",
    reader=_read_pythonic,
    writer=pythonic.write_calls,
)
LLAMA3 = ToolFormat(
    name="llama3",
    markers=("<|python_tag|>",),
    opener=re.compile(rf"<\|python_tag\|>|{OPENER}"),
    request="For each function call, return a json object with function name and parameters, and nothing else, without"
    ' a code fence:\n{"name": <function-name>, "parameters": <args-json-object>}\nSeveral calls are separated by "; ".',
    answer='one JSON object {"name": <function-name>, "parameters": <args-json-object>} for each call, separated by'
    ' "; "',
    reader=_read_llama3,
    writer=_write_llama3,
)
JSON = ToolFormat(
    name="json",
    markers=(),
    opener=re.compile(rf"(?P<fence>```[\w+-]*\s*)?{OPENER}"),
    request="For each function call, return a json object with function name and arguments, and nothing else, without a"
    ' code fence:\n{"name": <function-name>, "arguments": <args-json-object>}\nSeveral calls are one json list of such'
    " objects.",
    answer="one JSON object with name and arguments for a call, or one JSON list of such objects for several",
    reader=_read_json,
    writer=_write_json,
)
# In the order in which they are tried on a chat template: formats with their own marker first.
FORMATS = {form.name: form for form in (HERMES, MISTRAL, MISTRAL_ARGS, LFM2, PYTHONIC, LLAMA3, JSON)}


def render_completion(row_or_calls: Row | Sequence[dict], tool_format: ToolFormat = HERMES) -> str:
    """Writes the assistant's text for the answer of a row, or for calls. No calls give the empty string.

    Raises InputError for a name that the format cannot express.
    """
    return tool_format.render(row_or_calls.answer if isinstance(row_or_calls, Row) else row_or_calls)
