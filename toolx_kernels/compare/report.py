"""Report of ``toolx compare``: tables on a page and on the screen, figures as JSON, a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from toolx_kernels.compare.arms import Arm
from toolx_kernels.compare.figures import figures, plain
from toolx_kernels.compare.plot import draw_comparison
from toolx_kernels.compare.tables import (
    Cells,
    arm_table,
    difference_table,
    forgetting_table,
    run_table,
    tier_table,
)
from toolx_kernels.errors import InputError
from toolx_kernels.evaluate.tables import aligned, markdown
from toolx_kernels.files import write_atomically

PICTURE, PAGE, FIGURES = "comparison.png", "comparison.md", "comparison.json"
DEFINITIONS = (
    "Means over finished runs, with 95 % intervals (Student's t over seeds); differences are paired by seed. Hard: "
    "training rows without a solved rollout of their raw prompt. Turned hard again: rows that a probe solved and the "
    "next probe did not, summed over the later probes (each probe after the first with steps since the one before); "
    "the share is of all rows solved by the previous probes. A row that is seldom solved also turns by chance. "
    "Collapsed: runs whose accuracy fell, after supervised steps if any, by more than two standard errors from a best "
    "of at least .05 and stayed there for a round. FE (forward-equivalents): prompt tokens prefilled + tokens written "
    "+ 3 x tokens trained on, + 1 x with a reference model, + 1 x with activation checkpointing; without the cold "
    "start. Tokens: written or trained on. Seconds: of the whole run."
)


def describe(arms: Sequence[Arm]) -> str:
    """Returns the tables for a terminal; the table of runs is only on the page."""
    return "\n\n".join([*map(aligned, _tables(arms)), DEFINITIONS])


def check_folder(folder: Path) -> bool:
    """Whether the folder holds a comparison, which would be replaced; raises InputError if it holds anything else, such
    as a run, or is a file."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file: name a folder.")
    found = {path.name.removesuffix(".part") for path in folder.iterdir()} if folder.is_dir() else set()
    if others := found - {PICTURE, PAGE, FIGURES}:
        raise InputError(f"--output {folder} holds {min(others)}, which is no comparison's: name a new folder.")
    return bool(found)


def write_comparison(folder: Path, arms: Sequence[Arm]) -> None:
    """Writes ``comparison.png``, ``.md`` and ``.json`` into ``folder``, each replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    page = [*map(markdown, _tables(arms)), DEFINITIONS, markdown(run_table(arms))]
    if draw_comparison(arms, folder / PICTURE):
        page.insert(0, f"![curves]({PICTURE})")
    write_atomically(folder / PAGE, "\n\n".join(page) + "\n")
    write_atomically(folder / FIGURES, json.dumps(plain(figures(arms)), indent=1) + "\n")


def _tables(arms: Sequence[Arm]) -> list[Cells]:
    of_arms = figures(arms)
    tables = [arm_table(of_arms)]
    if len(of_arms) > 1:
        tables.append(difference_table(of_arms))
    tables.append(forgetting_table(of_arms))
    if of_arms[arms[0].name].tiers:
        tables.append(tier_table(of_arms))
    return tables
