"""Self-exemplifying thinking (ToolExpander, arXiv 2510.07737): the model makes up examples, thinks, answers.

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

from toolx_kernels.errors import InputError, short
from toolx_kernels.toolcall.rewards import CallReward, completion_text, is_correct
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.strict_json import is_shallow, read_json, skip_space
from toolx_kernels.toolcall.tool_format import HERMES, ToolFormat

_KEYS = {"tools", "question", "answer"}
_TAG = r"<(?:(examples|think)|/(?:examples|think))>"
_EXTENT = json.JSONDecoder()  # only finds the end of a JSON text, which ``read_json`` reads
_WORD = re.compile(r"-?\d+(?:\.\d+)?|\w+")
_FIRST_TO_LAST_WORD = re.compile(r"\w(?:.*\w)?")
_NEAR_FROM = 4  # words: one word is a large part of a shorter question, and some scripts do not separate words


def instructions(tool_format: ToolFormat = HERMES) -> str:
    """The instructions that ask a model for these sections, with calls in ``tool_format``."""
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
    """The sections of a completion.

    >>> parse_sections('<examples>[]</examples><think>No tool fits.</think>\\nSorry.')
    Sections(examples=[], thought='No tool fits.', answer='Sorry.', in_order=True)
    """

    examples: list[dict] | None  # each with "tools", "question" and "answer"; None: no block, or a malformed one
    thought: str | None  # None: no block
    answer: str | None  # the text outside the two sections; None: one of them is never closed
    in_order: bool  # examples, then thought, then the answer, each section at most once and nothing between them


def parse_sections(text: str, tool_format: ToolFormat = HERMES) -> Sections:
    """Splits ``text`` into its sections. Never raises, and takes time linear in the length of ``text``.

    Examples are malformed unless they are one JSON list of objects with the keys ``tools``, ``question`` and
    ``answer``, nested no deeper than calls may be. Tags inside their JSON strings, the thought and calls are text;
    malformed examples end at the last ``</examples>``. A second or misplaced section leaves its empty tags in the
    answer: its calls do not count, and no call can extend across it. After malformed calls all text is answer, which is
    wrong.
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
    """The answer in ``text``, without examples and thought; None if one of these is never closed."""
    return parse_sections(text, tool_format).answer


def is_answer_correct(text: str, row: Row, tool_format: ToolFormat = HERMES) -> bool:
    """``is_correct`` for the answer alone: calls in examples and thoughts do not count, and a text that ends inside one
    of them is wrong, even if the right answer has no call."""
    answer = answer_of(text, tool_format)
    return answer is not None and is_correct(answer, row, tool_format)


def distinct_examples(examples: Sequence[Any], request: str | None = None) -> int:
    """Counts the different examples among JSON values, in time linear in their size.

    Never raises on values from ``parse_sections``.

    An example is an object with a list of ``tools`` that is not empty, a ``question`` that contains a word, and a list
    as its ``answer``. Two examples count once if their questions are the same except for case, spacing and signs at the
    ends, whatever the answers. They also count once if their answers are the same except for case, punctuation and the
    order of keys and calls, and their questions differ only in punctuation and word order or, if they have at least
    four words and the answer has calls, in one word.

    An example that repeats ``request``, the user's own, does not count: it would be the answer given early, not an
    example, and the cheapest fourth one to write.
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
    """ToolExpander's self-exemplifying reward, a reward function with TRL's signature: ``1 + bonus`` for a completion
    whose answer, format and examples are right, 1 if answer and format are, else 0.

    The answer is judged as ``CallReward`` without thoughts judges a whole completion. The format also requires the
    sections in order, but either may be missing. The examples are right if more than ``more_than`` of them parse and,
    with ``distinct``, differ (``distinct_examples``); ``distinct=False`` is the paper's rule, which only parses and
    counts. The bonus grows if advantages are divided by the std of a group that differs in nothing else: see
    ``min_std`` of ``group_advantages``.

    Raises InputError for a bonus that is negative or not finite, or a count that is not a whole number of at least 0.
    """

    __name__ = "self_exemplifying_reward"

    def __init__(
        self, bonus: float = 0.01, more_than: int = 3, distinct: bool = True, tool_format: ToolFormat = HERMES
    ) -> None:
        if not 0 <= bonus < float("inf"):
            raise InputError(f"bonus={bonus} must be a finite number that is not negative, such as 0.01.")
        if not isinstance(more_than, int) or more_than < 0:
            raise InputError(f"more_than={more_than!r} must be a whole number of examples, at least 0, such as 3.")
        self.bonus, self.more_than, self.distinct = bonus, more_than, distinct
        self._judge = CallReward(tool_format)

    def __call__(self, prompts: list, completions: list, completion_ids: list, **columns: list) -> list[float]:
        """Returns one reward per completion; prompts and completions are strings or lists of chat messages."""
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
    """Writes the assistant's text with these sections, one example per line, for a cold start; ``parse_sections`` reads
    it back.

    Raises InputError for a thought that contains ``</think>``, or an example that lacks one of its keys.
    """
    if "</think>" in thought:
        raise InputError(f"the thought {short(thought)} holds '</think>', which would end it: leave that out.")
    for example in examples:
        if not example.keys() >= _KEYS:
            raise InputError(f"the example {short(example)} must have the keys {', '.join(sorted(_KEYS))}: add them.")
    lines = ",\n".join(json.dumps(example, ensure_ascii=False) for example in examples)
    return f"<examples>\n[{lines}]\n</examples>\n<think>\n{thought}\n</think>\n{tool_format.render(calls)}"


@lru_cache
def _next(tool_format: ToolFormat) -> re.Pattern[str]:
    """A pattern of the next tag of a section, with its name as group 1 if it opens one, or the next opener of calls."""
    return re.compile(f"{_TAG}|{tool_format.opener.pattern}")


def _examples(text: str, start: int) -> tuple[list[dict] | None, int | None]:
    """The examples of the block whose content begins at ``start``, and the end of the block (None: never closed)."""
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
    """The question without case, spacing, and signs at its ends. Signs inside stay: 3 + 5 is not 3 - 5."""
    found = _FIRST_TO_LAST_WORD.search(" ".join(_folded(question).split()))
    return found[0] if found else ""


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _words(text: str) -> list[str]:
    return _WORD.findall(_folded(text))


def _canonical(call: Any) -> tuple[str, ...]:
    return tuple(_words(json.dumps(call, sort_keys=True, ensure_ascii=False)))


def _signatures(words: list[str], near: bool) -> set[int]:
    """Sums of the words' hashes: of all words and, with ``near``, of all but one. Two questions share a sum if they
    have the same words in any order or, with ``near``, if one word is replaced, missing or added."""
    digests = (hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=16).digest() for word in words)
    hashes = [int.from_bytes(digest, "big") for digest in digests]
    total = sum(hashes)
    return {total, *(total - one for one in hashes if near and len(words) >= _NEAR_FROM)}


def _request(prompt: str | list[dict]) -> str:
    if isinstance(prompt, str):
        return prompt
    return next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")
