"""Parsing of the text that a model printed into calls. Nothing printed can make this raise, hang, or be run as code."""

from typing import NamedTuple

from toolx_kernels.toolcall.strict_json import skip_space
from toolx_kernels.toolcall.tool_format import HERMES, ToolFormat

THOUGHTS = {"<think>": "</think>", "[THINK]": "[/THINK]"}  # around what a thinking model writes before its answer


class Reading(NamedTuple):
    """What a text says.

    >>> read("<think>Hm.</think>I cannot.")
    Reading(thought='Hm.', calls=[], bare=False)
    """

    thought: str | None  # what stands between the tags of a leading thought; None: there is none
    calls: list[dict] | None  # of the rest, in order, each {"name", "arguments"}; None: some are malformed
    bare: bool  # whether the rest is calls, what their form puts around them, and white space, nothing else


def read(text: str, tool_format: ToolFormat = HERMES) -> Reading:
    """The leading thought of ``text``, and the calls behind it in the given form; see docs/tool_calls.md for what is a
    call. What stands in the thought is none; behind one that is never closed there can be none, so that reads as
    malformed. Reading ends at the first malformed call. Linear in the length of ``text``."""
    thought, rest = split_thought(text)
    if rest is None:
        return Reading(thought, None, False)
    calls: list[dict] = []
    bare, end = True, 0
    while found := tool_format.opener.search(rest, end):
        block = tool_format.block(rest, found)
        if block is None:
            return Reading(thought, None, False)
        bare = bare and block.bare and not rest[end : found.start()].strip()
        calls += block.calls
        end = block.end
    return Reading(thought, calls, bare and not rest[end:].strip())


def parse_calls(text: str, tool_format: ToolFormat = HERMES) -> list[dict] | None:
    """The calls ``{"name", "arguments"}`` of ``text``, a leading thought left out, in order; ``[]`` when there is none,
    None when one is malformed or the thought is never closed (``read``).

    Of Hermes' form, the default, a call is a ``<tool_call>`` block with one JSON object with exactly the keys ``name``
    (a string) and ``arguments`` (an object), which is what Qwen's templates print and its tool prompt asks for.
    Malformed are: unbalanced or nested tags, invalid JSON (also NaN, Infinity and raw control characters in strings),
    a repeated key, a number that Python cannot hold (1e999, thousands of digits), other or missing keys, values of
    another type, and nesting deeper than ``MAX_DEPTH``. Tags inside a JSON string are text.
    """
    return read(text, tool_format).calls


def only_calls(text: str, tool_format: ToolFormat = HERMES) -> bool:
    """Whether ``text`` is well-formed calls and white space, nothing else and no thought (true of blank text)."""
    thought, _, bare = read(text, tool_format)
    return bare and thought is None


def split_thought(text: str) -> tuple[str | None, str | None]:
    """The thought with which ``text`` begins, between one of the pairs of ``THOUGHTS``, and what follows its first
    closing tag. ``(None, text)`` without a thought, ``(thought, None)`` where it is never closed."""
    start = skip_space(text, 0)
    for opening, closing in THOUGHTS.items():
        if text.startswith(opening, start):
            thought, closed, rest = text[start + len(opening) :].partition(closing)
            return thought, rest if closed else None
    return None, text
