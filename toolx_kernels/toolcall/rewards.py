"""Rewards for tool calls."""

from toolx_kernels.toolcall.match import bfcl_match, exact_match
from toolx_kernels.toolcall.parse import only_calls, parse_calls
from toolx_kernels.toolcall.rows import Row


def is_correct(text: str, row: Row) -> bool:
    """Whether the calls in `text` are right for `row`, whatever else `text` says: by BFCL's rules (`bfcl_match`) for a
    row with `possible_answers`, else by `exact_match` with its answer."""
    return _is_correct(text, row.answer, row.tools, row.columns.get("possible_answers"), row.columns.get("category"))


def no_think_reward(
    prompts: list, completions: list, completion_ids: list[list[int]], *, answer: list, tools: list, **columns: list
) -> list[float]:
    """1.0 for a completion with the right calls and nothing outside their `<tool_call>` blocks, else 0.0.

    ToolExpander's reward without thinking (arXiv 2510.07737), in TRL's signature: completions are strings or lists of
    chat messages (`completion_text`), the others are columns with one entry per completion. Rows with
    `possible_answers` (and `category`) are judged by BFCL's rules. Where no call is the right answer, any text without
    one is.
    """
    possible = columns.get("possible_answers") or [None] * len(completions)
    category = columns.get("category") or [None] * len(completions)
    rewards = []
    for completion, *expected in zip(completions, answer, tools, possible, category, strict=True):
        text = completion_text(completion)
        right = _is_correct(text, *expected) and (only_calls(text) or parse_calls(text) == [])
        rewards.append(float(right))
    return rewards


def completion_text(completion: str | list[dict]) -> str:
    """What the model wrote: a string as it is; of chat messages those of the assistant, joined by newlines, without
    what tools answered in between."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] or "" for message in completion if message["role"] == "assistant")


def _is_correct(text: str, answer: list, tools: list, possible: list | None, category: str | None) -> bool:
    calls = parse_calls(text)
    return exact_match(calls, answer) if possible is None else bfcl_match(calls, tools, possible, category)
