"""Self-exemplifying thinking (ToolExpander, arXiv 2510.07737): the model writes examples of its own, thinks, answers.

<examples>[{"tools": [...], "question": "...", "answer": [...]}, ...]</examples>
<think>...</think>
<tool_call>...</tool_call>
"""

import hashlib
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.rewards import CallReward, completion_text, is_correct
from toolx_kernels.toolcall.rows import Row, short
from toolx_kernels.toolcall.strict_json import is_shallow, read_json, skip_space
from toolx_kernels.toolcall.tool_format import HERMES, ToolFormat

_KEYS = {"tools", "question", "answer"}
_TAG = r"<(?:(examples|think)|/(?:examples|think))>"
_EXTENT = json.JSONDecoder()  # only says where a JSON text ends; what it holds is read by ``read_json``
_WORD = re.compile(r"-?\d+(?:\.\d+)?|\w+")
_FIRST_TO_LAST_WORD = re.compile(r"\w(?:.*\w)?")
_NEAR_FROM = 4  # words: in a shorter question one word is a large part, and some scripts write none between spaces


def instructions(tool_format: ToolFormat = HERMES) -> str:
    """What asks a model for this format, its answer in a form of calls."""
    return (
        "Reply in three parts and write nothing else:\n"
        "1. <examples></examples> around a JSON list of at least 4 different examples that you make up, not the user's"
        ' request. Each is {"tools": [names of tools], "question": "a request", "answer": [{"name": <function-name>,'
        ' "arguments": <args-json-object>}]}.\n'
        "2. <think></think> around your thoughts on the user's request.\n"
        f"3. Your answer: {tool_format.answer}."
    )


INSTRUCTIONS = instructions()


@dataclass(frozen=True, slots=True)
class Sections:
    """What a completion in this format consists of.

    >>> parse_sections('<examples>[]</examples><think>No tool fits.</think>\\nSorry.')
    Sections(examples=[], thought='No tool fits.', answer='Sorry.', in_order=True)
    """

    examples: list[dict] | None  # each with "tools", "question" and "answer"; None: no block, or a malformed one
    thought: str | None  # None: no block
    answer: str | None  # what is outside of the two sections; None when one of them is never closed
    in_order: bool  # examples, then thought, then the answer, either section at most once and nothing between them


def parse_sections(text: str, tool_format: ToolFormat = HERMES) -> Sections:
    """The sections of ``text``. Never raises, and takes time linear in the length of ``text``.

    Examples are malformed unless they are one JSON list of objects with the keys ``tools``, ``question`` and
    ``answer``, not nested deeper than calls may be. Tags inside their JSON strings, inside the thought and inside
    calls are text; malformed examples end at the last ``</examples>``. Of a second or misplaced section the answer
    keeps the empty tags, so that its calls count nowhere and no call closes over it. Behind malformed calls all is
    answer, which they make wrong.
    """
    found: dict[str, Any] = {}
    answer: list[str] = []
    in_order, answered, position = True, False, 0
    while tag := _next(tool_format).search(text, position):
        name, start = tag[1], tag.end()
        answer.append(before := text[position : tag.start()])
        answered = answered or bool(before.strip())
        if name is not None:
            content, end = _examples(text, start) if name == "examples" else _thought(text, start)
            if end is None:
                return Sections(found.get("examples"), found.get("think"), None, False)
            if answered or name in found or "think" in found:
                in_order = False
                answer.append(f"<{name}></{name}>")
            found.setdefault(name, content)
            position = end
            continue
        answered, position = True, start
        if opened := tool_format.opener.match(text, tag.start()):
            block = tool_format.block(text, opened)
            position = len(text) if block is None else block.end
        else:  # a tag that closes nothing
            in_order = False
        answer.append(text[tag.start() : position])
    answer.append(text[position:])
    return Sections(found.get("examples"), found.get("think"), "".join(answer).strip(), in_order)


