"""Retry and plain GRPO: the hard-sample policies that need no probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.groups import RAW, GroupPlan, Help, ScoredGroup
from toolx_kernels.train.hard_sampling import HardSamples
from toolx_kernels.train.policies.demonstrators import RandomDemonstrations


class Helper(Protocol):
    """Chooses what a retry's prompt shows."""

    @property
    def tries(self) -> int:
        """The maximum number of retries of a group."""

    def __call__(self, row: Row, visit: int, number: int) -> Help:
        """Returns the help for retry ``number`` (from 0) of a row whose raw prompt has had ``visit`` rollouts, this
        step's included; ``RAW`` if there is no help."""


@dataclass(frozen=True, slots=True)
class ShowDemonstrations:
    """Shows demonstrations, redrawn each time."""

    drawer: RandomDemonstrations
    tries: ClassVar[int] = 1

    def __call__(self, row: Row, visit: int, number: int) -> Help:
        return Help(self.drawer.draw(row, visit, number)[0])


@dataclass(frozen=True, slots=True)
class ShowHint:
    """Shows the beginning of the answer: a quarter, half, then three quarters, each only if the one before did not help
    (the order of Scaf-GRPO, arXiv 2510.19807, and GHPO, 2507.10628; an answer prefix to continue as in POPE,
    2601.18779).

    ``hint`` makes the hint from a row and a share of its answer; "" if there is none or the context cannot hold it.
    """

    hint: Callable[[Row, float], str]
    shares: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75)
    tries: ClassVar[int] = len(shares)

    def __call__(self, row: Row, visit: int, number: int) -> Help:
        return Help(hint=self.hint(row, self.shares[number]))


class PlainGRPO:
    """Samples every row with its raw prompt only."""

    needs_probe: ClassVar[bool] = False

    def start_round(self, table: HardSamples, hard: Sequence[int], round_index: int) -> None:
        pass

    def groups(self, table: HardSamples, row: int) -> list[GroupPlan]:
        return [GroupPlan(row)]

    def retry(self, table: HardSamples, groups: Sequence[ScoredGroup]) -> list[tuple[ScoredGroup, GroupPlan]]:
        return []


@dataclass(frozen=True, slots=True)
class Retry(PlainGRPO):
    """Samples rows raw, and samples a dead group again with help.

    With ``learns="raw"`` the retried rollouts join the failed group: all are learned on the raw prompt, with advantages
    over all of them. With "shown" they form a separate group on the prompt that they were sampled on. Live groups stay
    as they are. Needs no probe. Not in the paper.
    """

    helper: Helper
    learns: str = "raw"

    def retry(self, table: HardSamples, groups: Sequence[ScoredGroup]) -> list[tuple[ScoredGroup, GroupPlan]]:
        plans = []
        for group in groups:
            row = group.plan.row
            if not group.dead or group.revived or group.tries >= self.helper.tries:
                continue
            help = self.helper(table.rows[row], table.states[row].draws[0], group.tries)
            if help != RAW:
                plans.append((group, GroupPlan(row, (help,), help if self.learns == "shown" else RAW)))
        return plans
