"""Runs read from their folders: accuracy, hard rows and costs over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from toolx_kernels.errors import InputError
from toolx_kernels.train.run.folder import CONFIG, METRICS, SUMMARY, RunFolder
from toolx_kernels.train.run.metrics import PLACED, Reader, read_object

LEAST_BEST = 0.05  # the accuracy that a run must have reached before it can collapse


class Curve(NamedTuple):
    """A quantity followed over a run; an accuracy may be that of one tier, e.g. ``Curve("accuracy", "parallel")``."""

    name: str
    tier: str | None = None


ACCURACY, HARD = Curve("accuracy"), Curve("hard")
HARD_SHARE = Curve("hard share")  # of the rows probed, which are fewer where ``max_steps`` cut a round short


class Look(NamedTuple):
    """A probe: its step, the rows probed, the hard ones, and those of the hard ones that the previous probe had solved;
    None if not recorded."""

    step: int
    rows: int | None
    hard: int
    relapsed: int | None


class Point(NamedTuple):
    """A value of a curve, e.g. ``Point(step=40, tokens=181_000, fe=402_000, value=0.51)``.

    Tokens and forward-equivalents are all that the method spent until then; fe is None if not recorded.
    """

    step: int
    tokens: int
    fe: int | None
    value: float


@dataclass(slots=True)
class Run:
    """Contents of a run folder: accuracy on ``eval_rows`` held-out rows and their tiers, and hard rows, over the run.

    seconds      from start to end; None for an unfinished run, or if not in the summary
    fe           forward-equivalents spent; None unless every line of the metrics has them
    rounds       optimizer steps of each round, without those of supervised training before RL
    supervised   the last step of supervised training before RL; 0 if there was none
    looks        the probes by round, without those that covered only a part of their round's rows
    """

    path: Path
    config: dict[str, Any]
    finished: bool
    eval_rows: int | None
    seconds: float | None = None
    step: int = 0
    tokens: int = 0
    fe: int | None = 0
    curves: dict[Curve, list[Point]] = field(default_factory=dict)
    rounds: dict[int, int] = field(default_factory=dict)
    supervised: int = 0
    looks: dict[int, Look] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def collapsed(self) -> bool | None:
        """``collapse`` of the evaluations since RL began; None also if the steps of a round or the evaluated rows are
        unknown."""
        if 0 not in self.rounds or len(self.rounds) < 2 or not self.eval_rows:  # the last round may be cut short
            return None
        since = [point for point in self.points(ACCURACY) if point.step >= self.supervised]
        return collapse(since, self.rounds[0], self.eval_rows)

    @property
    def later_looks(self) -> list[tuple[Look, Look]]:
        """Each probe with steps since the previous one, as a pair (previous, this)."""
        looks = [*self.looks.values()]
        return [(one, other) for one, other in pairwise(looks) if other.step > one.step]

    @property
    def relapsed(self) -> int | None:
        """Rows that turned hard again, summed over ``later_looks``; None if there are none, or one lacks the number."""
        counts = [other.relapsed for _, other in self.later_looks if other.relapsed is not None]
        return sum(counts) if counts and len(counts) == len(self.later_looks) else None

    @property
    def relapse_rate(self) -> float | None:
        """The share of rows solved by one probe that were hard in the next, over ``later_looks``; None if ``relapsed``
        is, if a probe lacks its number of rows, or if nothing was solved."""
        solved, relapsed = 0, self.relapsed
        for look, _ in self.later_looks:
            if look.rows is None:
                return None
            solved += look.rows - look.hard
        return relapsed / solved if relapsed is not None and solved else None

    def points(self, curve: Curve) -> list[Point]:
        return self.curves.get(curve, [])


def collapse(curve: Sequence[Point], round_steps: int, rows: int) -> bool | None:
    """Whether accuracy falls by more than two standard errors from a best of at least .05 and stays there for a round.

    ``curve`` holds the evaluations in order, each on ``rows`` rows. The run collapsed if, from some step s on, every
    evaluation up to the first at or beyond s + ``round_steps`` is that far below the best before s. That last one must
    exist: a fall within the last round has not yet lasted a round. The standard error is that of the difference of two
    accuracies p and q of independent samples: sqrt(p (1 - p) / rows + q (1 - q) / rows).

    Returns None if it cannot be decided: no evaluation except the first has another one a round later.
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


