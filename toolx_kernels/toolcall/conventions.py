"""Conventions of a chat template, inferred from small conversations: tools, calls, turns, control tokens."""

from __future__ import annotations

from collections.abc import Sequence

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.parse import THOUGHTS, read
from toolx_kernels.toolcall.template import CHATML_TOKENS, Template
from toolx_kernels.toolcall.tool_format import FORMATS, ToolFormat

CALL_ID = "call00000"  # Mistral's templates require nine letters or digits
_ASKED, _ANSWERED, _RETURNED = "what the user asked", "what the assistant wrote", "what the tool returned"
_CONVERSATION = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}]
_SYSTEM = {"role": "system", "content": _RETURNED}
_RESULT = {"role": "tool", "name": "probe_tool", "content": _RETURNED, "tool_call_id": CALL_ID}
_PARAMETERS = {"type": "object", "properties": {"value": {"type": "string", "description": "A value."}}}
_TOOL = {"name": "probe_tool", "description": "A tool.", "parameters": _PARAMETERS}
_TOOLS = [{"type": "function", "function": _TOOL}]
_CALL = {"name": "probe_tool", "arguments": {"value": "probed"}}
# text in the tool prompts of templates that do not write the calls of earlier turns
_CUES = (
    ("<tool_call>", "hermes"),
    ("<|tool_call_start|>", "lfm2"),
    ("<|tool_list_start|>", "lfm2"),
    ("[AVAILABLE_TOOLS]", "mistral"),
    ('"parameters": dictionary', "llama3"),
    ("[func_name1(params_name1=", "pythonic"),
)


class Conventions:
    """The conventions of ``template``.

    shows_tools     it writes the tools that it is given
    takes_system    it shows a system message
    takes_results   it shows tool messages
    opens_thought   it opens a thought for the assistant
    thinks          the assistant is expected to think first
    writes_calls    it shows the ``tool_calls`` of earlier turns
    text_arguments  it shows them right only if their arguments are JSON text, not objects
    tool_format     the format in which it writes calls of earlier turns; if it writes none, the one that its tool
                    prompt asks for; None: unknown
    """

    def __init__(self, template: Template):
        self._template, self._tokenizer = template, template.tokenizer
        offered = template.render(_CONVERSATION[:1], _TOOLS)
        try:
            self.shows_tools = offered != template.render(_CONVERSATION[:1])
        except InputError:  # it requires tools
            self.shows_tools = True
        self.takes_system = _RETURNED in self._tried([_SYSTEM, *_CONVERSATION[:1]])
        self.takes_results = self.shows_tools and _RETURNED in self._tried([*_CONVERSATION, _RESULT])
        header = offered.rpartition(_ASKED)[2]
        self.opens_thought = bool(opened_thought(header))
        known = any(closing in template.source for closing in THOUGHTS.values())
        self.thinks = self.opens_thought or (known and not any(closing in header for closing in THOUGHTS.values()))
        written = self._written_calls()
        self.writes_calls = bool(written)
        self.tool_format, self.text_arguments = self._tool_format(written, offered)

    def after_turn(self, messages: Sequence[dict]) -> str:
        """The text after an assistant's text, if ``messages`` follow and then the assistant.

        Raises InputError if the template does not show the assistant's text.
        """
        _, shown, after = self._rendered([*_CONVERSATION, *messages]).partition(_ANSWERED)
        if not shown:
            raise InputError(
                f"The chat template of {self._template.name} does not show the assistant's text, so no turn can "
                "follow: give the tokenizer a template for text conversations."
            )
        return after

    def turn_tokens(self) -> dict[str, int]:
        """The added tokens that delimit turns, with their ids."""
        asked = _CONVERSATION[:1]
        conversations = ([_SYSTEM, *asked], [*_CONVERSATION, *asked], [*_CONVERSATION, _RESULT])
        written = "".join(map(self._tried, conversations))
        added = {token.content: i for i, token in self._tokenizer.added_tokens_decoder.items()}
        return {token: i for token, i in added.items() if token.strip() and token in written}

    def special_tokens(self) -> set[str]:
        """All tokens that the tokenizer calls special, and ChatML's if that replaces a missing template."""
        special = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        stand_in = () if self._tokenizer.chat_template else CHATML_TOKENS
        return {*special, *self._tokenizer.all_special_tokens, *stand_in}

    def end_of_turn(self, control: set[str]) -> str:
        """The ``control`` token with which the template ends an assistant's turn, whoever is next; else the tokenizer's
        end of sequence, or "" without one."""
        followed = self._tried(_CONVERSATION), self._tried([*_CONVERSATION, *_CONVERSATION[:1]], generation=False)
        tails = [tail for tail in (text.partition(_ANSWERED)[2].lstrip() for text in followed) if tail]
        ends = [token for token in control if tails and all(tail.startswith(token) for tail in tails)]
        return max(ends, key=len, default=self._tokenizer.eos_token or "")

    def _tool_format(self, written: dict[bool, str], offered: str) -> tuple[ToolFormat | None, bool]:
        """The format of calls, and ``text_arguments``."""
        for text_arguments, text in written.items():
            readers = [form for form in FORMATS.values() if read(text, form) == (None, [_CALL], True)]
            exact = [form for form in readers if _squeezed(form.render([_CALL])) in _squeezed(text)]
            if readers:
                return max(exact or readers, key=lambda form: _marks(form, text)), text_arguments
        cued = None if written else next((FORMATS[name] for cue, name in _CUES if cue in offered), None)
        return cued, False

    def _written_calls(self) -> dict[bool, str]:
        """An assistant's turn with a call, as the template writes it for arguments in an object (False) and in JSON
        text (True), where it writes one."""
        said = self._tried(_CONVERSATION, generation=False).rpartition(_ASKED)[2]
        header, _, tail = said.partition(_ANSWERED)
        marks = {marker for form in FORMATS.values() for marker in form.markers}
        ends = tuple(filter(None, self.special_tokens() - marks))
        found = {}
        for arguments in ({"value": "probed"}, '{"value": "probed"}'):
            call = {"type": "function", "id": CALL_ID, "function": {"name": _CALL["name"], "arguments": arguments}}
            turn = {"role": "assistant", "content": "", "tool_calls": [call]}
            text = self._tried([*_CONVERSATION[:1], turn], generation=False).rpartition(_ASKED)[2]
            if "probed" not in text:
                continue
            text = text.removeprefix(header.rstrip()).removesuffix(tail).strip()
            while end := next((end for end in ends if text.endswith(end)), None):
                text = text.removesuffix(end).strip()
            found[isinstance(arguments, str)] = text
        return found

    def _rendered(self, messages: Sequence[dict], generation: bool = True) -> str:
        tools = _TOOLS if self.shows_tools else None
        return self._template.render(messages, tools, add_generation_prompt=generation)

    def _tried(self, messages: Sequence[dict], generation: bool = True) -> str:
        """``_rendered``, or "" if the template refuses the messages."""
        try:
            return self._rendered(messages, generation)
        except InputError:
            return ""


def opened_thought(text: str) -> str:
    """The opening tag of a thought at the end of ``text``, with the white space after it; else ""."""
    for opening in THOUGHTS:
        if text.rstrip().endswith(opening):
            return text[text.rindex(opening) :]
    return ""


def _marks(form: ToolFormat, text: str) -> int:
    return sum(1 if marker in text else -1 for marker in form.markers)


def _squeezed(text: str) -> str:
    return "".join(text.split())
