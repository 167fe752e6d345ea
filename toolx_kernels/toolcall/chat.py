"""Chat with one model: its prompts and turns, by its tokenizer's chat template and its format of tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import count, groupby
from typing import TYPE_CHECKING, Any

from toolx_kernels.errors import InputError, short
from toolx_kernels.toolcall.conventions import Conventions, opened_thought
from toolx_kernels.toolcall.parse import THOUGHTS, Reading, read
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.template import MARK, Protector, Template, mapped
from toolx_kernels.toolcall.tool_format import FORMATS, HERMES, ToolFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
_TOOLS_BEFORE = (  # byte for byte the official Qwen2.5 and Qwen3 templates, because models know this text
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_AFTER = "\n</tools>\n\n"
_OPENING = 16  # tokens at the end of a prompt that may contain the tag of a thought


class Chat:
    """Makes the prompts of a model as token ids, and the text of its turns.

    Args:
        tool_format: the name of the format of calls. "auto" takes the one that the chat template writes or asks for, or
            ``hermes`` if the template does not support tools. A format other than the template's is requested by our
            own tool prompt.
        chat_template_kwargs: for the template, such as ``{"enable_thinking": False}``.
        date: YYYY-MM-DD, the day that templates with a date show; None: today.

    tool_format      the format of calls
    own_tool_prompt  whether our tool prompt, not the template's, offers the tools
    conventions      of the chat template
    end_of_turn      the text of the token that ends an assistant's turn

    Raises:
        InputError: the template shows tools, but "auto" cannot tell its format of calls; see also ``Template``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tool_format: str = AUTO,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: str | None = None,
    ):
        if tool_format != AUTO and tool_format not in FORMATS:
            raise InputError(f"tool_format={tool_format!r} is unknown: choose one of {', '.join([AUTO, *FORMATS])}.")
        self.tokenizer = tokenizer
        self.template = Template(tokenizer, chat_template_kwargs, date)
        self.conventions = Conventions(self.template)
        own = self.conventions.tool_format
        if tool_format == AUTO and own is None and self.conventions.shows_tools:
            raise InputError(
                f"The chat template of {self.template.name} shows tools but wants calls in an unknown format: set "
                f"tool_format to one of {', '.join(FORMATS)}, or give the tokenizer another template."
            )
        self.tool_format: ToolFormat = (own or HERMES) if tool_format == AUTO else FORMATS[tool_format]
        self.own_tool_prompt = own is not self.tool_format or not self.conventions.shows_tools
        self._choose_tokens()

    def describe(self) -> str:
        """Describes the calls, for example ``hermes, as the chat template writes them``."""
        whose = "with our own tool prompt" if self.own_tool_prompt else "as the chat template writes them"
        return f"{self.tool_format.name}, {whose}" + (", after a thought" if self.conventions.thinks else "")

    # ---- prompts

    def prompt_text(self, row: Row, demonstrations: Sequence[Row] = (), instructions: str = "") -> str:
        """Renders the prompt of ``row``, including the header of the assistant's turn and the marks of ``Protector``.

        Instructions on the reply, and then the demonstrations (user query and correct calls), go into the system
        message, after the row's system text; if the template takes no system message, they go before the user's first
        text. (The default system text of a template then does not appear.)

        Raises InputError if the template refuses the messages, or silently leaves one out.
        """
        messages = self._history(_numbered([self._protected(message) for message in row.messages]))
        tools = mapped(row.tools, self.protect_data)
        asked = self._tool_prompt(tools) if tools and self.own_tool_prompt else ""
        shown = "\n".join(map(self._shown, demonstrations))
        if added := "\n\n".join(filter(None, [instructions, shown, asked])):
            messages = self._with_system(messages, added)
        text = self.template.render(messages, None if asked else tools or None)
        said = text.replace(MARK, "")
        for message in row.messages:
            if not _is_shown(message, said):
                raise InputError(
                    f"The chat template of {self.template.name} does not show the message of the role "
                    f"{message['role']!r}: rename the role (user, assistant, tool, ...), or leave the row out."
                )
        return text

    def prompt_ids(self, row: Row, demonstrations: Sequence[Row] = (), instructions: str = "") -> list[int]:
        """Token ids of ``prompt_text``. The template writes its own special tokens, so none are added."""
        return self.template.encode(self.prompt_text(row, demonstrations, instructions))

    def check(self, rows: Sequence[Row]) -> None:
        """Raises InputError for the first row whose answer the format cannot express, or with a role that is not a
        word."""
        for row in rows:
            try:
                self.tool_format.render(row.answer)
            except InputError as error:
                raise InputError(f"Row {row.id}: {error}") from None
            for message in row.messages:
                if not re.fullmatch(r"[\w-]+", message["role"]):
                    raise InputError(
                        f"Row {row.id}: the role {short(message['role'])} is not a word: use user, assistant, tool, ..."
                    )

    # ---- the assistant's turns

    def turn_ids(self, text: str, context: Sequence[int] = ()) -> list[int]:
        """Token ids of an assistant's turn to imitate, including the token that ends it.

        ``context`` is the prompt so far. If it opens a thought, the turn first closes that.
        """
        return self._ended(self.protect_turn(text), context)

    def completion_ids(self, calls: Sequence[dict], context: Sequence[int] = ()) -> list[int]:
        """Token ids of the turn that makes these calls; see ``turn_ids``."""
        return self._ended(self.tool_format.render(mapped(list(calls), self.protect_data)), context)

    def written_text(self, ids: Sequence[int], context: Sequence[int] = ()) -> str:
        """Decodes a turn that the model wrote after ``context``, without the tokens that delimit turns.

        Other special tokens stay, because calls and thoughts may contain them. If the context opens a thought, the text
        begins with its tag.
        """
        written = str(self.tokenizer.decode([i for i in ids if i not in self._silent]))
        return self._opened_by(context) + written

    def quoted(self, ids: Sequence[int]) -> str:
        """Decodes ``ids``, the beginning of ``completion_ids``, for a prompt, with the marks of ``Protector``.

        Tokens of the tool format stay tokens; text in arguments that spells one does not become one. An incomplete
        last character is left out.
        """
        runs = [
            (form, str(self.tokenizer.decode(list(run)))) for form, run in groupby(ids, self._form_ids.__contains__)
        ]
        return "".join(text if form else self.protect_data(text) for form, text in runs).rstrip("\ufffd")

    def read(self, text: str) -> Reading:
        """Reads the thought and the calls of a turn."""
        return read(text, self.tool_format)

    def stop_token_ids(self, named: Sequence[int] = ()) -> tuple[int, ...]:
        """Ids that end a turn: the template's, the tokenizer's end of sequence, and those in ``named``."""
        return tuple(sorted({self._end_id, self.tokenizer.eos_token_id, *named} - {None}))

    def tool_turn_ids(self, results: Sequence[dict]) -> list[int]:
        """Token ids between two turns of the assistant: tool messages and the header of the next turn.

        The chat template shows ``results`` (``{"role": "tool", "name", "content"}``). If it supports no tools or no
        tool messages, results are in Qwen's form, a user message with a ``<tool_response>`` block for each. The token
        that ended the turn is not included, because the model wrote it.
        """
        protected = mapped(list(results), self.protect_data)
        shown = [{**result, "tool_call_id": f"call{n:05d}"} for n, result in enumerate(protected)]
        tail = self.conventions.after_turn(shown if self.conventions.takes_results else [_as_user(shown)])
        if not self.end_of_turn or self.end_of_turn not in tail:
            return self.template.encode(tail)
        # together with the token before it, because a tokenizer may split the beginning of a text differently
        return self.template.encode(tail[tail.index(self.end_of_turn) :])[1:]

    def _choose_tokens(self) -> None:
        """Finds the control tokens, those that written text leaves out, and the token that ends a turn."""
        tokenizer, marks = self.tokenizer, {*self.tool_format.markers, *THOUGHTS, *THOUGHTS.values()}
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        turns = {token: i for token, i in self.conventions.turn_tokens().items() if token not in marks}
        self._form_ids = {i for token, i in added.items() if token in marks}
        control = {*self.conventions.special_tokens(), *turns}
        # data comes from users, tools and datasets; turns of an assistant, and system prompts, may show calls
        self.protect_data = Protector(control | (marks & added.keys()))
        self.protect_turn = Protector(control - marks)
        self.end_of_turn = self.conventions.end_of_turn(control)
        self._end_id = added.get(self.end_of_turn, tokenizer.eos_token_id)
        named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self._silent = {self._end_id, *turns.values(), *named}

    # ---- the parts of prompts and turns

    def _protected(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with its contents marked as data; an assistant's or a system prompt may show calls and
        thoughts."""
        trusted = message["role"] in ("system", "developer", "assistant")
        return {
            key: value
            if key == "role"
            else mapped(value, self.protect_turn if trusted and key != "tool_calls" else self.protect_data)
            for key, value in message.items()
        }

    def _history(self, messages: list[dict]) -> list[dict]:
        """The messages with calls and results of earlier turns in the form that the template shows, or else in the one
        that our tool prompt requests."""
        shown: list[dict] = []
        for of_tools, group in groupby(messages, lambda message: message["role"] == "tool"):
            if of_tools and not self.conventions.takes_results:
                shown.append(_as_user(list(group)))
            else:
                shown += map(self._with_calls, group)
        return shown

    def _with_calls(self, message: dict) -> dict:
        calls = [call["function"] for call in message.get("tool_calls", ())]
        if calls and (self.own_tool_prompt or not self.conventions.writes_calls):
            text = "\n".join(filter(None, [message["content"], self.tool_format.render(calls)]))
            return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": text}
        if calls and self.conventions.text_arguments:
            functions = [{**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)} for call in calls]
            written = zip(message["tool_calls"], functions, strict=True)
            return {**message, "tool_calls": [{**call, "function": function} for call, function in written]}
        return message

    def _with_system(self, messages: list[dict], text: str) -> list[dict]:
        first = messages[0]
        if first["role"] == "system":
            content = f"{first['content']}\n\n{text}" if first["content"] else text
            return [{**first, "content": content}, *messages[1:]]
        if self.conventions.takes_system:
            return [{"role": "system", "content": text}, *messages]
        place = next(place for place, message in enumerate(messages) if message["role"] == "user")
        asked = {**messages[place], "content": f"{text}\n\n{messages[place]['content']}"}
        return [*messages[:place], asked, *messages[place + 1 :]]

    def _shown(self, demonstration: Row) -> str:
        calls = self.tool_format.render(mapped(demonstration.answer, self.protect_data))
        return f"Example:\n{self.protect_data(demonstration.user_text)}\n{calls}"

    def _tool_prompt(self, tools: list[dict]) -> str:
        listed = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in tools)
        return _TOOLS_BEFORE + listed + _TOOLS_AFTER + self.tool_format.request

    def _ended(self, text: str, context: Sequence[int]) -> list[int]:
        opened = self._opened_by(context)
        closed = next((closing for opening, closing in THOUGHTS.items() if opened.startswith(opening)), "")
        if opened.endswith("\n"):
            closed = f"\n{closed}\n\n"
        return [*self.template.encode(closed + text), self._end_id]

    def _opened_by(self, context: Sequence[int]) -> str:
        """The opening tag of a thought at the end of a context; "" without one."""
        return opened_thought(str(self.tokenizer.decode(list(context[-_OPENING:])))) if len(context) else ""


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, row: Row, demonstrations: Sequence[Row] = (), instructions: str = ""
) -> list[int]:
    """Renders a single prompt to token ids: ``Chat(tokenizer).prompt_ids(...)``."""
    return Chat(tokenizer).prompt_ids(row, demonstrations, instructions)


def render_text(
    tokenizer: PreTrainedTokenizerBase, row: Row, demonstrations: Sequence[Row] = (), instructions: str = ""
) -> str:
    """Renders the prompt of ``render_prompt`` as text."""
    return Chat(tokenizer).prompt_text(row, demonstrations, instructions).replace(MARK, "")


def _is_shown(message: Mapping[str, Any], text: str) -> bool:
    """Whether ``text`` contains the names of a message's calls, and its longest word: templates trim and quote
    contents, and remove thoughts of earlier turns and switches such as ``/think``."""
    content = re.sub("/(?:no_)?think", " ", message["content"])
    if message["role"] == "assistant":
        content = re.sub(r"(?s)^.*</think>", "", content)
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    return all(max(re.findall(r"\w+", part), key=len, default="") in text for part in (content, *names))


def _numbered(messages: Sequence[dict]) -> list[dict]:
    """The messages with new call ids, of nine letters and digits, as Mistral's templates require; a result without an
    id is of the next call before it."""
    numbers, waiting, numbered = count(), list[str](), list[dict]()
    renamed: dict[Any, str] = {}
    for message in messages:
        if calls := message.get("tool_calls"):
            waiting = [f"call{next(numbers):05d}" for _ in calls]
            renamed |= {call["id"]: new for call, new in zip(calls, waiting, strict=True) if "id" in call}
            message = {**message, "tool_calls": [{**c, "id": new} for c, new in zip(calls, waiting, strict=True)]}
        elif message["role"] == "tool":
            new = renamed.get(message.get("tool_call_id"), next(iter(waiting), None))
            waiting = [other for other in waiting if other != new]
            message = {**message, "tool_call_id": new} if new else message
        numbered.append(message)
    return numbered


def _as_user(results: Sequence[dict]) -> dict:
    blocks = (f"<tool_response>\n{result['content']}\n</tool_response>" for result in results)
    return {"role": "user", "content": "\n".join(blocks)}
