"""Rewards and correctness of completions that call tools."""

import json
import math
import re
from collections.abc import Sequence

from toolx_kernels.toolcall.bfcl_match import bfcl_match
from toolx_kernels.toolcall.match import alike, exact_match
from toolx_kernels.toolcall.parse import Reading, read
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.schema import unknown_argument
from toolx_kernels.toolcall.tool_format import HERMES, ToolFormat

NEARLY_RIGHT = 0.99  # the highest reward by similarity of calls that are not right
COMPARED_WORDS = 200  # at the beginning of a text, so that similarity takes time linear in its length
_WORD = re.compile(r"[^\W_]+")


def is_correct(text: str | Sequence[str], row: Row, tool_format: ToolFormat = HERMES) -> bool:
    """Whether the calls in ``text`` are right for ``row``, whatever else ``text`` says.

    Rows with ``possible_answers`` are judged by BFCL's rules (``bfcl_match``), others by ``exact_match`` with their
    answer and tools. A leading thought is ignored; if it is never closed, nothing is right.

    If ``text`` is a list, the texts of several turns, each must be well-formed and their calls count together: a failed
    call that a later turn corrects is one call too many.
    """
    turns = [read(turn, tool_format) for turn in ([text] if isinstance(text, str) else text)]
    return _is_right(turns, row.answer, row.tools, row.columns.get("possible_answers"), row.columns.get("category", ""))


class CallReward:
    """A reward function with TRL's signature: 1.0 for a completion with the right calls and nothing else, else 0.0.

    What the format puts around calls is allowed. If the right answer has no call, any text without calls is right.
    Rows with ``possible_answers`` (and ``category``) are judged by BFCL's rules. A leading thought earns 0.0, or, with
    ``allow_thoughts``, what the rest of its turn earns; a thought that is never closed always earns 0.0.
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
        """Returns one reward per completion. Completions are strings, or lists of chat messages whose assistant turns
        are parsed one by one; the other arguments are columns with one entry per completion."""
        possible = columns.get("possible_answers") or [None] * len(completions)
        category = columns.get("category") or [None] * len(completions)
        rewards = []
        for completion, *expected in zip(completions, answer, tools, possible, category, strict=True):
            turns = [read(text, self.tool_format) for text in completion_turns(completion)]
            well_formed = all(
                (turn.bare or turn.calls == []) and (self.allow_thoughts or turn.thought is None) for turn in turns
            )
            rewards.append(self._earned(turns, *expected) if well_formed else 0.0)
        return rewards

    def _earned(
        self, turns: Sequence[Reading], answer: list, tools: list, possible: list | None, category: str
    ) -> float:
        return float(_is_right(turns, answer, tools, possible, category))


class SimilarityReward(CallReward):
    """``CallReward`` with partial rewards, after STAR (arXiv 2602.03022, Sim-RL).

    What earns 1.0 there earns 1.0. Other calls, as well-formed as there, earn their similarity to the answer, at most
    ``NEARLY_RIGHT``.

    Calls with the same name are paired, the most similar first. A pair scores the sum over its common arguments, 1 for
    equal values (as ``exact_match`` compares them) and ROUGE-L's F1 for two strings, divided by the number of arguments
    in either call; without arguments it scores 1. The sum over the pairs is divided by the number of calls in either
    answer, where a pair counts once. A tool that is not offered, an argument that its schema does not name, a call
    where none is expected and no call where one is expected earn 0.

    Words are letters and digits of any script, in lower case. The longest common subsequence uses the first
    ``COMPARED_WORDS`` words, F1 the lengths of the whole texts. STAR's own code pairs calls in the order in which they
    are written, stems English words, treats 1, 1.0 and True as equal, and gives -1 for malformed and unknown calls.

    >>> answer = [{"name": "f", "arguments": {"city": "New York", "days": 3}}]
    >>> text = '<tool_call>{"name": "f", "arguments": {"city": "York", "days": 3}}</tool_call>'
    >>> tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    >>> SimilarityReward()(["How is it?"], [text], [[1]], answer=[answer], tools=[tools])  # (2/3 + 1) / 2
    [0.8333333333333333]
    """

    def __init__(self, tool_format: ToolFormat = HERMES, allow_thoughts: bool = False) -> None:
        super().__init__(tool_format, allow_thoughts)
        self.__name__ = "similarity_reward"

    def _earned(
        self, turns: Sequence[Reading], answer: list, tools: list, possible: list | None, category: str
    ) -> float:
        if _is_right(turns, answer, tools, possible, category):
            return 1.0
        calls = [call for turn in turns for call in turn.calls or ()]
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
        if not calls or not all(_is_known(call, schemas) for call in calls):
            return 0.0
        return min(_similarity(alike(calls, tools), alike(answer, tools)), NEARLY_RIGHT)


def no_think_reward(prompts: list, completions: list, completion_ids: list[list[int]], **columns: list) -> list[float]:
    """ToolExpander's reward without thinking (arXiv 2510.07737): ``CallReward()``, for calls in the Hermes format."""
    return CallReward()(prompts, completions, completion_ids, **columns)


