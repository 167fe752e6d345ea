"""Runs as their folders tell them, arms of runs that differ in the seed, and what is said of an arm."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from toolx_kernels.errors import InputError
from toolx_kernels.evaluate.intervals import Estimate, mean_of
from toolx_kernels.train.run.folder import CONFIG, METRICS, SUMMARY, RunFolder

# settings that tell two runs of one arm apart, besides the seed: where they ran, and what they kept
INCIDENTAL = (
    "seed", "output_dir", "resume", "overwrite", "device", "log_completions", "save_steps", "save_total_limit",
)  # fmt: skip
_CURVES = {"eval": "accuracy", "probe": "hard"}


class Point(NamedTuple):
    """A value of a curve, e.g. ``Point(step=40, tokens=181_000, value=0.51)``; tokens are all spent until then."""

    step: int
    tokens: int
    value: float


@dataclass(slots=True)
class Run:
    """What a run folder holds: accuracy on held-out rows, and hard rows, over the run."""

    path: Path
    config: dict
    finished: bool
    step: int = 0
    tokens: int = 0
    curves: dict[str, list[Point]] = field(default_factory=lambda: {name: [] for name in _CURVES.values()})

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def collapsed(self) -> bool | None:
        """See ``collapse``."""
        probes = sorted({point.step for point in self.curves["hard"]})
        if len(probes) < 2:
            return None
        return collapse([(p.step, p.value) for p in self.curves["accuracy"]], round_steps=probes[1] - probes[0])

    @property
    def oscillation(self) -> float | None:
        """See ``oscillation``; without the last probe where it ends no whole round."""
        probes = self.curves["hard"]
        steps = [point.step for point in probes]
        partial = len(steps) > 2 and steps[-1] - steps[-2] < steps[-2] - steps[-3]
        return oscillation([point.value for point in probes[: -1 if partial else None]])


@dataclass(slots=True)
class Arm:
    """Runs of one kind, by seed."""

    name: str
    runs: list[Run]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    def ends(self, curve: str) -> dict[int, float]:
        """The last value of a curve in each finished run that has one, by seed."""
        return {run.seed: run.curves[curve][-1].value for run in self.finished if run.curves[curve]}

    def starts(self, curve: str) -> list[float]:
        """The value before the first step in each finished run that measured it."""
        of_runs = (run.curves[curve][0] for run in self.finished if run.curves[curve])
        return [point.value for point in of_runs if point.step == 0]

    def mean_curve(self, curve: str) -> list[tuple[float, float, Estimate]]:
        """(step, mean tokens, mean with its interval) where all finished runs have a value.

        Where none has finished, all runs are taken as far as they got together.
        """
        of_runs = [{p.step: p for p in run.curves[curve]} for run in self.finished or self.runs]
        steps = sorted(set.intersection(*(set(points) for points in of_runs)))
        return [
            (step, fmean(points[step].tokens for points in of_runs), mean_of([p[step].value for p in of_runs]))
            for step in steps
        ]


def collapse(curve: Sequence[tuple[int, float]], round_steps: int) -> bool | None:
    """Whether accuracy falls by more than half of its best and stays there for a round; None where no evaluation
    but the first has another one a round after it, so that nobody could tell.

    ``curve`` holds (step, accuracy) of the evaluations in order. The run collapsed if after some evaluation at a step
    s, every evaluation from s to the first at or beyond s + ``round_steps`` is below half of the best accuracy seen
    before s. That last one must exist: a fall within the last round has not stayed for one.
    """
    best = 0.0
    for i, (start, accuracy) in enumerate(curve):
        through = next((j for j in range(i, len(curve)) if curve[j][0] >= start + round_steps), None)
        if through is not None and all(value < best / 2 for _, value in curve[i : through + 1]):
            return True
        best = max(best, accuracy)
    told = any(last >= start + round_steps for start, _ in curve[1:] for last, _ in curve)
    return False if told else None


def oscillation(hard: Sequence[float]) -> float | None:
    """Standard deviation of the change in the hard count from one probe to the next.

    A steady decline is no oscillation: the mean change is taken off. None below three probes.
    """
    changes = [after - before for before, after in zip(hard, hard[1:], strict=False)]
    return stdev(changes) if len(changes) > 1 else None


def paired_difference(arm: Arm, base: Arm, curve: str) -> tuple[int, Estimate | None]:
    """Over the seeds that both finished: their number, and the mean of ``arm`` minus ``base`` at the runs' ends."""
    ours, theirs = arm.ends(curve), base.ends(curve)
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return len(differences), mean_of(differences)


