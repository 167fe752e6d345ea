"""Rewards and correctness of completions that call tools."""

from collections.abc import Sequence

from toolx_kernels.toolcall.bfcl_match import bfcl_match
from toolx_kernels.toolcall.match import exact_match
from toolx_kernels.toolcall.parse import only_calls, parse_calls
from toolx_kernels.toolcall.rows import Row


def is_correct(text: str | Sequence[str], row: Row) -> bool:
    """Whether the calls in ``text`` are right for ``row``, whatever else ``text`` says: by BFCL's rules
    (``bfcl_match``) for a row with ``possible_answers``, else by ``exact_match`` with its answer.

    Of several turns, a list of texts, each must be well-formed by itself, and their calls count together: one that
    failed and was mended in a later turn is one too many."""
    turns, columns = [text] if isinstance(text, str) else text, row.columns
    return _is_correct(turns, row.answer, row.tools, columns.get("possible_answers"), columns.get("category", ""))


def no_think_reward(
    prompts: list, completions: list, completion_ids: list[list[int]], *, answer: list, tools: list, **columns: list
) -> list[float]:
    """1.0 for a completion with the right calls and nothing outside their ``<tool_call>`` blocks, else 0.0.

    ToolExpander's reward without thinking (arXiv 2510.07737), in TRL's signature: completions are strings or lists of
    chat messages (``completion_text``), the others are columns with one entry per completion. Rows with
    ``possible_answers`` (and ``category``) are judged by BFCL's rules. Where no call is the right answer, any text
    without one is.
    """
    possible = columns.get("possible_answers") or [None] * len(completions)
    category = columns.get("category") or [None] * len(completions)
    rewards = []
    for completion, *expected in zip(completions, answer, tools, possible, category, strict=True):
        turns = completion_turns(completion)
        right = _is_correct(turns, *expected) and all(only_calls(text) or parse_calls(text) == [] for text in turns)
        rewards.append(float(right))
    return rewards


def completion_text(completion: str | list[dict]) -> str:
    """What the model wrote: a string as it is; of chat messages those of the assistant, joined by newlines, without
    what tools answered in between."""
    return "\n".join(completion_turns(completion))


def completion_turns(completion: str | list[dict]) -> list[str]:
    """The same, turn by turn."""
    if isinstance(completion, str):
        return [completion]
    return [message["content"] or "" for message in completion if message["role"] == "assistant"]


def _is_correct(turns: Sequence[str], answer: list, tools: list, possible: list | None, category: str) -> bool:
    of_turns = [parse_calls(text) for text in turns]
    calls = None if None in of_turns else [call for of_turn in of_turns for call in of_turn or ()]
    return exact_match(calls, answer) if possible is None else bfcl_match(calls, tools, possible, category)
