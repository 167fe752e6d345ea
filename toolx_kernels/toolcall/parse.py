"""Parsing of a model's output into calls. No output can make it raise or hang, and none is run as code."""

from typing import NamedTuple

from toolx_kernels.toolcall.strict_json import skip_space
from toolx_kernels.toolcall.tool_format import HERMES, ToolFormat

THOUGHTS = {"<think>": "</think>", "[THINK]": "[/THINK]"}  # tags around the thought before a model's answer


class Reading(NamedTuple):
    """The thought and the calls of a text.

    >>> read("<think>Hm.</think>I cannot.")
    Reading(thought='Hm.', calls=[], bare=False)
    """

    thought: str | None  # the text between the tags of a leading thought; None: no thought
    calls: list[dict] | None  # in the rest, in order, each {"name", "arguments"}; None: some are malformed
    bare: bool  # whether the rest holds only calls, what their format puts around them, and white space


def read(text: str, tool_format: ToolFormat = HERMES) -> Reading:
    """Reads the leading thought of ``text``, and the calls after it; docs/tool_calls.md says what each format counts as
    a call.

    Text in the thought is never a call. A thought that is never closed counts as malformed calls. Stops at the first
    malformed call. Takes time linear in the length of ``text``.
    """
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
    """Reads the calls ``{"name", "arguments"}`` of ``text`` in order, without a leading thought.

    Returns ``[]`` if there are none, None if one is malformed or the thought is never closed (``read``).

    In the Hermes format, the default, a call is a ``<tool_call>`` block with one JSON object with exactly the keys
    ``name`` (a string) and ``arguments`` (an object), as Qwen's templates write it and its tool prompt requests.
    Malformed are: unbalanced or nested tags, invalid JSON (also NaN, Infinity and raw control characters in strings),
    a repeated key, a number that Python cannot represent (1e999, thousands of digits), other or missing keys, values of
    another type, and nesting deeper than ``MAX_DEPTH``. Tags inside a JSON string are text.
    """
    return read(text, tool_format).calls


def only_calls(text: str, tool_format: ToolFormat = HERMES) -> bool:
    """Whether ``text`` holds only well-formed calls and white space, and no thought (true for blank text)."""
    thought, _, bare = read(text, tool_format)
    return bare and thought is None


def split_thought(text: str) -> tuple[str | None, str | None]:
    """Splits ``text`` into a leading thought, between one of the pairs of ``THOUGHTS``, and the text after its first
    closing tag. Returns ``(None, text)`` without a thought, ``(thought, None)`` if it is never closed."""
    start = skip_space(text, 0)
    for opening, closing in THOUGHTS.items():
        if text.startswith(opening, start):
            thought, closed, rest = text[start + len(opening) :].partition(closing)
            return thought, rest if closed else None
    return None, text
