"""Rewards and correctness of completions that call tools."""

from collections.abc import Sequence

from toolx_kernels.toolcall.bfcl_match import bfcl_match
from toolx_kernels.toolcall.match import exact_match
from toolx_kernels.toolcall.parse import Reading, read
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.tool_format import HERMES, ToolFormat


def is_correct(text: str | Sequence[str], row: Row, tool_format: ToolFormat = HERMES) -> bool:
    """Whether the calls in ``text`` are right for ``row``, whatever else ``text`` says: by BFCL's rules
    (``bfcl_match``) for a row with ``possible_answers``, else by ``exact_match`` with its answer. A leading thought is
    left out; behind one that is never closed nothing is right.

    Of several turns, a list of texts, each must be well-formed by itself, and their calls count together: one that
    failed and was mended in a later turn is one too many."""
    turns = [read(turn, tool_format) for turn in ([text] if isinstance(text, str) else text)]
    return _is_right(turns, row.answer, row.tools, row.columns.get("possible_answers"), row.columns.get("category", ""))


class CallReward:
    """A reward function in TRL's signature: 1.0 for a completion with the right calls and nothing beside them but what
    their form puts around them, else 0.0. Where no call is the right answer, any text without one is.

    Rows with ``possible_answers`` (and ``category``) are judged by BFCL's rules. A leading thought earns 0.0, or, with
    ``allow_thoughts``, what the rest of its turn earns; one that is never closed 0.0.
    """

    def __init__(self, tool_format: ToolFormat = HERMES, allow_thoughts: bool = False) -> None:
        self.tool_format, self.allow_thoughts = tool_format, allow_thoughts
        self.__name__ = "call_reward" if allow_thoughts else "no_think_reward"

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        *,
        answer: list,
        tools: list,
        **columns: list,
    ) -> list[float]:
        """One reward for each completion: strings or lists of chat messages, whose turns of the assistant are judged
        each by itself. The others are columns with one entry per completion."""
        possible = columns.get("possible_answers") or [None] * len(completions)
        category = columns.get("category") or [None] * len(completions)
        rewards = []
        for completion, *expected in zip(completions, answer, tools, possible, category, strict=True):
            turns = [read(text, self.tool_format) for text in completion_turns(completion)]
            well_formed = all(
                (turn.bare or turn.calls == []) and (self.allow_thoughts or turn.thought is None) for turn in turns
            )
            rewards.append(float(well_formed and _is_right(turns, *expected)))
        return rewards


def no_think_reward(prompts: list, completions: list, completion_ids: list[list[int]], **columns: list) -> list[float]:
    """ToolExpander's reward without thinking (arXiv 2510.07737): ``CallReward()``, of calls in Hermes' form."""
    return CallReward()(prompts, completions, completion_ids, **columns)


def completion_text(completion: str | list[dict]) -> str:
    """What the model wrote: a string as it is; of chat messages those of the assistant, joined by newlines, without
    what tools answered in between."""
    return "\n".join(completion_turns(completion))


def completion_turns(completion: str | list[dict]) -> list[str]:
    """The same, turn by turn."""
    if isinstance(completion, str):
        return [completion]
    return [message["content"] or "" for message in completion if message["role"] == "assistant"]


def _is_right(turns: Sequence[Reading], answer: list, tools: list, possible: list | None, category: str) -> bool:
    calls = None if any(turn.calls is None for turn in turns) else [call for turn in turns for call in turn.calls or ()]
    return exact_match(calls, answer) if possible is None else bfcl_match(calls, tools, possible, category)
