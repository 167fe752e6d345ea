"""Figures of arms: where they began and ended, what they spent and forgot, and how they differ from the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from toolx_kernels.compare.arms import Arm, Difference, paired_difference, tiers_of
from toolx_kernels.compare.runs import ACCURACY, HARD, Curve
from toolx_kernels.evaluate.intervals import Estimate, mean_of


@dataclass(frozen=True, slots=True)
class Change:
    """A curve of an arm, before the first step and at the end, and the difference of the ends to the first arm's."""

    before: Estimate | None
    after: Estimate | None
    difference: Difference | None


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of an arm. Means are over the finished runs that tell, and None where none does.

    Differences are to the first arm, paired by seed; None of the first arm itself.

    relapsed      rows that turned hard again, added up over ``looks``: the probes after the first that steps led to
    relapse_rate  the share of the rows solved at one look that were hard at the next
    fe, tokens    spent by the method; ``seconds`` are those of the whole run
    tiers         the accuracy on each tier of the held-out rows; empty where there is but one
    """

    runs: int
    finished: int
    seeds: list[int]
    accuracy: Change
    hard: Change
    relapsed: Estimate | None
    looks: Estimate | None
    relapse_rate: Estimate | None
    relapse_rate_difference: Difference | None
    collapsed: int | None
    fe: Estimate | None
    tokens: Estimate | None
    seconds: Estimate | None
    tiers: dict[str, Change]


def figures(arms: Sequence[Arm]) -> dict[str, Figures]:
    """The figures of each arm, by its name."""
    first, tiers = arms[0], tiers_of(arms)
    of_arms = {}
    for arm in arms:
        finished, rates = arm.finished, arm.relapse_rates()
        verdicts = [run.collapsed for run in finished if run.collapsed is not None]
        of_arms[arm.name] = Figures(
            runs=len(arm.runs),
            finished=len(finished),
            seeds=[run.seed for run in arm.runs],
            accuracy=_change(arm, first, ACCURACY),
            hard=_change(arm, first, HARD),
            relapsed=mean_of([run.relapsed for run in finished if run.relapsed is not None]),
            looks=mean_of([len(run.later_looks) for run in finished]),
            relapse_rate=mean_of([*rates.values()]),
            relapse_rate_difference=None if arm is first else paired_difference(rates, first.relapse_rates()),
            collapsed=sum(verdicts) if verdicts else None,
            fe=mean_of([run.fe for run in finished if run.fe is not None]),
            tokens=mean_of([run.tokens for run in finished]),
            seconds=mean_of([run.seconds for run in finished if run.seconds is not None]),
            tiers={tier: _change(arm, first, Curve("accuracy", tier)) for tier in tiers},
        )
    return of_arms


def plain(value: Any) -> Any:
    """Figures as dicts, lists and numbers, for JSON."""
    if isinstance(value, Estimate):
        return {"value": value.value, "interval": value[1:]}
    if isinstance(value, Difference):
        return {"pairs": value.pairs} | (plain(value.mean) or {"value": None, "interval": None})
    if is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value


def _change(arm: Arm, first: Arm, curve: Curve) -> Change:
    ends = arm.ends(curve)
    difference = None if arm is first else paired_difference(ends, first.ends(curve))
    return Change(mean_of(arm.starts(curve)), mean_of([*ends.values()]), difference)
