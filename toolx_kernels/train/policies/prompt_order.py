"""Prompt orders: the next training rows, and the filter of their groups."""

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
    """Chooses the training rows of each batch, and the sampled groups that a step learns from."""

    @property
    def max_batches(self) -> int:
        """How many batches of rows one step may sample."""

    def rows(self, batch: int, table: HardSamples) -> list[int]:
        """Returns the row indices of batch number ``batch`` of the run, given the state of all rows. Must be a pure
        function, so that a resumed run draws the same."""

    def candidates(self, batches: Iterable[int]) -> list[int]:
        """Returns the rows that these batches may use, in dataset order; those of a round are probed before it."""

    def keeps(self, group: ScoredGroup) -> bool:
        """Whether a step learns from the group. A step that keeps too few samples further batches, up to
        ``max_batches`` in all."""


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return tuple(order)


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """Permutes the rows each epoch and cuts them into equal batches; a step is a batch."""

    count: int  # training rows
    size: int  # rows in a batch
    seed: int
    max_batches: int = 1

    def rows(self, batch: int, table: HardSamples) -> list[int]:
        return self._rows(batch)

    def candidates(self, batches: Iterable[int]) -> list[int]:
        found: set[int] = set()
        for batch in batches:
            found.update(self._rows(batch))
            if len(found) == self.count:  # a round may have a billion epochs
                break
        return sorted(found)

    def _rows(self, batch: int) -> list[int]:
        epoch, place = divmod(batch, max(1, self.count // self.size))
        return list(_permutation(self.count, self.seed, epoch)[place * self.size :][: self.size])

    def keeps(self, group: ScoredGroup) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class DynamicSampling(EpochOrder):
    """DAPO's dynamic sampling (arXiv 2503.14476, 3.2): drops groups of equal reward and fills the step with the next
    rows, for at most ten batches."""

    max_batches: int = 10

    def keeps(self, group: ScoredGroup) -> bool:
        return not group.equal_rewards


@dataclass(frozen=True, slots=True)
class SolveRateOrder:
    """Draws rows that are worth rollouts: neither almost always nor almost never solved (arXiv 2606.00135).

    A row is worth it if ``(1 + solved) / (2 + rollouts)`` lies in [.05, .95]: the posterior mean of its solve rate,
    from a prior Beta(1, 1) and all earlier rollouts of its raw prompt. A tenth of all draws comes from the other rows
    (a small batch may have none), so that they can return. If either kind has too few rows, the other fills the batch.
    Each draw is uniform.
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
