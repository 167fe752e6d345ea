"""Plot of several runs: small multiples of accuracy, hard rows and tiers over the budget, and of each arm's seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

from toolx_kernels.compare.arms import Arm, tiers_of
from toolx_kernels.compare.runs import ACCURACY, HARD_SHARE, Curve
from toolx_kernels.pictures import MARKERS, LineEnd, distinct_colors, label_ends, panel_grid, write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

AXES = {"fe": "forward-equivalents spent (FE)", "tokens": "tokens spent (not all runs have FE)"}
WIDTH, HEIGHT, SMALL = 7.0, 1.9, 1.25  # inches of the picture, of a panel, and of one of an arm's seeds
LABEL = 22  # characters of a label
MOST_RUNS = 10  # that are drawn in one panel; of more, each arm has a panel for its seeds


class Look(NamedTuple):
    """How an arm is drawn."""

    label: str
    color: str
    marker: str


Looks = Mapping[str, Look]
Means = Mapping[tuple[str, Curve], Sequence[tuple[float, float]]]  # of each arm and curve


def draw_comparison(arms: Sequence[Arm], path: Path) -> bool:
    """Draws the runs of all arms. Without matplotlib one line says so and False comes back."""
    return write_picture(path, lambda: comparison_figure(arms))


def comparison_figure(arms: Sequence[Arm]) -> Figure:
    """A panel for accuracy, one for hard rows and one for each tier, all over the same axis; below them, where there
    are many runs, a panel for the accuracy of each arm's seeds.

    The axis is FE if all runs have it, else tokens. A thick line is an arm's mean, with a marker and its name at
    the end; a thin one is a run; dotted ones have not finished.
    """
    from matplotlib.figure import Figure

    along = "fe" if all(run.fe is not None for arm in arms for run in arm.runs) else "tokens"
    curves = [ACCURACY, HARD_SHARE, *(Curve("accuracy", tier) for tier in tiers_of(arms))]
    measured = [curve for curve in curves if any(run.points(curve) for arm in arms for run in arm.runs)]
    means = {(arm.name, curve): mean_line(arm, curve, along) for arm in arms for curve in measured}
    labels = short_names([arm.name for arm in arms])
    every = zip(labels, distinct_colors(len(arms)), cycle(MARKERS), strict=False)
    looks = {arm.name: Look(*look) for arm, look in zip(arms, every, strict=True)}
    crowded = sum(len(arm.runs) for arm in arms) > MOST_RUNS
    heights = [math.ceil(len(measured) / 2) * max(HEIGHT, 0.4 + 0.15 * len(arms)) + 0.6]
    heights += [math.ceil(len(arms) / _columns(len(arms))) * SMALL + 0.5] if crowded else []
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    above, *below = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flatten()
    ends = _curves(above, arms, looks, measured, means, along, crowded)
    above.suptitle(_caption(arms, crowded, [_title(curve) for curve in curves if curve not in measured]), fontsize=9)
    for part in below:
        _seeds(part, arms, looks, measured[0], means, along)
    label_ends(figure, ends)
    return figure


def short_names(names: Sequence[str]) -> list[str]:
    """The names, long ones by their ends, and all different.

    >>> short_names(["grpo", "records/of-september/retry", "records/of-august/retry"])
    ['grpo', '…ds/of-september/retry', '…cords/of-august/retry']
    """
    short = [name if len(name) <= LABEL else "…" + name[1 - LABEL :] for name in names]
    return [name if short.count(name) == 1 else f"{at}: {name}" for at, name in enumerate(short, 1)]


def _title(curve: Curve) -> str:
    names = {ACCURACY: "evaluation accuracy", HARD_SHARE: "share of hard rows"}
    return names.get(curve, f"tier {curve.tier}")


def _caption(arms: Sequence[Arm], crowded: bool, absent: Sequence[str]) -> str:
    parts = []
    if any(len(arm.runs) > 1 for arm in arms):
        means, both = "lines: means over each arm's seeds", "thick: mean over an arm's seeds, thin: each seed"
        parts.append(means if crowded else both)
    if any(not run.finished for arm in arms for run in arm.runs):
        parts.append("dotted: unfinished")
    if absent:
        parts.append(f"not measured: {', '.join(absent)}")
    return fill("; ".join(parts), 100)


def _curves(
    part: SubFigure, arms: Sequence[Arm], looks: Looks, curves: Sequence[Curve], means: Means, along: str, crowded: bool
) -> dict[Axes, list[LineEnd]]:
    """The means of all arms, a panel for each curve, and the runs themselves unless that is too many lines."""
    ends: dict[Axes, list[LineEnd]] = {}
    last = max(x for mean in means.values() for x, _ in mean) if crowded else _last(arms, along)
    for panel, curve in zip(panel_grid(part, len(curves)), curves, strict=True):
        panel.set_title(fill(_title(curve), 36))
        _budget_axis(panel, last)
        ends[panel], values = [], [0.0]
        for arm in arms:
            look = looks[arm.name]
            if not crowded and len(arm.runs) > 1:
                values += _runs(panel, arm, look, curve, along)
            if mean := means[arm.name, curve]:
                _mean(panel, arm, look, mean)
                values += [value for _, value in mean]
                ends[panel].append(LineEnd(*mean[-1], look.label, look.color))
        _set_top(panel, max(values))
    part.supxlabel(AXES[along], fontsize=9)
    return ends


def _seeds(part: SubFigure, arms: Sequence[Arm], looks: Looks, curve: Curve, means: Means, along: str) -> None:
    """The runs of each arm in a panel of its own, before the means of all others."""
    part.suptitle(f"{_title(curve)} of each seed; gray: means of the other arms", fontsize=9)
    columns = _columns(len(arms))
    panels = part.subplots(math.ceil(len(arms) / columns), columns, sharex=True, sharey=True, squeeze=False).flatten()
    values = [0.0]
    for arm, panel in zip(arms, panels, strict=False):
        panel.set_title(looks[arm.name].label, fontsize=9)
        panel.tick_params(labelsize=8)
        _budget_axis(panel, _last(arms, along))
        for other in arms:
            if other is not arm and (mean := means[other.name, curve]):
                panel.plot(*zip(*mean, strict=True), color="0.85", linewidth=1, zorder=1)
        values += _runs(panel, arm, looks[arm.name], curve, along)
        if mean := means[arm.name, curve]:
            _mean(panel, arm, looks[arm.name], mean)
    _set_top(panels[0], max(values))
    for panel in panels[len(arms) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(arms) - columns) : len(arms)]:  # nothing is drawn below them
        panel.tick_params(labelbottom=True)


def _columns(arms: int) -> int:
    """Four at most, and few empty places."""
    return min((4, 3), key=lambda columns: -arms % columns) if arms > 4 else arms


def mean_line(arm: Arm, curve: Curve, along: str) -> Sequence[tuple[float, float]]:
    """The mean curve of an arm; the mean of its runs' ends where they have no stretch of the axis in common, as when
    each was measured once."""
    ends = [run.points(curve)[-1] for run in arm.finished or arm.runs if run.points(curve)]
    if not ends:
        return []
    middle = fmean(getattr(point, along) for point in ends), fmean(point.value for point in ends)
    return arm.mean_curve(curve, along) or [middle]


def _last(arms: Sequence[Arm], along: str) -> float:
    """Where the longest run ends."""
    points = [point for arm in arms for run in arm.runs for points in run.curves.values() for point in points]
    return max(getattr(point, along) for point in points)


def _budget_axis(panel: Axes, last: float) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panel.set_xlim(0, last or 1)
    panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def _runs(panel: Axes, arm: Arm, look: Look, curve: Curve, along: str) -> list[float]:
    """Draws the runs of an arm; returns their values."""
    values = []
    for run in arm.runs:
        points = run.points(curve)
        x, y = [getattr(point, along) for point in points], [point.value for point in points]
        style: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.4} if run.finished else {"linewidth": 1, "linestyle": ":"}
        panel.plot(x, y, marker="." if len(x) == 1 else None, color=look.color, zorder=2, **style)
        values += y
    return values


def _mean(panel: Axes, arm: Arm, look: Look, mean: Sequence[tuple[float, float]]) -> None:
    x, y = zip(*mean, strict=True)
    style: dict[str, Any] = {"linestyle": "-" if arm.finished else ":", "linewidth": 2, "markersize": 6, "zorder": 3}
    style |= {"markevery": [-1], "markeredgecolor": "white", "markeredgewidth": 0.5, "clip_on": False}
    panel.plot(x, y, color=look.color, marker=look.marker, **style)


def _set_top(panel: Axes, most: float) -> None:
    top = 1.08 * most or 1e-9
    panel.set_ylim(0, min(1.02, max(top, 0.05)))
