"""Arms: runs that differ only in the seed, their means, and differences between two arms."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from toolx_kernels.compare.runs import Curve, Run
from toolx_kernels.errors import InputError
from toolx_kernels.evaluate.intervals import Estimate, mean_of
from toolx_kernels.train.run.places import without_folders

# settings in which runs of one arm may differ: the seed, when and where they ran, and what they kept
INCIDENTAL = (
    "seed",
    "date",
    "output_dir",
    "resume",
    "overwrite",
    "device",
    "log_completions",
    "save_steps",
    "save_total_limit",
)


@dataclass(slots=True)
class Arm:
    """Runs that differ only in the seed, sorted by it."""

    name: str
    runs: list[Run]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    def starts(self, curve: Curve) -> list[float]:
        """Values before the first step, one for each finished run that measured it."""
        firsts = [run.points(curve)[0] for run in self.finished if run.points(curve)]
        return [point.value for point in firsts if point.step == 0]

    def ends(self, curve: Curve) -> dict[int, float]:
        """Last values of a curve by seed, for finished runs that have one."""
        return {run.seed: run.points(curve)[-1].value for run in self.finished if run.points(curve)}

    def relapse_rates(self) -> dict[int, float]:
        """Shares of solved rows that turned hard again by seed, for finished runs that have one."""
        return {run.seed: run.relapse_rate for run in self.finished if run.relapse_rate is not None}

    def mean_curve(self, curve: Curve, along: str) -> list[tuple[float, float]]:
        """Returns the mean curve over finished runs (over all if none has finished), from where all have begun to where
        the first ends.

        ``along`` names the field of ``Point`` that is the first of each pair. Values are interpolated linearly between
        a run's points, so runs are averaged at equal cost wherever they were measured.
        """
        of_runs = [run.points(curve) for run in self.finished or self.runs if run.points(curve)]
        if not of_runs:
            return []
        lines = [([getattr(point, along) for point in points], [point.value for point in points]) for points in of_runs]
        begin, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
        places = sorted({place for x, _ in lines for place in x if begin <= place <= end})
        means = np.mean([np.interp(places, x, y) for x, y in lines], axis=0)
        return [*zip(places, means.tolist(), strict=True)]


class Difference(NamedTuple):
    """The mean of one arm's values minus another's, over the ``pairs`` seeds that both have; None if there are none."""

    pairs: int
    mean: Estimate | None


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Returns the paired difference of two arms' values by seed."""
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return Difference(len(differences), mean_of(differences))


def tiers_of(arms: Sequence[Arm]) -> list[str]:
    """Returns the tiers of the held-out rows in order of appearance; none if a single tier holds all rows."""
    curves = (curve for arm in arms for run in arm.runs for curve in run.curves if curve.tier is not None)
    tiers = list(dict.fromkeys(str(curve.tier) for curve in curves))
    return tiers if len(tiers) > 1 else []


def arms_of(runs: Sequence[Run], names: Sequence[str] | None = None) -> list[Arm]:
    """Groups runs into arms, in the order of their first runs.

    Runs whose settings differ only in the seed (also as ``seed<number>`` in a path) form one arm, named after their
    folders. ``names`` names either the arms or each run; then runs with the same name form one arm.

    Raises InputError: a run is given twice, two runs of an arm have the same seed, or the number of names is neither
    that of the arms nor that of the runs.
    """
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise InputError("A run is given twice: give each one once.")
    kinds = [_kind(run) for run in runs]
    order = list(dict.fromkeys(kinds))
    if names is None:
        of_kind = dict(zip(order, _default_names([_members(runs, kinds, kind) for kind in order]), strict=True))
        names = [of_kind[kind] for kind in kinds]
    elif len(names) == len(order) and len(names) != len(runs):
        names = [names[order.index(kind)] for kind in kinds]
    elif len(names) != len(runs):
        raise InputError(
            f"--names gives {len(names)} names for {len(runs)} runs in {len(order)} arms: name all arms, or all runs."
        )
    arms = [Arm(name, sorted(_members(runs, names, name), key=lambda run: run.seed)) for name in dict.fromkeys(names)]
    for arm in arms:
        for one, other in zip(arm.runs, arm.runs[1:], strict=False):
            if one.seed == other.seed:
                raise InputError(
                    f"{one.path} and {other.path} are both runs of {arm.name!r} with seed {one.seed}: leave one "
                    "out, or give them different --names."
                )
    return arms


def _members(runs: Sequence[Run], labels: Sequence[str], label: str) -> list[Run]:
    return [run for run, of_run in zip(runs, labels, strict=True) if of_run == label]


def _kind(run: Run) -> str:
    """Returns a text that is equal for two runs exactly if their settings differ only in ``INCIDENTAL`` ones."""
    settings = {name: value for name, value in without_folders(run.config).items() if name not in INCIDENTAL}
    return re.sub(r"(?i)seed[-_]?\d+", "seed", json.dumps(settings, sort_keys=True, default=str))


def _default_names(arms: Sequence[Sequence[Run]]) -> list[str]:
    """Returns the folder that an arm's runs share once the seed is cut from their paths, else the first path."""
    stems = [{re.sub(rf"([-_./]+|[-_./]*seed[-_]?){run.seed}$", "", str(run.path)) for run in arm} for arm in arms]
    names = [Path(next(iter(stem))).name if len(stem) == 1 else "" for stem in stems]
    return [
        name if name and names.count(name) == 1 else str(arm[0].path) for name, arm in zip(names, arms, strict=True)
    ]