def read_run(path: Path) -> Run:
    """The run in a folder that ``toolx train`` writes, or is still writing.

    Raises InputError: there is no run, it has no evaluation or probe yet, or a line of its metrics is damaged (which
    is named).
    """
    if not (path / CONFIG).is_file():
        raise InputError(f"There is no run in {path}: name a folder that toolx train wrote.")
    run = Run(path, RunFolder(path).config(), finished=(path / SUMMARY).is_file())
    if type(run.config.get("seed")) is not int:
        raise InputError(f"{path / CONFIG} names the seed {run.config.get('seed')!r}: give the number the run had.")
    metrics = path / METRICS
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.is_file() else []
    if lines and not run.finished and not lines[-1].endswith(b"\n"):
        del lines[-1]  # it is being written
    for number, line in enumerate(lines, 1):
        try:
            _take(run, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{metrics}, line {number}, is damaged: mend it, or leave this run out.") from None
    if not any(run.curves.values()):
        raise InputError(f"{path} has no evaluation or probe to show yet: leave it out, or wait.")
    return run


def _take(run: Run, record: dict) -> None:
    """Adds a line of the metrics to the run; ValueError, KeyError, TypeError or AttributeError where it is none."""
    event = record["event"]
    if event not in ("step", *_CURVES):
        return
    if record["step"] < run.step:  # two processes wrote here
        raise ValueError(record["step"])
    run.step = int(record["step"])
    # runs of older versions count sampled tokens alone, and only in their steps
    fallback = record.get("tokens", run.tokens) if event == "step" else run.tokens
    tokens = int(record.get("spent_tokens", fallback))
    if event != "probe":  # the last one measures, and may have been counted
        run.tokens = tokens
    if event in _CURVES:
        value = float(record[_CURVES[event]])
        if not math.isfinite(value):
            raise ValueError(value)
        run.curves[_CURVES[event]].append(Point(run.step, tokens, value))


def arms_of(runs: Sequence[Run], names: Sequence[str] | None = None) -> list[Arm]:
    """The runs in arms, in the order of their first runs.

    Runs whose settings are the same but for the seed (also where ``seed<number>`` stands in a path) are one arm, which
    is called after their folders. ``names`` name the arms, or each run: then runs of one name are one arm.

    Raises InputError: a run is given twice, two runs of an arm have the same seed, or the names are neither as many as
    the arms nor as many as the runs.
    """
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise InputError("A run is named twice: name each once.")
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
                    "out, or tell them apart with --names."
                )
    return arms


def _members(runs: Sequence[Run], labels: Sequence[str], label: str) -> list[Run]:
    return [run for run, of_run in zip(runs, labels, strict=True) if of_run == label]


def _kind(run: Run) -> str:
    """A text that runs share exactly when their settings differ in nothing that matters but the seed."""
    settings = {name: value for name, value in run.config.items() if name not in INCIDENTAL}
    return re.sub(r"(?i)seed[-_]?\d+", "seed", json.dumps(settings, sort_keys=True, default=str))


def _default_names(arms: Sequence[Sequence[Run]]) -> list[str]:
    """The folder that an arm's runs share when the seed is taken off the end of their paths, else the first path."""
    stems = [{re.sub(rf"[-_./]*(seed)?[-_]?{run.seed}$", "", str(run.path)) for run in arm} for arm in arms]
    names = [Path(next(iter(stem))).name if len(stem) == 1 else "" for stem in stems]
    return [
        name if name and names.count(name) == 1 else str(arm[0].path) for name, arm in zip(names, arms, strict=True)
    ]
