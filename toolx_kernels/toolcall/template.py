"""Chat templates: messages and tools to text, and text to token ids.

A template that is nearly right destroys tool calling, so nothing here rewrites one: the tokenizer's own template
decides what a prompt looks like. A tokenizer without a template gets plain ChatML, after what it puts before any text.

Contents are data. If text of a user, a tool or a dataset spells a control token, such as ``<|im_end|>``, a
``Protector`` puts a mark into it. ``encode`` splits the text there and encodes the pieces separately, so the token
cannot arise. The template's own text has no marks and becomes control tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from toolx_kernels.errors import InputError, first_line
from toolx_kernels.toolcall.strict_json import encodable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARK = "\ufdd0"  # a noncharacter: Unicode reserves it for use inside a program, so no text contains it
_SPELT = "\\ufdd0"  # as templates that print Python values write it
_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"})


class Template:
    """The chat template of ``tokenizer``.

    Args:
        kwargs: variables of the template besides messages and tools, such as ``{"enable_thinking": False}``.
        date: the day, as YYYY-MM-DD, that it shows where it asks for the current one.

    Raises:
        InputError: ``kwargs`` that the template does not read, a date in another format, or named templates without a
            default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None, date: str | None):
        self.tokenizer, self.kwargs = tokenizer, dict(kwargs or {})
        self.name = tokenizer.name_or_path or "the tokenizer"
        self._before = ""  # what the tokenizer puts before any text; a template of its own includes that
        if not tokenizer.chat_template:
            bare = tokenizer("a", add_special_tokens=False)["input_ids"]
            begun = tokenizer("a")["input_ids"]
            starts = range(len(begun) - len(bare) + 1)
            start = next((place for place in starts if begun[place : place + len(bare)] == bare), 0)
            self._before = str(tokenizer.decode(begun[:start]))
        variables = _variables(self.source)
        for name, value in self.kwargs.items():
            if name in _GIVEN:
                raise InputError(f"chat_template_kwargs: {name!r} is set by this library: leave it out.")
            if name not in variables:
                raise InputError(
                    f"chat_template_kwargs: the chat template of {self.name} does not read {name!r}: leave it out, or "
                    f"give one of {', '.join(sorted(variables - _GIVEN)) or 'none'}."
                )
            if value in ("true", "false", "True", "False"):  # a template treats any text as true
                plain = value.lower()
                raise InputError(f"chat_template_kwargs: {name}={value!r} is text: write {plain} without quotes.")
        if date is not None:
            self.kwargs["strftime_now"] = _day(date).strftime

    @property
    def source(self) -> str:
        """The text of the template, or of all named templates."""
        named = self.tokenizer.chat_template or CHATML
        return "\n".join(named.values()) if isinstance(named, dict) else named

    def render(
        self, messages: Sequence[Mapping], tools: Sequence[Any] | None = None, *, add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation as text, by default including the header of the assistant's next turn.

        Raises InputError if the template refuses the messages, for instance a system message.
        """
        template = self._named(tools) if self.tokenizer.chat_template else CHATML
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.kwargs,
            )
        except Exception as error:  # Jinja's errors, and whatever its expressions raise
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"The chat template of {self.name} refuses messages of the roles {roles} ({first_line(error)}): give "
                "the tokenizer a template that takes them."
            ) from error
        return self._before + str(text).replace(_SPELT, MARK)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, which contains its special tokens; split at the marks of a ``Protector``."""
        ids: list[int] = []
        for piece in encodable(text).split(MARK):
            ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    def _named(self, tools: Sequence[Any] | None) -> str:
        """The only template, or the one that transformers takes of several named ones."""
        named = self.tokenizer.chat_template
        if not isinstance(named, dict):
            return named
        for name in ("tool_use", "default") if tools is not None else ("default", "tool_use"):
            if name in named:
                return named[name]
        raise InputError(
            f"{self.name} has chat templates called {', '.join(sorted(named))}, and none is called default: set "
            "tokenizer.chat_template to the one to use."
        )


class Protector:
    """Marks the control tokens that contents spell out.

    >>> Protector(["<|end|>"])("a <|end|> b").replace(MARK, "*")
    'a <*|end|> b'
    """

    def __init__(self, control: Iterable[str]):
        # A single character cannot be split. The signs that begin most control tokens are split everywhere, because
        # normalizers, and templates that replace a part of a content, could turn other text into a token.
        known = {token for token in control if len(token) > 1}
        signs = {token[:2] for token in known if token[1] in "|｜"}
        known = {token for token in known if token[:2] not in signs} | signs
        # the longest first, as tokenizers match them
        self._control = re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True)))) if known else None

    def __call__(self, text: str) -> str:
        """``text`` with a mark inside each control token."""
        text = text.replace(MARK, "")
        while self._control is not None and self._control.search(text):  # repeated, because one may contain another
            text = self._control.sub(lambda found: found[0][0] + MARK + found[0][1:], text)
        return text


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value with ``change`` applied to every string, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mapped(inner, change) for inner in value]
    return value


def _variables(source: str) -> set[str]:
    """The names that a template reads and does not set."""
    from jinja2 import Environment, TemplateError, meta

    plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", source)  # a tag that transformers adds to Jinja
    try:
        return meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain))
    except TemplateError as error:
        raise InputError(f"The chat template is not Jinja ({first_line(error)}): fix it.") from error


def _day(date: str) -> datetime:
    try:
        return datetime.strptime(date, "%Y-%m-%d")
    except ValueError:
        raise InputError(f"date={date!r} is not a day: write it as YYYY-MM-DD, such as 2026-01-31.") from None
