"""Scores of an evaluation: judged answers, accuracy per category with intervals, and the files of both."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolx_kernels.errors import InputError
from toolx_kernels.evaluate.intervals import Estimate, wilson
from toolx_kernels.evaluate.tables import aligned, markdown
from toolx_kernels.files import write_atomically
from toolx_kernels.settings import between, check_number
from toolx_kernels.toolcall.parse import split_thought
from toolx_kernels.toolcall.rows import Row

SCORES, TABLE, ANSWERS = "scores.json", "scores.md", "answers.jsonl"
TOO_LONG = "context"  # finish_reason of a row whose prompt leaves no room in the context: nothing was generated


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion, judged, e.g. ``Answer("<tool_call>...", right=True, tokens=31, finish_reason="stop")``."""

    text: str
    right: bool
    tokens: int
    finish_reason: str
    reward: float | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """The score of ``n`` rows with ``samples`` completions each, of which ``right`` in all are right.

    ``accuracy`` is the share of right completions and ``pass_at[k]`` the mean of ``pass_at_k`` over rows; the
    intervals are Wilson's over rows, which are the independent trials.
    """

    n: int
    samples: int
    right: int
    accuracy: Estimate
    pass_at: dict[int, Estimate]

    def as_dict(self) -> dict[str, Any]:
        """The score as JSON: intervals are lists of two numbers next to the values."""
        described: dict[str, Any] = {
            "n": self.n,
            "samples": self.samples,
            "right": self.right,
            "accuracy": self.accuracy.value,
            "interval": self.accuracy[1:],
        }
        if self.pass_at:
            described["pass_at"] = {k: {"value": at.value, "interval": at[1:]} for k, at in self.pass_at.items()}
        return described


@dataclass(frozen=True, slots=True)
class Scores:
    """The answers to the rows of one dataset, equally many to each row."""

    rows: Sequence[Row]
    answers: Sequence[Sequence[Answer]]
    ks: Sequence[int] = ()

    @property
    def accuracy(self) -> float:
        """The micro-average: right completions over all completions."""
        return self.total.accuracy.value

    @property
    def total(self) -> Score:
        return self._score(range(len(self.rows)))

    @property
    def parts(self) -> dict[str, Score]:
        """The score of each tier or category that rows name, in the order in which they first appear."""
        of_part: dict[str, list[int]] = defaultdict(list)
        for i, row in enumerate(self.rows):
            if (part := part_of(row)) is not None:
                of_part[part].append(i)
        return {part: self._score(members) for part, members in of_part.items()}

    @property
    def too_long(self) -> list[Row]:
        """Rows whose prompt leaves no room for an answer; they count as wrong."""
        return [row for row, of_row in zip(self.rows, self.answers, strict=True) if of_row[0].finish_reason == TOO_LONG]

    @property
    def cut_off(self) -> int:
        """The number of completions that ended at the token limit."""
        return sum(answer.finish_reason == "length" for of_row in self.answers for answer in of_row)

    @property
    def reward(self) -> float | None:
        """The mean reward of the completions that have one."""
        rewards = [answer.reward for of_row in self.answers for answer in of_row if answer.reward is not None]
        return math.fsum(rewards) / len(rewards) if rewards else None

    @property
    def thoughts(self) -> tuple[int, int]:
        """The numbers of completions that begin with a thought, and of those that never close it, which are wrong."""
        found = [split_thought(answer.text) for of_row in self.answers for answer in of_row]
        return sum(thought is not None for thought, _ in found), sum(rest is None for _, rest in found)

    def _score(self, members: Sequence[int]) -> Score:
        right = [sum(answer.right for answer in self.answers[i]) for i in members]
        n, samples = len(members), len(self.answers[0])
        pass_at = {k: wilson(math.fsum(pass_at_k(samples, c, k) for c in right) / n, n) for k in self.ks}
        return Score(n, samples, sum(right), wilson(sum(right) / (n * samples), n), pass_at)


def part_of(row: Row) -> str | None:
    """The tier or category that the row names."""
    return row.columns.get("tier") or row.columns.get("category")


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that ``k`` of ``n`` completions, ``c`` of them right, contain a right one: 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021, arXiv 2107.03374, equation 1; an unbiased estimate for k new samples.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def table(scores: Mapping[str, Scores]) -> list[list[str]]:
    """Cells of a table with a row for each dataset and, indented below it, one for each part smaller than it."""
    ks = next(iter(scores.values())).ks
    cells = [["", "items", "right", "accuracy", "95 % interval", *(f"pass@{k}" for k in ks)]]
    for name, of_dataset in scores.items():
        cells.append(_cells(name, of_dataset.total))
        cells += [
            _cells(f"  {part}", score) for part, score in of_dataset.parts.items() if score.n < of_dataset.total.n
        ]
    return cells


