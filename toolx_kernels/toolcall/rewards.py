"""Rewards for tool calls, and the calling of reward functions that users bring."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.match import bfcl_match, exact_match
from toolx_kernels.toolcall.parse import only_calls, parse_calls
from toolx_kernels.toolcall.rows import Row, short

_FLOAT32_MAX = (2 - 2**-23) * 2.0**127


def is_correct(text: str, row: Row) -> bool:
    """Whether the calls in `text` are right for `row`, whatever else `text` says: by BFCL's rules (`bfcl_match`) for a
    row with `possible_answers`, else by `exact_match` with its answer."""
    return _is_correct(text, row.answer, row.tools, row.columns.get("possible_answers"), row.columns.get("category"))


def no_think_reward(
    prompts: list, completions: list, completion_ids: list[list[int]], *, answer: list, tools: list, **columns: list
) -> list[float]:
    """1.0 for a completion with the right calls and nothing outside their `<tool_call>` blocks, else 0.0.

    ToolExpander's reward without thinking (arXiv 2510.07737), in TRL's signature: completions are strings or lists of
    assistant messages, the others are columns with one entry per completion. Rows with `possible_answers` (and
    `category`) are judged by BFCL's rules. Where no call is the right answer, any text without one is.
    """
    possible = columns.get("possible_answers") or [None] * len(completions)
    category = columns.get("category") or [None] * len(completions)
    rewards = []
    for completion, *expected in zip(completions, answer, tools, possible, category, strict=True):
        text = completion if isinstance(completion, str) else "".join(message["content"] for message in completion)
        right = _is_correct(text, *expected) and (only_calls(text) or parse_calls(text) == [])
        rewards.append(float(right))
    return rewards


def call_reward(
    func: Callable, rows: Sequence[Row], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
) -> list[float | None]:
    """The rewards that `func`, a reward function in TRL's signature, gives to `texts[i]`, written for `rows[i]`.

    `func` gets prompts as the rows have them, completions as strings (for a string prompt) or as lists of one assistant
    message, the token ids, and `id`, `tools`, `answer` and the free columns as lists; a column that a row lacks is None
    there. All are copies, one per completion, so what `func` does to them stays its own. A reward of None says that the
    function does not apply.

    Raises InputError, naming the function, when it raises (and the rows on which it does, found by calling it for each
    alone), returns another number of rewards than it got completions, or a reward that is no finite float32.
    """
    name = getattr(func, "__name__", type(func).__name__)
    try:
        rewards = _listed(func(**_arguments(rows, texts, completion_ids)))
    except Exception as error:
        where = _culprits(func, rows, texts, completion_ids)
        reason = ": ".join(filter(None, (type(error).__name__, str(error).strip().partition("\n")[0])))
        raise InputError(f"reward function {name!r} raised {reason}{where}; mend it or leave it out") from error
    if not isinstance(rewards, list):
        raise InputError(
            f"reward function {name!r} returned {short(rewards)}; it must return a list with one reward per completion"
        )
    if len(rewards) != len(texts):
        raise InputError(
            f"reward function {name!r} returned {len(rewards)} rewards for {len(texts)} completions; it must return one"
            " per completion"
        )
    return [_number(reward, name, row) for reward, row in zip(rewards, rows, strict=True)]


def _is_correct(text: str, answer: list, tools: list, possible: list | None, category: str | None) -> bool:
    calls = parse_calls(text)
    return exact_match(calls, answer) if possible is None else bfcl_match(calls, tools, possible, category)


def _listed(rewards: Any) -> Any:
    """`rewards` as a list, itself where it cannot be iterated over; a generator runs here, and raises here."""
    try:
        values = iter(rewards)
    except TypeError:
        return rewards
    return list(values)


def _copy(value: Any) -> Any:
    """`copy.deepcopy`, three times as fast on JSON, which is what columns mostly hold."""
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    if type(value) is list:
        return [_copy(item) for item in value]
    return value if type(value) in (str, int, float, bool) else copy.deepcopy(value)


def _arguments(rows: Sequence[Row], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> dict:
    names = {name: None for row in rows for name in row.columns}
    return {
        "prompts": [_copy(row.prompt) for row in rows],
        "completions": [
            text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ],
        "completion_ids": [list(ids) for ids in completion_ids],
        "id": [row.id for row in rows],
        "tools": [_copy(row.tools) for row in rows],
        "answer": [_copy(row.answer) for row in rows],
        **{name: [_copy(row.columns.get(name)) for row in rows] for name in names},
    }


def _culprits(func: Callable, rows: Sequence[Row], texts: Sequence[str], completion_ids: Sequence) -> str:
    """Names the rows on which `func` raises when called for them alone, unless it does so on all of several."""
    raising = []
    for row, text, ids in zip(rows, texts, completion_ids, strict=True):
        try:
            _listed(func(**_arguments([row], [text], [ids])))
        except Exception:
            raising.append(row.id)
    if not raising or len(raising) == len(rows) > 1:
        return ""
    ids = list(dict.fromkeys(raising))
    shown = ", ".join(map(repr, ids[:3])) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
    return f" on row{'s' if len(ids) > 1 else ''} {shown}"


def _number(reward: object, name: str, row: Row) -> float | None:
    if reward is None:
        return None
    try:
        value = math.nan if isinstance(reward, str) else float(reward)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not abs(value) <= _FLOAT32_MAX:
        raise InputError(
            f"reward function {name!r} gave {short(reward)} for row {row.id!r}; a reward is a finite float32, at most"
            f" {_FLOAT32_MAX:.2g} in size, or None where the function does not apply"
        )
    return value
