"""Runs read from their folders, and arms of runs that differ only in the seed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from toolx_kernels.errors import InputError
from toolx_kernels.evaluate.intervals import Estimate, mean_of
from toolx_kernels.train.run.folder import CONFIG, METRICS, SUMMARY, RunFolder

# settings that tell two runs of one arm apart, besides the seed: when and where they ran, and what they kept
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
LEAST_BEST = 0.05  # the accuracy that a run must have reached to collapse
_CURVES = {"eval": "accuracy", "probe": "hard"}


class Point(NamedTuple):
    """A value of a curve, e.g. ``Point(step=40, tokens=181_000, value=0.51)``; tokens are all spent until then."""

    step: int
    tokens: int
    value: float


class MeanPoint(NamedTuple):
    """A mean over runs of a curve's values at a step, and of the tokens spent until then."""

    step: int
    tokens: float
    mean: Estimate


@dataclass(slots=True)
class Run:
    """Contents of a run folder: accuracy on ``eval_rows`` held-out rows, and hard rows, over the run."""

    path: Path
    config: dict[str, Any]
    finished: bool
    eval_rows: int | None
    step: int = 0
    tokens: int = 0
    curves: dict[str, list[Point]] = field(default_factory=lambda: {name: [] for name in _CURVES.values()})

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def collapsed(self) -> bool | None:
        """See ``collapse``; None also where the folder does not tell the steps of a round or the rows evaluated."""
        probes = sorted({point.step for point in self.curves["hard"]})
        if len(probes) < 2 or not self.eval_rows:
            return None
        return collapse(self.curves["accuracy"], probes[1] - probes[0], self.eval_rows)


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

    def mean_curve(self, curve: str) -> list[MeanPoint]:
        """The means at the steps where all finished runs have a value; of all runs where none has finished."""
        of_runs = [{point.step: point for point in run.curves[curve]} for run in self.finished or self.runs]
        steps = sorted(set.intersection(*(set(points) for points in of_runs)))
        return [
            MeanPoint(step, fmean(points[step].tokens for points in of_runs), mean)
            for step in steps
            if (mean := mean_of([points[step].value for points in of_runs]))
        ]


def collapse(curve: Sequence[Point], round_steps: int, rows: int) -> bool | None:
    """Whether accuracy falls by more than two standard errors from a best of at least .05 and stays there for a round.

    ``curve`` holds the evaluations in order, each on ``rows`` rows. The run collapsed if, from some step s on, every
    evaluation up to the first at or beyond s + ``round_steps`` is that far below the best before s. That last one must
    exist: a fall within the last round has not stayed for one. The standard error is that of the difference of two
    accuracies p and q of independent samples: sqrt(p (1 - p) / rows + q (1 - q) / rows).

    Returns None where no evaluation but the first has another one a round after it, so that nobody could tell.
    """
    best = 0.0
    for i, point in enumerate(curve):
        after = next((j for j in range(i, len(curve)) if curve[j].step >= point.step + round_steps), None)
        if after is not None and best >= LEAST_BEST and all(_fell(best, p.value, rows) for p in curve[i : after + 1]):
            return True
        best = max(best, point.value)
    spans_a_round = any(last.step >= point.step + round_steps for point in curve[1:] for last in curve)
    return False if spans_a_round else None


def _fell(before: float, after: float, rows: int) -> bool:
    return before - after > 2 * math.sqrt((before * (1 - before) + after * (1 - after)) / rows)


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
    config, finished = RunFolder(path).config(), (path / SUMMARY).is_file()
    run = Run(path, config, finished, _eval_rows(path / SUMMARY) if finished else config.get("eval_rows"))
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


def _eval_rows(summary: Path) -> int | None:
    """The rows that a finished run was evaluated on. An unfinished one has no more than its config asks for."""
    try:
        return json.loads(summary.read_bytes()).get("eval_rows")
    except (ValueError, AttributeError):
        raise InputError(f"{summary} is damaged: mend it, or leave this run out.") from None


def _take(run: Run, record: dict[str, Any]) -> None:
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
