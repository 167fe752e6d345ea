"""Tables of ``toolx compare`` as cells: arms, differences, forgetting, tiers, runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from toolx_kernels.compare.arms import Arm, Difference
from toolx_kernels.compare.figures import Figures
from toolx_kernels.compare.runs import ACCURACY, HARD, Curve, Run
from toolx_kernels.evaluate.intervals import Estimate
from toolx_kernels.evaluate.tables import NOTHING, estimate

Cells = list[list[str]]


def arm_table(of_arms: Mapping[str, Figures]) -> Cells:
    """Returns a row for each arm."""
    head = ["arm", "runs", "accuracy before", "accuracy after", "hard before", "hard after", "collapsed"]
    cells = [[*head, "FE", "tokens", "seconds"]]
    for name, arm in of_arms.items():
        unfinished = arm.runs - arm.finished
        row = [
            name,
            str(arm.finished) + (f" (+{unfinished} unfinished)" if unfinished else ""),
            _bare(arm.accuracy.before, 3),
            estimate(arm.accuracy.after, 3),
            _bare(arm.hard.before, 1),
            estimate(arm.hard.after, 1),
            NOTHING if arm.collapsed is None else str(arm.collapsed),
            *(_bare(spent, 0) for spent in (arm.fe, arm.tokens, arm.seconds)),
        ]
        cells.append(row)
    return cells


def difference_table(of_arms: Mapping[str, Figures]) -> Cells:
    """Returns a row for each arm except the first, with its paired differences to the first."""
    first, *others = of_arms
    cells = [[f"minus {first}", "accuracy", "hard rows", "share that turned hard again"]]
    for name in others:
        arm = of_arms[name]
        differences = (arm.accuracy.difference, 3), (arm.hard.difference, 1), (arm.relapse_rate_difference, 3)
        cells.append([name, *(_paired(difference, digits) for difference, digits in differences)])
    return cells


def forgetting_table(of_arms: Mapping[str, Figures]) -> Cells:
    """Returns a row for each arm, with its training rows that turned hard again."""
    cells = [["forgetting", "later probes", "turned hard again", "share of the solved ones"]]
    for name, arm in of_arms.items():
        cells.append([name, _bare(arm.looks, 1), _bare(arm.relapsed, 1), estimate(arm.relapse_rate, 3)])
    return cells


def tier_table(of_arms: Mapping[str, Figures]) -> Cells:
    """Returns a row for each tier and arm: accuracy before and after, and the paired difference to the first arm."""
    first = next(iter(of_arms))
    cells = [["accuracy on a tier", "before", "after", *([f"minus {first}"] if len(of_arms) > 1 else [])]]
    for tier in of_arms[first].tiers:
        cells.append([tier, *([""] * (len(cells[0]) - 1))])
        for name, arm in of_arms.items():
            change = arm.tiers[tier]
            row = [f"  {name}", estimate(change.before, 3), estimate(change.after, 3), _paired(change.difference, 3)]
            cells.append(row[: len(cells[0])])
    return cells


def run_table(arms: Sequence[Arm]) -> Cells:
    """Returns a row for each run, finished or not."""
    head = ["run", "arm", "seed", "steps", "FE", "tokens", "seconds", "accuracy", "hard rows", "turned hard again"]
    cells = [[*head, "collapsed"]]
    for arm in arms:
        for run in arm.runs:
            row = [
                str(run.path),
                arm.name,
                str(run.seed),
                str(run.step) + ("" if run.finished else ", unfinished"),
                *(NOTHING if spent is None else f"{spent:,.0f}" for spent in (run.fe, run.tokens, run.seconds)),
                _from_to(run, ACCURACY, 3),
                _from_to(run, HARD, 0),
                NOTHING if run.relapsed is None else str(run.relapsed),
                {None: NOTHING, True: "yes", False: "no"}[run.collapsed],
            ]
            cells.append(row)
    return cells


def _bare(value: Estimate | None, digits: int) -> str:
    return NOTHING if value is None else f"{value.value:,.{digits}f}"


def _paired(difference: Difference | None, digits: int) -> str:
    if difference is None or difference.mean is None:
        return NOTHING
    return f"{estimate(difference.mean, digits, '+')}, n = {difference.pairs}"


def _from_to(run: Run, curve: Curve, digits: int) -> str:
    points = run.points(curve)
    if not points:
        return NOTHING
    first = "" if points[0].step else f"{points[0].value:.{digits}f} "  # step 0: measured before the run
    return f"{first}→ {points[-1].value:.{digits}f}"
