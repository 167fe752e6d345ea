"""Prompt orders: which training rows come next, and which of their groups a step learns from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import ScoredGroup
from toolx_kernels.train.hard_sampling import HardSamples


class PromptOrder(Protocol):
    """Which training rows come next, and which of the groups sampled for a step it learns from."""

    @property
    def max_batches(self) -> int:
        """Batches of rows that one step may sample."""

    def rows(self, batch: int, table: HardSamples) -> list[int]:
        """Indices of batch number ``batch`` of the run, given what is known of the rows; a pure function, so that a
        resumed run draws the same."""

    def candidates(self, batches: Iterable[int]) -> list[int]:
        """The rows that these batches may use, in dataset order; a round's are probed before it."""

    def keeps(self, group: ScoredGroup) -> bool:
        """Whether a step learns from the group; what it keeps too few of is sampled anew, up to ``max_batches``."""


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return tuple(order)


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """Each epoch is a permutation of the rows, cut into equal batches; a step is a batch."""

    count: int  # training rows
    size: int  # rows in a batch
    seed: int
    max_batches: int = 1

    def rows(self, batch: int, table: HardSamples) -> list[int]:
        return self._rows(batch)

    def candidates(self, batches: Iterable[int]) -> list[int]:
        return sorted({row for batch in batches for row in self._rows(batch)})

    def _rows(self, batch: int) -> list[int]:
        epoch, place = divmod(batch, max(1, self.count // self.size))
        return list(_permutation(self.count, self.seed, epoch)[place * self.size :][: self.size])

    def keeps(self, group: ScoredGroup) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class DynamicSampling(EpochOrder):
    """DAPO's (arXiv 2503.14476, 3.2): groups of equal reward are dropped and the step is filled up with the next rows,
    for at most ten batches."""

    max_batches: int = 10

    def keeps(self, group: ScoredGroup) -> bool:
        return not group.equal_rewards


@dataclass(frozen=True, slots=True)
class SolveRateOrder:
    """Batches of rows that are worth rollouts: neither nearly always nor nearly never solved (arXiv 2606.00135).

    A row is when ``(1 + solved) / (2 + rollouts)``, the mean of its solve rate's posterior from Beta(1, 1) and its raw
    prompt's rollouts so far, lies in [.05, .95]. A tenth of all that is drawn comes from the others (of small batches
    not each has one), so that they can come back; where either kind has too few, the rest is of the other kind. Each
    draw is uniform.
    """

    count: int  # training rows
    size: int  # rows in a batch
    seed: int
    max_batches: int = 1

    def rows(self, batch: int, table: HardSamples) -> list[int]:
        worth: list[int] = []
        others: list[int] = []
        for row in range(self.count):
            rollouts, solved = table.states[row].draws
            (worth if 0.05 <= (1 + solved) / (2 + rollouts) <= 0.95 else others).append(row)
        size = min(self.size, self.count)
        tenth = (batch + 1) * size // 10 - batch * size // 10
        drawn = min(size - min(tenth, len(others)), len(worth))
        chance = random.Random(f"solve rate {self.seed} {batch}")
        return chance.sample(worth, drawn) + chance.sample(others, size - drawn)

    def candidates(self, batches: Iterable[int]) -> list[int]:
        return list(range(self.count))

    def keeps(self, group: ScoredGroup) -> bool:
        return True


def chosen_prompt_order(args: ToolExpanderConfig, count: int) -> PromptOrder:
    orders: dict[str, Callable[[int, int, int], PromptOrder]] = {
        "epochs": EpochOrder,
        "dynamic": DynamicSampling,
        "solve-rate": SolveRateOrder,
    }
    return orders[args.prompt_sampling](count, args.prompts_per_step, args.seed)
