"""Dynamic multi-round hard sampling (arXiv 2510.07737): what happens to prompts that the model never gets right.

A training row is *hard* when none of ``probe_rollouts`` rollouts of its raw prompt is correct. Before each round its
rows are probed; a hard row is shown with demonstrations for that round, and raw again once the probe solves it.
What this is not: it neither verifies demonstrations nor keeps more than the current round's state.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.rows import Row


@dataclass(slots=True)
class Probe:
    """What a probe found: the hard rows' indices, and what it took."""

    hard: list[int]
    rollouts: int
    seconds: float


class HardSamplePolicy(Protocol):
    """Decides, once a round, which demonstrations the prompt of a row shows."""

    def start_round(self, round_index: int, hard: Sequence[int]) -> None: ...

    def demonstrations(self, row: int) -> Sequence[Row]: ...


@dataclass(slots=True)
class PlainGRPO:
    """Every row stays as it is."""

    def start_round(self, round_index: int, hard: Sequence[int]) -> None:
        pass

    def demonstrations(self, row: int) -> Sequence[Row]:
        return ()


@dataclass(slots=True)
class ReplaceHard:
    """Hard rows are replaced by few-shot versions of themselves, with randomly chosen demonstrations.

    A hard row for whose tools no other row has a demonstration stays raw. ``fitting`` cuts the demonstrations of a row
    down to what the model's context holds.
    """

    rows: Sequence[Row]
    seed: int
    per_tool: int
    limit: int
    fitting: Callable[[Row, Sequence[Row]], Sequence[Row]]
    shown: dict[int, Sequence[Row]] = field(default_factory=dict)
    index: DemonstrationIndex = field(init=False)

    def __post_init__(self):
        self.index = DemonstrationIndex(self.rows)

    def start_round(self, round_index: int, hard: Sequence[int]) -> None:
        self.shown = {}
        for i in hard:
            rng = random.Random(f"{self.seed} {round_index} {self.rows[i].id}")
            chosen = self.index.choose(self.rows[i], rng, per_tool=self.per_tool, limit=self.limit)
            if chosen := self.fitting(self.rows[i], chosen):
                self.shown[i] = chosen

    def demonstrations(self, row: int) -> Sequence[Row]:
        return self.shown.get(row, ())


def waves(rollouts: int) -> list[int]:
    """Sizes of the waves in which a prompt is probed: it leaves after the first wave that holds a correct rollout.

    >>> waves(10)
    [1, 3, 6]
    """
    sizes = []
    for size in (1, 3):
        if rollouts > 0:
            sizes.append(min(size, rollouts))
            rollouts -= sizes[-1]
    return sizes + [rollouts] if rollouts > 0 else sizes


def probe(rows: Sequence[int], rollouts: int, correct: Callable[[list[int], int, int], list[bool]]) -> Probe:
    """Finds those of ``rows`` without a correct rollout.

    ``correct(rows, n, first)`` samples ``n`` rollouts of each row, with rollout indices from ``first`` on, and says
    for each row whether any was right.
    """
    started = time.perf_counter()
    hard, spent, first = list(rows), 0, 0
    for size in waves(rollouts):
        if not hard:
            break
        solved = correct(hard, size, first)
        first += size
        spent += size * len(hard)
        hard = [row for row, done in zip(hard, solved, strict=True) if not done]
    return Probe(hard, spent, time.perf_counter() - started)
