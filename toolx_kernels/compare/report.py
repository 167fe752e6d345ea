"""What ``toolx compare`` writes: tables of arms, of differences and of runs, and the same as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from toolx_kernels.compare.plot import draw_comparison
from toolx_kernels.compare.runs import Arm, Run, paired_difference
from toolx_kernels.evaluate.intervals import Estimate, mean_of
from toolx_kernels.evaluate.tables import NOTHING, aligned, estimate, markdown
from toolx_kernels.files import write_atomically

PICTURE, PAGE, FIGURES = "comparison.png", "comparison.md", "comparison.json"
DEFINITIONS = (
    "Means over finished runs, with 95 % intervals (Student's t over seeds). Hard: training rows without a correct "
    "rollout of their raw prompt. Collapsed: runs whose accuracy fell below half of its best and stayed there for a "
    "round. Oscillation: standard deviation of the change in the hard count from one round's probe to the next's. "
    "Tokens: all that were spent."
)


def figures(arms: Sequence[Arm]) -> dict[str, dict]:
    """What is said of each arm, by its name; an ``Estimate`` of a mean over finished runs, or None where there is none.

    ``accuracy_difference`` and ``hard_difference`` are to the first arm, paired by seed.
    """
    said = {}
    for arm in arms:
        verdicts = [run.collapsed for run in arm.finished if run.collapsed is not None]
        pairs, accuracy_difference = paired_difference(arm, arms[0], "accuracy")
        said[arm.name] = {
            "runs": len(arm.runs),
            "finished": len(arm.finished),
            "seeds": [run.seed for run in arm.runs],
            "accuracy_before": mean_of(arm.starts("accuracy")),
            "accuracy_after": mean_of([*arm.ends("accuracy").values()]),
            "hard_before": mean_of(arm.starts("hard")),
            "hard_after": mean_of([*arm.ends("hard").values()]),
            "tokens": mean_of([run.tokens for run in arm.finished]),
            "collapsed": sum(verdicts) if verdicts else None,
            "oscillation": mean_of([run.oscillation for run in arm.finished if run.oscillation is not None]),
            "pairs": pairs if arm is not arms[0] else None,
            "accuracy_difference": accuracy_difference if arm is not arms[0] else None,
            "hard_difference": paired_difference(arm, arms[0], "hard")[1] if arm is not arms[0] else None,
        }
    return said


def arm_table(arms: Sequence[Arm]) -> list[list[str]]:
    """Cells: a row for each arm."""
    cells = [["arm", "runs", "accuracy before", "accuracy after", "hard before", "hard after", "collapsed",
              "oscillation", "tokens"]]  # fmt: skip
    for name, of_arm in figures(arms).items():
        unfinished = of_arm["runs"] - of_arm["finished"]
        cells.append([
            name,
            str(of_arm["finished"]) + (f" (+{unfinished} unfinished)" if unfinished else ""),
            _bare(of_arm["accuracy_before"], 3),
            estimate(of_arm["accuracy_after"], 3),
            _bare(of_arm["hard_before"], 1),
            estimate(of_arm["hard_after"], 1),
            NOTHING if of_arm["collapsed"] is None else str(of_arm["collapsed"]),
            _bare(of_arm["oscillation"], 1),
            _bare(of_arm["tokens"], 0),
        ])  # fmt: skip
    return cells


def difference_table(arms: Sequence[Arm]) -> list[list[str]]:
    """Cells: a row for each arm but the first, with its paired differences to the first."""
    cells = [[f"minus {arms[0].name}", "pairs", "accuracy", "hard rows"]]
    for name, of_arm in [*figures(arms).items()][1:]:
        differences = estimate(of_arm["accuracy_difference"], 3, "+"), estimate(of_arm["hard_difference"], 1, "+")
        cells.append([name, str(of_arm["pairs"]), *differences])
    return cells


def run_table(arms: Sequence[Arm]) -> list[list[str]]:
    """Cells: a row for each run, finished or not."""
    cells = [["run", "arm", "seed", "steps", "tokens", "accuracy", "hard rows", "collapsed", "oscillation"]]
    for arm in arms:
        for run in arm.runs:
            swing = run.oscillation
            cells.append([
                str(run.path), arm.name, str(run.seed), str(run.step) + ("" if run.finished else ", unfinished"),
                f"{run.tokens:,}", _from_to(run, "accuracy", 3), _from_to(run, "hard", 0),
                {None: NOTHING, True: "yes", False: "no"}[run.collapsed],
                NOTHING if swing is None else f"{swing:.1f}",
            ])  # fmt: skip
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
    described = {name: {key: _plain(value) for key, value in of_arm.items()} for name, of_arm in figures(arms).items()}
    write_atomically(folder / FIGURES, json.dumps(described, indent=1) + "\n")


def _plain(value):
    return {"value": value.value, "interval": value[1:]} if isinstance(value, Estimate) else value


def _bare(value: Estimate | None, digits: int) -> str:
    return NOTHING if value is None else f"{value.value:,.{digits}f}"


def _from_to(run: Run, curve: str, digits: int) -> str:
    points = run.curves[curve]
    if not points:
        return NOTHING
    first = "" if points[0].step else f"{points[0].value:.{digits}f} "  # at step 0, or there was nothing before
    return f"{first}→ {points[-1].value:.{digits}f}"
