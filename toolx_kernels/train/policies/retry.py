"""Hard-sample policies that need no probe: plain GRPO, and groups sampled again with help in the same step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.groups import RAW, GroupPlan, Help, ScoredGroup
from toolx_kernels.train.hard_sampling import HardSamples
from toolx_kernels.train.policies.demonstrators import RandomDemonstrations


class Helper(Protocol):
    """What a retry shows."""

    @property
    def tries(self) -> int:
        """How often a group is retried, at most."""

    def __call__(self, row: Row, visit: int, number: int) -> Help:
        """The help for retry ``number`` (from 0 on) of a row whose raw prompt has had ``visit`` rollouts, those of the
        present step included; ``RAW`` where there is none."""


@dataclass(frozen=True, slots=True)
class ShowDemonstrations:
    """Demonstrations, drawn anew each time."""

    drawer: RandomDemonstrations
    tries: ClassVar[int] = 1

    def __call__(self, row: Row, visit: int, number: int) -> Help:
        return Help(self.drawer.draw(row, visit, number)[0])


@dataclass(frozen=True, slots=True)
class ShowHint:
    """How the answer begins: its first quarter, half or three quarters, the next only where the last has not helped
    (the order of Scaf-GRPO, arXiv 2510.19807, and GHPO, 2507.10628; a beginning to go on from as in POPE, 2601.18779).

    ``hint`` makes it of a row and a share of its answer; "" where there is none or the context does not hold it.
    """

    hint: Callable[[Row, float], str]
    shares: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75)
    tries: ClassVar[int] = len(shares)

    def __call__(self, row: Row, visit: int, number: int) -> Help:
        return Help(hint=self.hint(row, self.shares[number]))


class PlainGRPO:
    """Every row stays as it is."""

    needs_probe: ClassVar[bool] = False

    def start_round(self, table: HardSamples, hard: Sequence[int], round_index: int) -> None:
        pass

    def groups(self, table: HardSamples, row: int) -> list[GroupPlan]:
        return [GroupPlan(row)]

    def retry(self, table: HardSamples, groups: Sequence[ScoredGroup]) -> list[tuple[ScoredGroup, GroupPlan]]:
        return []


@dataclass(frozen=True, slots=True)
class Retry(PlainGRPO):
    """Rows are sampled raw; a group that turns out dead is sampled again with help.

    The retried rollouts join the group of failures and are learned on the raw prompt, with advantages over both; or, as
    ``shown``, they are a group of their own on the prompt that they were sampled on. No probe is needed. Live groups
    stay as they are. Beyond the paper.
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