def answer_of(text: str, tool_format: ToolFormat = HERMES) -> str | None:
    """The part of ``text`` that answers, without examples and thought; None when one of these is never closed."""
    return parse_sections(text, tool_format).answer


def is_answer_correct(text: str, row: Row, tool_format: ToolFormat = HERMES) -> bool:
    """``is_correct`` of the answer part alone: calls in examples and thoughts are none of it, and a text that ends
    within them is wrong also where no call is right."""
    answer = answer_of(text, tool_format)
    return answer is not None and is_correct(answer, row, tool_format)


def distinct_examples(examples: Sequence[Any], request: str | None = None) -> int:
    """How many different examples there are among JSON values; linear in their size.

    Never raises on those that ``parse_sections`` gives.

    An example is an object with a list of ``tools`` that is not empty, a ``question`` that holds a word, and a list as
    its ``answer``. Two count once when, apart from case, spacing and how they end, their questions are the same,
    whatever the answers; or when their answers are alike (case, punctuation, order of keys and calls aside) and the
    questions differ in punctuation and the order of words alone or, from four words on and with calls in the answer, in
    one word.

    One that repeats ``request``, the user's own, does not count: it would be the answer given early, not an example,
    and the cheapest fourth one to write.
    """
    questions: set[str] = set()
    of_answer: dict[tuple, set[int]] = defaultdict(set)  # signatures of the questions that have it
    if request is not None:
        questions.add(_ends_stripped(request))
    count = 0
    for example in examples:
        if not _is_example(example):
            continue
        question = _ends_stripped(example["question"])
        words = _words(example["question"])
        answer = tuple(sorted(_canonical(call) for call in example["answer"]))
        signatures = _signatures(words, near=bool(answer))
        if question not in questions and of_answer[answer].isdisjoint(signatures):
            count += 1
            questions.add(question)
            of_answer[answer] |= signatures
    return count


class SelfExemplifyingReward:
    """ToolExpander's self-exemplifying reward, a reward function in TRL's signature: ``1 + bonus`` for a completion
    whose result, format and examples are right, 1 where result and format are, else 0.

    The answer part is judged as ``CallReward`` without thoughts judges a whole completion; the format also asks that
    the sections stand in their order, though neither has to be there. The examples are right when more than
    ``more_than`` of them parse and, if ``distinct``, differ (``distinct_examples``); the paper's own rule, parsing and
    counting alone, is ``distinct=False``. The bonus keeps its size only where advantages are not divided by the std of
    a group that differs in nothing else: see ``min_std`` of ``group_advantages``.

    Raises InputError for a bonus that is negative or not finite, or a count that is no whole number from 0 on.
    """

    __name__ = "self_exemplifying_reward"

    def __init__(
        self, bonus: float = 0.01, more_than: int = 3, distinct: bool = True, tool_format: ToolFormat = HERMES
    ) -> None:
        if not 0 <= bonus < float("inf"):
            raise InputError(f"bonus={bonus} must be a finite number that is not negative, such as 0.01")
        if not isinstance(more_than, int) or more_than < 0:
            raise InputError(f"more_than={more_than!r} must be a whole number of examples, at least 0, such as 3")
        self.bonus, self.more_than, self.distinct = bonus, more_than, distinct
        self._judge = CallReward(tool_format)

    def __call__(self, prompts: list, completions: list, completion_ids: list, **columns: list) -> list[float]:
        """One reward for each completion; prompts and completions are strings or lists of chat messages."""
        judge = self._judge
        sections = [parse_sections(completion_text(completion), judge.tool_format) for completion in completions]
        answers = [part.answer or "" for part in sections]
        right = judge(prompts, answers, completion_ids, **columns)
        return [
            self._with_bonus(part.examples or [], prompt) if reward and part.in_order else 0.0
            for reward, part, prompt in zip(right, sections, prompts, strict=True)
        ]

    def _with_bonus(self, examples: list[dict], prompt: str | list[dict]) -> float:
        count = distinct_examples(examples, _request(prompt)) if self.distinct else len(examples)
        return 1.0 + self.bonus if count > self.more_than else 1.0


