"""Demonstrators: the choice of demonstrations for hard rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.hard_sampling import Attempt, Demonstrations, HardSamples, probe


class Demonstrator(Protocol):
    def choose(self, table: HardSamples, hard: Sequence[int], round_index: int) -> None:
        """Enters demonstrations for the hard rows into the table; rows that get none stay raw."""


@dataclass(slots=True)
class RandomDemonstrations:
    """Random demonstrations, redrawn each round and never verified.

    ``fitting`` trims a row's demonstrations to what the model's context holds.
    """

    index: DemonstrationIndex
    seed: int
    per_tool: int
    limit: int
    fitting: Callable[[Row, Sequence[Row]], Sequence[Row]]

    @classmethod
    def of(cls, args: ToolExpanderConfig, index: DemonstrationIndex, prompts: Prompts) -> RandomDemonstrations:
        """Builds the demonstrator from the settings; leaves room for an answer of ``max_completion_length`` tokens."""
        fitting = partial(prompts.fitting, room=args.max_completion_length)
        return cls(index, args.seed, args.few_shots_per_tool, args.max_few_shots, fitting)

    def choose(self, table: HardSamples, hard: Sequence[int], round_index: int) -> None:
        for row in hard:
            table.show(row, *self.draw(table.rows[row], round_index, 0), None, 1)

    def draw(self, row: Row, round_index: int, attempt: int) -> tuple[Demonstrations, int]:
        """Returns demonstrations for a row, and how many more were drawn that the context cannot hold."""
        rng = random.Random(f"{self.seed} {round_index} {row.id} {attempt}")
        chosen = self.index.choose(row, rng, per_tool=self.per_tool, limit=self.limit)
        shown = tuple(self.fitting(row, chosen))
        return shown, len(chosen) - len(shown)


@dataclass(slots=True)
class VerifiedDemonstrations:
    """ "Better" demonstrations: redrawn until they make a model answer correctly, at most ``tries`` times.

    Rows without a successful draw stay raw. Verified demonstrations are kept as long as the row stays hard.
    ``attempt`` decides which model verifies: the model before RL (cautious) or the current one (bold).
    """

    random: RandomDemonstrations
    tries: int
    rollouts: int
    attempt: Callable[[int], Attempt]  # takes the draw's number, which selects separate random streams

    def choose(self, table: HardSamples, hard: Sequence[int], round_index: int) -> None:
        left = [row for row in hard if not table.states[row].demonstrations]
        left = [row for row in left if self.random.index.possible(table.rows[row])]
        for number in range(self.tries):
            drawn = {row: self.random.draw(table.rows[row], round_index, number) for row in left}
            asked = [(row, shown) for row, (shown, _) in drawn.items() if shown]
            failed = set(probe(asked, self.rollouts, self.attempt(number)).hard)
            for row, (shown, cut) in drawn.items():
                verified = bool(shown) and row not in failed
                table.show(row, shown if verified else (), cut, verified, number + 1)
            left = [row for row in left if not table.states[row].verified]