def completion_text(completion: str | list[dict]) -> str:
    """The text that the model wrote: a string unchanged; of chat messages the assistant's, joined by newlines, without
    tool messages."""
    return "\n".join(completion_turns(completion))


def completion_turns(completion: str | list[dict]) -> list[str]:
    """The texts that the model wrote, one per turn; see ``completion_text``."""
    if isinstance(completion, str):
        return [completion]
    return [message["content"] or "" for message in completion if message["role"] == "assistant"]


def _is_right(turns: Sequence[Reading], answer: list, tools: list, possible: list | None, category: str) -> bool:
    calls = None if any(turn.calls is None for turn in turns) else [call for turn in turns for call in turn.calls or ()]
    return exact_match(calls, answer, tools) if possible is None else bfcl_match(calls, tools, possible, category)


def _is_known(call: dict, schemas: dict[str, dict]) -> bool:
    """Whether the tool is offered and its schema names the arguments."""
    return call["name"] in schemas and unknown_argument(call["arguments"], schemas[call["name"]]) is None


def _similarity(calls: list[dict], answer: list[dict]) -> float:
    """The similarity of two lists of calls, at least one of them not empty; symmetric."""
    ours, theirs = ([_readings(call["arguments"]) for call in some] for some in (calls, answer))
    pairs = [
        (_pair_similarity(ours[n], theirs[m]), n, m)
        for n, call in enumerate(calls)
        for m, wanted in enumerate(answer)
        if call["name"] == wanted["name"]
    ]
    left, wanting, scores = set(range(len(calls))), set(range(len(answer))), []
    for score, n, m in sorted(pairs, key=lambda pair: -pair[0]):
        if n in left and m in wanting:
            left.remove(n)
            wanting.remove(m)
            scores.append(score)
    return math.fsum(scores) / (len(left) + len(wanting) + len(scores))


def _readings(arguments: dict) -> dict[str, tuple[str, list[str] | None]]:
    """For each argument its JSON, to test equality, and its words if it is a string."""
    return {
        name: (json.dumps(value, sort_keys=True), _WORD.findall(value.lower()) if isinstance(value, str) else None)
        for name, value in arguments.items()
    }


def _pair_similarity(ours: dict, theirs: dict) -> float:
    names = len(ours.keys() | theirs.keys())
    scores = []
    for name in ours.keys() & theirs.keys():
        (value, words), (wanted, wanted_words) = ours[name], theirs[name]
        if value == wanted:
            scores.append(1.0)
        elif words and wanted_words:
            scores.append(_rouge_l(words, wanted_words))
    return math.fsum(scores) / names if names else 1.0


def _rouge_l(ours: list[str], theirs: list[str]) -> float:
    """F1 of the longest common subsequence, computed for all words of one text at once, one bit each (Hyyro 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(ours[:COMPARED_WORDS]):
        places[word] = places.get(word, 0) | 1 << place
    every = free = (1 << len(ours[:COMPARED_WORDS])) - 1
    for word in theirs[:COMPARED_WORDS]:
        hits = free & places.get(word, 0)
        free = (free + hits | free - hits) & every
    return 2 * (every & ~free).bit_count() / (len(ours) + len(theirs))
