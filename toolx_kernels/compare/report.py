"""Tables of arms, of differences and of runs: what ``toolx compare`` writes, with the same as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from toolx_kernels.compare.plot import draw_comparison
from toolx_kernels.compare.runs import Arm, Run, paired_difference
from toolx_kernels.evaluate.intervals import Estimate, mean_of
from toolx_kernels.evaluate.tables import NOTHING, aligned, estimate, markdown
from toolx_kernels.files import write_atomically

PICTURE, PAGE, FIGURES = "comparison.png", "comparison.md", "comparison.json"
DEFINITIONS = (
    "Means over finished runs, with 95 % intervals (Student's t over seeds). Hard: training rows without a correct "
    "rollout of their raw prompt. Collapsed: runs whose accuracy fell by more than two standard errors from a best of "
    "at least .05 and stayed there for a round. Tokens: all that were spent."
)


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of an arm. Means are over finished runs, and None where there is none.

    The differences are to the first arm, paired by seed, of ``pairs`` seeds; None of the first arm itself.
    """

    runs: int
    finished: int
    seeds: list[int]
    accuracy_before: Estimate | None
    accuracy_after: Estimate | None
    hard_before: Estimate | None
    hard_after: Estimate | None
    tokens: Estimate | None
    collapsed: int | None
    pairs: int | None
    accuracy_difference: Estimate | None
    hard_difference: Estimate | None

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            name: {"value": value.value, "interval": value[1:]} if isinstance(value, Estimate) else value
            for name, value in values.items()
        }


def figures(arms: Sequence[Arm]) -> dict[str, Figures]:
    """The figures of each arm, by its name."""
    of_arms = {}
    for arm in arms:
        verdicts = [run.collapsed for run in arm.finished if run.collapsed is not None]
        pairs, accuracy = paired_difference(arm, arms[0], "accuracy")
        _, hard = paired_difference(arm, arms[0], "hard")
        first = arm is arms[0]
        of_arms[arm.name] = Figures(
            runs=len(arm.runs),
            finished=len(arm.finished),
            seeds=[run.seed for run in arm.runs],
            accuracy_before=mean_of(arm.starts("accuracy")),
            accuracy_after=mean_of([*arm.ends("accuracy").values()]),
            hard_before=mean_of(arm.starts("hard")),
            hard_after=mean_of([*arm.ends("hard").values()]),
            tokens=mean_of([run.tokens for run in arm.finished]),
            collapsed=sum(verdicts) if verdicts else None,
            pairs=None if first else pairs,
            accuracy_difference=None if first else accuracy,
            hard_difference=None if first else hard,
        )
    return of_arms


def arm_table(arms: Sequence[Arm]) -> list[list[str]]:
    """Cells: a row for each arm."""
    cells = [["arm", "runs", "accuracy before", "accuracy after", "hard before", "hard after", "collapsed", "tokens"]]
    for name, of_arm in figures(arms).items():
        unfinished = of_arm.runs - of_arm.finished
        row = [
            name,
            str(of_arm.finished) + (f" (+{unfinished} unfinished)" if unfinished else ""),
            _bare(of_arm.accuracy_before, 3),
            estimate(of_arm.accuracy_after, 3),
            _bare(of_arm.hard_before, 1),
            estimate(of_arm.hard_after, 1),
            NOTHING if of_arm.collapsed is None else str(of_arm.collapsed),
            _bare(of_arm.tokens, 0),
        ]
        cells.append(row)
    return cells


def difference_table(arms: Sequence[Arm]) -> list[list[str]]:
    """Cells: a row for each arm but the first, with its paired differences to the first."""
    cells = [[f"minus {arms[0].name}", "pairs", "accuracy", "hard rows"]]
    for name, of_arm in [*figures(arms).items()][1:]:
        differences = estimate(of_arm.accuracy_difference, 3, "+"), estimate(of_arm.hard_difference, 1, "+")
        cells.append([name, str(of_arm.pairs), *differences])
    return cells


def run_table(arms: Sequence[Arm]) -> list[list[str]]:
    """Cells: a row for each run, finished or not."""
    cells = [["run", "arm", "seed", "steps", "tokens", "accuracy", "hard rows", "collapsed"]]
    for arm in arms:
        for run in arm.runs:
            row = [
                str(run.path),
                arm.name,
                str(run.seed),
                str(run.step) + ("" if run.finished else ", unfinished"),
                f"{run.tokens:,}",
                _from_to(run, "accuracy", 3),
                _from_to(run, "hard", 0),
                {None: NOTHING, True: "yes", False: "no"}[run.collapsed],
            ]
            cells.append(row)
    return cells


def describe(arms: Sequence[Arm]) -> str:
    """The tables of arms and of differences for a screen."""
    tables = [aligned(arm_table(arms)), *([aligned(difference_table(arms))] if len(arms) > 1 else [])]
    return "\n\n".join([*tables, DEFINITIONS])


def write_comparison(folder: Path, arms: Sequence[Arm]) -> None:
    """Writes ``comparison.png``, ``.md`` and ``.json`` into ``folder``, each replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    page = [markdown(arm_table(arms))]
    if len(arms) > 1:
        page.append(markdown(difference_table(arms)))
    page += [DEFINITIONS, markdown(run_table(arms))]
    if draw_comparison(arms, folder / PICTURE):
        page.insert(0, f"![curves]({PICTURE})")
    write_atomically(folder / PAGE, "\n\n".join(page) + "\n")
    described = {name: of_arm.to_dict() for name, of_arm in figures(arms).items()}
    write_atomically(folder / FIGURES, json.dumps(described, indent=1) + "\n")


def _bare(value: Estimate | None, digits: int) -> str:
    return NOTHING if value is None else f"{value.value:,.{digits}f}"


def _from_to(run: Run, curve: str, digits: int) -> str:
    points = run.curves[curve]
    if not points:
        return NOTHING
    first = "" if points[0].step else f"{points[0].value:.{digits}f} "  # at step 0, or there was nothing before
    return f"{first}→ {points[-1].value:.{digits}f}"
