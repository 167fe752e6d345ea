"""Chat: how one model is spoken to and read, by its tokenizer's chat template and the form in which it writes calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.parse import THOUGHTS, Reading, read
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.template import MARK, Protector, Template
from toolx_kernels.toolcall.tool_format import FORMATS, HERMES, ToolFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
_TOOLS_BEFORE = (  # the wording of the official Qwen2.5 and Qwen3 templates, to the byte: models know this text
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_AFTER = "\n</tools>\n\n"
_ASKED, _ANSWERED, _RETURNED = "what the user asked", "what the assistant wrote", "what the tool returned"
_PARAMETERS = {"type": "object", "properties": {"value": {"type": "string", "description": "A value."}}}
_TOOL = {"name": "probe_tool", "description": "A tool.", "parameters": _PARAMETERS}
_TOOLS = [{"type": "function", "function": _TOOL}]
_CALL = {"name": "probe_tool", "arguments": {"value": "probed"}}
_CALL_ID = "call00000"  # Mistral's templates want nine letters or digits
# what a tool prompt says where the template does not write the calls of earlier turns
_CUES = (
    ("<tool_call>", "hermes"),
    ("<|tool_call_start|>", "lfm2"),
    ("<|tool_list_start|>", "lfm2"),
    ("[AVAILABLE_TOOLS]", "mistral"),
    ('"parameters": dictionary', "llama3"),
    ("[func_name1(params_name1=", "pythonic"),
)


class Chat:
    """The prompts of a model as token ids, and the text of what it wrote.

    Args:
        tool_format: the form of its calls, by name; "auto": the one that the chat template writes or asks for, and
            ``hermes``, with a tool prompt of ours, where it knows nothing of tools. Of any other form than the
            template's, the prompt asks in our words.
        chat_template_kwargs: for the template, such as ``{"enable_thinking": False}``.
        date: YYYY-MM-DD, the day that templates with a date show; None: today.

    tool_format      of its calls
    own_tool_prompt  whether our words, not the template's, offer the tools
    opened_thought   the opening tag of a thought, where the template writes it for the assistant; else ""
    thinks           whether the assistant is expected to think first
    end_of_turn      the text of the token that ends an assistant's turn

    Raises:
        InputError: the template shows tools and nobody says in which form it wants calls; see also ``Template``.
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
        asked = [{"role": "user", "content": _ASKED}]
        header = self.template.render(asked)
        offered = self.template.render(asked, _TOOLS)
        self._shows_tools = offered != header
        own = self._template_format(offered)
        if tool_format == AUTO and own is None and self._shows_tools:
            raise InputError(
                f"The chat template of {self.template.name} shows tools and wants calls in a form that is not known "
                f"here: say with tool_format which of {', '.join(FORMATS)} the model writes, or give the tokenizer "
                "another template."
            )
        self.tool_format: ToolFormat = (own or HERMES) if tool_format == AUTO else FORMATS[tool_format]
        self.own_tool_prompt = not self._shows_tools or (own is not None and own is not self.tool_format)
        self._choose_tokens(asked)
        self._find_thoughts(header.rpartition(_ASKED)[2])
        self._shown_roles: dict[str, bool] = {}

    def describe(self) -> str:
        """In words, e.g. ``hermes, as the chat template writes them``."""
        whose = "asked for in our words" if self.own_tool_prompt else "as the chat template writes them"
        return f"{self.tool_format.name}, {whose}" + (", after a thought" if self.thinks else "")

    # ---- prompts

    def prompt_text(self, row: Row, demonstrations: Sequence[Row] = (), instructions: str = "") -> str:
        """The prompt of ``row`` up to and with the header of the assistant's turn, with the marks of ``Protector``.

        Instructions on the form of the reply, and then the demonstrations, each shown as its user query and its correct
        calls, go into the system message, after the row's own system text where it has one. (A default system text that
        a template adds when there is none then does not appear.)

        Raises InputError when the template refuses the messages, for instance a system message.
        """
        messages = [self._protected(message) for message in row.messages]
        tools = self.data.deep(row.tools)
        if added := "\n\n".join(filter(None, [instructions, "\n".join(map(self._shown, demonstrations))])):
            messages = _with_system(messages, added)
        if not tools or not self.own_tool_prompt:
            return self.template.render(messages, tools or None)
        return self.template.render(_with_system(messages, self._tool_prompt(tools)))

    def prompt_ids(self, row: Row, demonstrations: Sequence[Row] = (), instructions: str = "") -> list[int]:
        """Token ids of ``prompt_text``. The template writes its own special tokens, so none are added."""
        return self.template.encode(self.prompt_text(row, demonstrations, instructions))

    def check(self, rows: Sequence[Row]) -> None:
        """Raises InputError for the first row whose answer the form cannot say, or with a message that the template
        silently leaves out."""
        for row in rows:
            try:
                self.tool_format.render(row.answer)
            except InputError as error:
                raise InputError(f"Row {row.id}: {error}") from None
            for message in row.messages:
                role = message["role"]
                if role not in self._shown_roles:
                    self._shown_roles[role] = self._shows_role(role)
                if not self._shown_roles[role]:
                    raise InputError(
                        f"Row {row.id}: the chat template of {self.template.name} does not show messages of the role "
                        f"{role!r}: rename the role (user, assistant, tool, ...), or leave the row out."
                    )

    # ---- the assistant's turns

    def turn_ids(self, text: str) -> list[int]:
        """An assistant's turn to imitate as token ids, with the token that ends it; a thought that the template opened
        is closed first."""
        return [*self.template.encode(self._closed_thought + self.written(text)), self._end_id]

    def completion_ids(self, calls: Sequence[dict]) -> list[int]:
        """The turn that makes these calls, as token ids."""
        text = self.tool_format.render([self.data.deep(call) for call in calls])
        return [*self.template.encode(self._closed_thought + text), self._end_id]

    def written_text(self, ids: Sequence[int]) -> str:
        """The text of a turn that the model wrote, without the tokens that make turns.

        Other special tokens stay: calls and thoughts may be made of them. A thought that the template opened begins
        with its tag.
        """
        return self.opened_thought + str(self.tokenizer.decode([i for i in ids if i not in self._silent]))

    def read(self, text: str) -> Reading:
        """Thought and calls of a turn."""
        return read(text, self.tool_format)

    def stop_token_ids(self, named: Sequence[int] = ()) -> tuple[int, ...]:
        """Ids that end a turn: what the template writes there, the tokenizer's end of sequence, and those ``named``."""
        return tuple(sorted({self._end_id, self.tokenizer.eos_token_id, *named}))

    def tool_turn_ids(self, results: Sequence[dict]) -> list[int]:
        """The tokens from the end of an assistant's turn to the beginning of its next one, with tool messages between.

        They are those with which the chat template shows ``results`` (``{"role": "tool", "name", "content"}``),
        followed by the header of the next turn. A template that shows no tools, or takes no tool messages, gets Qwen's
        form, a user message with a ``<tool_response>`` block for each result. The token that ended the turn is not
        among them: the model wrote it.
        """
        shown = [{**self.data.deep(result), "tool_call_id": f"call{n:05d}"} for n, result in enumerate(results)]
        tail = self.after_turn(shown if self._takes_results() else [_as_user(shown)])
        if not self.end_of_turn or self.end_of_turn not in tail:
            return self.template.encode(tail)
        # with the token before it, as what stands first in a text may be cut differently
        return self.template.encode(tail[tail.index(self.end_of_turn) :])[1:]

    # ---- what the template does

    def _template_format(self, offered: str) -> ToolFormat | None:
        """The form in which the template writes calls of earlier turns; where it writes none, the one that the prompt
        ``offered`` with tools asks for."""
        written = self._written_call()
        if written is None:
            return next((FORMATS[name] for cue, name in _CUES if cue in offered), None)
        readers = [form for form in FORMATS.values() if read(written, form).calls == [_CALL]]
        exact = [form for form in readers if _squeezed(form.render([_CALL])) in _squeezed(written)]

        def marks(form: ToolFormat) -> int:
            return sum(1 if marker in written else -1 for marker in form.markers)

        return max(exact or readers, key=marks, default=None)

    def _written_call(self) -> str | None:
        """An assistant's turn with a call as the template writes it; None where it leaves calls out."""
        for arguments in ({"value": "probed"}, '{"value": "probed"}'):  # some templates want JSON text
            call = {"type": "function", "id": _CALL_ID, "function": {"name": _CALL["name"], "arguments": arguments}}
            turn = {"role": "assistant", "content": "", "tool_calls": [call]}
            text = self._tried([{"role": "user", "content": _ASKED}, turn], add_generation_prompt=False)
            if "probed" in (written := text.rpartition(_ASKED)[2]):
                return written
        return None

    def _choose_tokens(self, asked: list[dict]) -> None:
        """Control tokens, those that are left out of written text, and the one that ends a turn."""
        added = {token.content: i for i, token in self.tokenizer.added_tokens_decoder.items()}
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        answered = [*asked, {"role": "assistant", "content": _ANSWERED}]
        conversations = (
            [{"role": "system", "content": _RETURNED}, *asked],
            [*answered, *asked],
            [*answered, _as_result(_RETURNED)],
        )
        structure = "".join(map(self._tried, conversations))
        kept = {*self.tool_format.markers, *THOUGHTS, *THOUGHTS.values()}
        turns = {token for token in added if token.strip() and token in structure} - kept
        control = {*special, *turns, *self.tokenizer.all_special_tokens}
        self.data = Protector(control)  # for what users, tools and datasets wrote
        self.written = Protector(control - kept)  # for what an assistant wrote, and for system prompts
        followed = self._tried(answered), self._tried([*answered, *asked], add_generation_prompt=False)
        tails = [tail for tail in (text.partition(_ANSWERED)[2].lstrip() for text in followed) if tail]
        ends = [token for token in control if tails and all(tail.startswith(token) for tail in tails)]
        self.end_of_turn = max(ends, key=len, default=self.tokenizer.eos_token or "")
        self._end_id = added.get(self.end_of_turn, self.tokenizer.eos_token_id)
        named = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        self._silent = {self._end_id, *(added[token] for token in turns), *named}

    def _find_thoughts(self, header: str) -> None:
        """Whether the assistant's turn, which begins with ``header``, is to begin with a thought."""
        self.opened_thought = self._closed_thought = ""
        for opening, closing in THOUGHTS.items():
            if header.rstrip().endswith(opening):
                self.opened_thought = header[header.rindex(opening) :]
                self._closed_thought = f"\n{closing}\n\n" if self.opened_thought.endswith("\n") else closing
        known = any(closing in self.template.source for closing in THOUGHTS.values())
        closed = any(closing in header for closing in THOUGHTS.values())
        self.thinks = bool(self.opened_thought) or (known and not closed)

    def _shows_role(self, role: str) -> bool:
        said, asked = {"role": role, "content": _RETURNED}, {"role": "user", "content": _ASKED}
        if role in ("system", "developer"):
            conversation = [said, asked]
        else:
            conversation = [asked, {"role": "assistant", "content": _ANSWERED}, said]
        try:
            return _RETURNED in self._rendered(conversation)
        except InputError:
            return True  # it is not silent about it

    def _takes_results(self) -> bool:
        """Whether the template has a form for what tools return."""
        try:
            return self._shows_tools and _RETURNED in self.after_turn([_as_result(_RETURNED)])
        except InputError:
            return False

    def after_turn(self, messages: Sequence[dict]) -> str:
        """What the template writes after the assistant's text when ``messages`` follow and the assistant is next."""
        turn = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}]
        _, shown, after = self._rendered([*turn, *messages]).partition(_ANSWERED)
        if not shown:
            raise InputError(
                f"The chat template of {self.template.name} does not show what the assistant says, so no turn can "
                "follow: give the tokenizer a template for text conversations."
            )
        return after

    def _rendered(self, messages: Sequence[dict], add_generation_prompt: bool = True) -> str:
        tools = _TOOLS if self._shows_tools else None
        return self.template.render(messages, tools, add_generation_prompt=add_generation_prompt)

    def _tried(self, messages: Sequence[dict], add_generation_prompt: bool = True) -> str:
        """The same, "" where the template refuses the messages."""
        try:
            return self._rendered(messages, add_generation_prompt)
        except InputError:
            return ""

    # ---- its prompts' parts

    def _protected(self, message: Mapping[str, Any]) -> dict[str, Any]:
        protect = self.written if message["role"] in ("system", "developer", "assistant") else self.data
        return {**message, "content": protect(message["content"])}

    def _shown(self, demonstration: Row) -> str:
        calls = self.tool_format.render([self.data.deep(call) for call in demonstration.answer])
        return f"Example:\n{self.data(demonstration.user_text)}\n{calls}"

    def _tool_prompt(self, tools: list[dict]) -> str:
        listed = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in tools)
        return _TOOLS_BEFORE + listed + _TOOLS_AFTER + self.tool_format.request


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, row: Row, demonstrations: Sequence[Row] = (), instructions: str = ""
) -> list[int]:
    """``Chat(tokenizer).prompt_ids(...)``, for a single prompt."""
    return Chat(tokenizer).prompt_ids(row, demonstrations, instructions)


def render_text(
    tokenizer: PreTrainedTokenizerBase, row: Row, demonstrations: Sequence[Row] = (), instructions: str = ""
) -> str:
    """The text of the same prompt."""
    return Chat(tokenizer).prompt_text(row, demonstrations, instructions).replace(MARK, "")


def _with_system(messages: list[dict], text: str) -> list[dict]:
    if messages[0]["role"] == "system":
        first, rest = messages[0]["content"], messages[1:]
        return [{"role": "system", "content": f"{first}\n\n{text}" if first else text}, *rest]
    return [{"role": "system", "content": text}, *messages]


def _as_result(text: str) -> dict:
    return {"role": "tool", "name": _CALL["name"], "content": text, "tool_call_id": _CALL_ID}


def _as_user(results: Sequence[dict]) -> dict:
    blocks = (f"<tool_response>\n{result['content']}\n</tool_response>" for result in results)
    return {"role": "user", "content": "\n".join(blocks)}


def _squeezed(text: str) -> str:
    return "".join(text.split())