def render_self_exemplified(
    examples: Sequence[dict], thought: str, calls: Sequence[dict], tool_format: ToolFormat = HERMES
) -> str:
    """The assistant's text in this format, one example a line; what ``parse_sections`` reads back. For cold starts.

    Raises InputError for a thought that holds ``</think>``, or an example that lacks one of its keys.
    """
    if "</think>" in thought:
        raise InputError(f"the thought {short(thought)} holds '</think>', which would end it: leave that out")
    for example in examples:
        if not example.keys() >= _KEYS:
            raise InputError(f"the example {short(example)} must have the keys {', '.join(sorted(_KEYS))}: add them")
    lines = ",\n".join(json.dumps(example, ensure_ascii=False) for example in examples)
    return f"<examples>\n[{lines}]\n</examples>\n<think>\n{thought}\n</think>\n{tool_format.render(calls)}"


@lru_cache
def _next(tool_format: ToolFormat) -> re.Pattern[str]:
    """What finds the next tag of a section, whose name it gives where it opens one, or the next opener of calls."""
    return re.compile(f"{_TAG}|{tool_format.opener.pattern}")


def _examples(text: str, start: int) -> tuple[list[dict] | None, int | None]:
    """The examples of the block whose content begins at ``start``, and where the block ends (None: nowhere)."""
    close = "</examples>"
    end = _json_end(text, start)
    if end is not None and text.startswith(close, stop := skip_space(text, end)):
        return _read_examples(text[start:end]), stop + len(close)
    last = text.rfind(close, start)
    return None, None if last < 0 else last + len(close)


def _thought(text: str, start: int) -> tuple[str, int | None]:
    end = text.find("</think>", start)
    return text[start:end].strip(), None if end < 0 else end + len("</think>")


def _json_end(text: str, start: int) -> int | None:
    try:
        return _EXTENT.raw_decode(text, skip_space(text, start))[1]
    except (ValueError, RecursionError):
        return None


def _read_examples(text: str) -> list[dict] | None:
    try:
        examples = read_json(text)
    except (ValueError, RecursionError):
        return None
    well_formed = (
        isinstance(examples, list)
        and is_shallow(examples)
        and all(isinstance(example, dict) and example.keys() >= _KEYS for example in examples)
    )
    return examples if well_formed else None


def _is_example(example: Any) -> bool:
    return (
        isinstance(example, dict)
        and isinstance(tools := example.get("tools"), list)
        and len(tools) > 0
        and isinstance(question := example.get("question"), str)
        and _WORD.search(question) is not None
        and isinstance(example.get("answer"), list)
        and is_shallow(example)
    )


def _ends_stripped(question: str) -> str:
    """Without case, spacing and what is no word at its ends. Signs within stay: 3 + 5 is not 3 - 5."""
    found = _FIRST_TO_LAST_WORD.search(" ".join(_folded(question).split()))
    return found[0] if found else ""


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _words(text: str) -> list[str]:
    return _WORD.findall(_folded(text))


def _canonical(call: Any) -> tuple[str, ...]:
    return tuple(_words(json.dumps(call, sort_keys=True, ensure_ascii=False)))


def _signatures(words: list[str], near: bool) -> set[int]:
    """Numbers of which two questions share one when their words are the same in any order, or (``near``) when one word
    is another, missing or added: sums of the words' hashes, the second kind without one of them."""
    digests = (hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=16).digest() for word in words)
    hashes = [int.from_bytes(digest, "big") for digest in digests]
    total = sum(hashes)
    return {total, *(total - one for one in hashes if near and len(words) >= _NEAR_FROM)}


def _request(prompt: str | list[dict]) -> str:
    if isinstance(prompt, str):
        return prompt
    return next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")