def _cells(name: str, score: Score) -> list[str]:
    right = str(score.right) if score.samples == 1 else f"{score.right}/{score.n * score.samples}"
    interval = f"[{score.accuracy.low:.4f}, {score.accuracy.high:.4f}]"
    passed = [f"{at.value:.4f}" for at in score.pass_at.values()]
    return [name, str(score.n), right, f"{score.accuracy.value:.4f}", interval, *passed]


def notes(scores: Mapping[str, Scores]) -> list[str]:
    """Remarks on the table, one sentence each."""
    remarks = []
    if any(len(of_dataset.parts) > 1 for of_dataset in scores.values()):
        remarks.append(
            "A dataset's own row is its micro-average: right answers over all answers, categories unweighted."
        )
    if len(scores) > 1:
        remarks.append("Datasets are not averaged with each other: no score contains another dataset's answers.")
    for name, of_dataset in scores.items():
        if too_long := of_dataset.too_long:
            named = ", ".join(row.id for row in too_long[:5]) + (", ..." if len(too_long) > 5 else "")
            remarks.append(
                f"{name}: {len(too_long)} of {len(of_dataset.rows)} prompts do not fit the model's context and "
                f"count as wrong: {named}."
            )
        if of_dataset.cut_off:
            remarks.append(f"{name}: {of_dataset.cut_off} completions were cut off at the token limit.")
        begun, unclosed = of_dataset.thoughts
        if begun:
            remarks.append(f"{name}: {begun} completions begin with a thought, which {unclosed} of them never close.")
    return remarks


def describe(scores: Mapping[str, Scores]) -> str:
    """Table and notes for a terminal."""
    return "\n".join([aligned(table(scores)), *notes(scores)])


def write_scores(folder: Path, scores: Mapping[str, Scores], settings: Mapping) -> None:
    """Writes ``scores.json`` (settings and scores), ``scores.md`` (the table), ``answers.jsonl`` (all completions).

    A line of the last is ``{"dataset", "id", "part", "sample", "right", "tokens", "finish_reason", "text"}``.
    """
    described = {
        name: {
            **of_dataset.total.as_dict(),
            "too_long": [row.id for row in of_dataset.too_long],
            "cut_off": of_dataset.cut_off,
            "thoughts": of_dataset.thoughts[0],
            "unclosed_thoughts": of_dataset.thoughts[1],
            "parts": {part: score.as_dict() for part, score in of_dataset.parts.items()},
        }
        for name, of_dataset in scores.items()
    }
    lines = [
        {"dataset": name, "id": row.id, "part": part_of(row), "sample": sample}
        | {key: getattr(answer, key) for key in ("right", "tokens", "finish_reason", "text")}
        for name, of_dataset in scores.items()
        for row, of_row in zip(of_dataset.rows, of_dataset.answers, strict=True)
        for sample, answer in enumerate(of_row)
    ]
    words = {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in settings.items()}
    how = ", ".join(f"{name} {value}" for name, value in words.items() if value not in (None, ""))
    page = [markdown(table(scores)), *notes(scores), f"Settings: {how}."]
    write_atomically(folder / ANSWERS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_atomically(folder / TABLE, "\n\n".join(page) + "\n")
    write_atomically(folder / SCORES, json.dumps({"settings": dict(settings), "scores": described}, indent=1) + "\n")


MOST_GENERATIONS = 4096


def check_sampling(temperature: float, n: int, ks: Sequence[int]) -> None:
    """Raises InputError for several greedy completions, which would all be the same, for pass@k with k > n, and for
    the same k twice."""
    n = check_number("num_generations", n, between(1, MOST_GENERATIONS))
    if temperature == 0 and n > 1:
        raise InputError(f"num_generations={n} greedy completions would all be the same: give a temperature, say 0.7.")
    for k in ks:
        if not 1 <= k <= n:
            raise InputError(f"pass@{k} needs a k from 1 to num_generations={n}: give another k or more generations.")
    if twice := [k for k in ks if list(ks).count(k) > 1]:
        raise InputError(f"pass@{twice[0]} is asked for twice: name each k once.")
