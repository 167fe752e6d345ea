"""Prompts and completions as the models saw them in their training: the tokenizer's own chat template with ``tools``.

A template that is nearly right destroys tool calling, so nothing here rewrites one. A template that ignores ``tools``
gets Qwen's tool prompt as part of its system message; a tokenizer without a template gets plain ChatML.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The wording of the official Qwen2.5 and Qwen3 templates, to the byte: models know this text.
_TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within"
    " <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_PROBE_MESSAGES = [{"role": "user", "content": "?"}]
_PROBE_TOOLS = [{"type": "function", "function": {"name": "probe", "parameters": {"type": "object", "properties": {}}}}]
_uses_tools: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer -> (its template, whether that shows tools)


def render_prompt(
    tokenizer: "PreTrainedTokenizerBase", row: Row, demonstrations: Sequence[Row] = (), instructions: str = ""
) -> list[int]:
    """Token ids of ``render_text``. The template writes its own special tokens, so none are added."""
    return tokenizer(render_text(tokenizer, row, demonstrations, instructions), add_special_tokens=False)["input_ids"]


def render_text(
    tokenizer: "PreTrainedTokenizerBase", row: Row, demonstrations: Sequence[Row] = (), instructions: str = ""
) -> str:
    """The prompt of ``row`` up to and with the header of the assistant's turn.

    Instructions on the form of the reply, and then the demonstrations, each shown as its user query and its correct
    calls, go into the system message, after the row's own system text where it has one. (A default system text that a
    template adds when there is none then does not appear.)

    Raises InputError when the template refuses the messages, for instance a system message.
    """
    messages = row.messages
    if added := "\n\n".join(filter(None, [instructions, "\n".join(map(_show, demonstrations))])):
        messages = _with_system(messages, added)
    if not row.tools or shows_tools(tokenizer):
        return _apply(tokenizer, messages, row.tools or None)
    return _apply(tokenizer, _with_system(messages, _tool_prompt(row.tools)), None)


def render_completion(row_or_calls: Row | Sequence[dict]) -> str:
    """The assistant's text for the answer of a row, or for calls: one ``<tool_call>`` block per call, each with one
    JSON object, as Qwen's template writes them. No calls give the empty string."""
    calls = row_or_calls.answer if isinstance(row_or_calls, Row) else row_or_calls
    return "\n".join(
        f"<tool_call>\n{_json({'name': call['name'], 'arguments': call['arguments']})}\n</tool_call>" for call in calls
    )


def _show(demonstration: Row) -> str:
    return f"Example:\n{demonstration.user_text}\n{render_completion(demonstration)}"


def _tool_prompt(tools: list[dict]) -> str:
    return _TOOLS_BEFORE + "".join(f"\n{_json(tool)}" for tool in tools) + _TOOLS_AFTER


def _with_system(messages: list[dict], text: str) -> list[dict]:
    if messages[0]["role"] == "system":
        first, rest = messages[0]["content"], messages[1:]
        return [{"role": "system", "content": f"{first}\n\n{text}" if first else text}, *rest]
    return [{"role": "system", "content": text}, *messages]


def shows_tools(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template writes the tools that it is given."""
    template = tokenizer.chat_template
    if tokenizer not in _uses_tools or _uses_tools[tokenizer][0] != template:
        shown = _apply(tokenizer, _PROBE_MESSAGES, _PROBE_TOOLS) != _apply(tokenizer, _PROBE_MESSAGES, None)
        _uses_tools[tokenizer] = template, shown
    return _uses_tools[tokenizer][1]


def _apply(tokenizer: "PreTrainedTokenizerBase", messages: list[dict], tools: list[Any] | None) -> str:
    from jinja2 import TemplateError

    try:
        template = None if tokenizer.chat_template else _CHATML
        text = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} refuses messages of the roles {roles}"
            f" ({error}); give the tokenizer a template that takes them"
        ) from error
    return str(text)


def _json(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False)