def read_run(path: Path) -> Run:
    """Reads the run in a folder that ``toolx train`` wrote or is still writing.

    Raises InputError: there is no run, it has no evaluation or probe yet, or a line of its metrics is damaged (the
    message names it).
    """
    if not (path / CONFIG).is_file():
        raise InputError(f"There is no run in {path}: name a folder that toolx train wrote.")
    config, finished = RunFolder(path).config(), (path / SUMMARY).is_file()
    # without a summary, the number of evaluated rows is only known from the config
    eval_rows, seconds = _summary(path / SUMMARY) if finished else (config.get("eval_rows"), None)
    run = Run(path, config, finished, eval_rows, seconds)
    if type(run.config.get("seed")) is not int:
        raise InputError(f"{path / CONFIG} has the seed {run.config.get('seed')!r}: write the number that the run had.")
    metrics = path / METRICS
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.is_file() else []
    if lines and not run.finished and not lines[-1].endswith(b"\n"):
        del lines[-1]  # still being written
    reader = Reader(metrics, "repair it, or leave this run out")
    for line in lines:
        _take(run, reader.read(line))
    if not run.curves:
        raise InputError(f"{path} has no evaluation or probe to show yet: leave it out, or wait.")
    return run


def _summary(path: Path) -> tuple[int | None, float | None]:
    """Returns a finished run's number of evaluated rows, and its seconds."""
    try:
        summary = read_object(path.read_bytes())
        seconds = summary.get("wall_seconds")
        return summary.get("eval_rows"), None if seconds is None else float(seconds)
    except (ValueError, TypeError, OverflowError):
        raise InputError(f"{path} is damaged: repair it, or leave this run out.") from None


def _take(run: Run, record: dict[str, Any]) -> None:
    """Adds a line of the metrics to the run."""
    event = record["event"]
    if event not in PLACED:
        return
    run.step = record["step"]
    # runs of older versions count only sampled tokens, and only in steps
    fallback = record.get("tokens", run.tokens) if event == "step" else run.tokens
    tokens = int(record.get("spent_tokens", fallback))
    fe = int(record["spent_fe"]) if "spent_fe" in record and run.fe is not None else None
    if event != "probe":  # the last probe only measures, but its line may count it
        run.tokens = tokens
    if event != "probe" or fe is None:
        run.fe = fe
    values = {}
    if event == "sft":
        run.supervised = run.step
    elif event == "step" and "round" in record:
        number = int(record["round"])
        run.rounds[number] = run.rounds.get(number, 0) + 1
    elif event == "eval":
        values[ACCURACY] = record["accuracy"]
        values |= {Curve("accuracy", name): value for name, value in record.get("parts", {}).items()}
    elif event == "probe" and record.get("rows") != 0:  # a run without steps probes no rows
        # a probe that a resumed run made for more rows of a round counts all of the round's rows
        names = ("rows", "relapsed", "round_rows")
        rows, relapsed, whole = (None if record.get(name) is None else int(record[name]) for name in names)
        if rows:
            values[HARD_SHARE] = record["hard"] / rows
        first = next(iter(run.looks.values()), None)
        if first is None or whole is None or rows in (whole, first.rows):  # not of a part of the rows only
            values[HARD] = record["hard"]
            look = Look(run.step, rows, int(record["hard"]), relapsed)
            run.looks[record.get("round", len(run.looks))] = look
    for curve, value in values.items():
        run.curves.setdefault(curve, []).append(Point(run.step, tokens, fe, float(value)))
