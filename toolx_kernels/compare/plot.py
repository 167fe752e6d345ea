"""Plot of several runs: accuracy and hard rows over steps and over tokens, and where every arm ended."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from toolx_kernels.compare.runs import Arm, Run, paired_difference
from toolx_kernels.evaluate.intervals import mean_of
from toolx_kernels.evaluate.tables import estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow that fades on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
TITLES = {"accuracy": "held-out accuracy", "hard": "hard rows (no correct rollout)"}
AXES = {"step": "optimizer steps", "tokens": "tokens spent"}
LINE = 0.075  # height of a label, as a share of a panel's


def draw_comparison(arms: Sequence[Arm], path: Path) -> bool:
    """Draws the runs of all arms; a thick line is an arm's mean, its band the 95 % interval over seeds.

    A dotted line is a run that has not finished. Without matplotlib one line says so and False comes back.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"{path.name} was not drawn: `pip install matplotlib` brings what draws it.")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    styles = dict(
        zip((arm.name for arm in arms), islice(cycle(zip(COLOURS, MARKERS, strict=True)), len(arms)), strict=True)
    )
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        ends_height = 1.0 + 0.42 * len(arms)
        figure = plt.figure(figsize=(13, 7.5 + ends_height), layout="constrained")
        # apart, because the margins that names and figures take are not the same
        above, below = figure.subfigures(2, 1, height_ratios=(7.5, ends_height), hspace=0.03)
        panels, ends = above.subplots(2, 2), below.subplots(1, 2)
        for row, (curve, of_ends) in enumerate(zip(TITLES, ends, strict=True)):
            for axis, along in zip(panels[row], AXES, strict=True):
                _curves(axis, arms, styles, curve, along)
            _ends(of_ends, arms, styles, curve)
        figure.suptitle(_caption(arms), fontsize=9)
        beside = path.with_name(path.name + ".part")
        figure.savefig(beside, dpi=120, format="png")
        plt.close(figure)
    beside.replace(path)
    return True


def _caption(arms: Sequence[Arm]) -> str:
    sentences = []
    if any(len(arm.runs) > 1 for arm in arms):
        sentences.append("thick: mean over an arm's seeds with its 95 % interval (t); thin, small: single seeds")
    if any(not run.finished for arm in arms for run in arm.runs):
        sentences.append("dotted: unfinished")
    return "; ".join(sentences)


def _curves(axis: Axes, arms: Sequence[Arm], styles: dict, curve: str, along: str) -> None:
    """One panel of curves, with the arms' names at the ends of their lines."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    labels = []
    for arm in arms:
        colour, marker = styles[arm.name]
        mean = arm.mean_curve(curve)
        several = len(arm.finished or arm.runs) > 1
        for run in arm.runs:
            _single(axis, run, curve, along, colour, marker, faint=several)
        if several and mean:
            x = [getattr(point, along) for point in mean]
            style = {"color": colour, "marker": marker, "linestyle": "-" if arm.finished else ":"}
            axis.plot(x, [point.mean.value for point in mean], markersize=4, linewidth=2.2, **style)
            low, high = [point.mean.low for point in mean], [point.mean.high for point in mean]
            axis.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        lasts = [point.mean.value for point in mean] or [
            run.curves[curve][-1].value for run in arm.runs if run.curves[curve]
        ]
        if lasts:
            labels.append((lasts[-1], arm.name, colour))
    values = [p.value for arm in arms for run in arm.runs for p in run.curves[curve]]
    axis.set(title=f"{TITLES[curve]} over {AXES[along]}", xlabel=AXES[along], xlim=(0, None))
    # few seeds make wide bands: the lines set the scale
    axis.set_ylim(0, 1.08 * max([*values, 1e-9]) if curve == "hard" else min(1.0, 1.15 * max([*values, 0.05])))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=along == "step"))
    if along == "tokens":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.25)
    if not values:
        axis.text(0.5, 0.5, "none measured", ha="center", va="center", transform=axis.transAxes, color="0.5")
    top = axis.get_ylim()[1]
    places = _spread([value / top for value, *_ in labels], LINE)
    for (_, name, colour), place in zip(labels, places, strict=True):
        axis.text(1.015, place, name, color=colour, transform=axis.transAxes, va="center", fontweight="bold")


def _single(axis: Axes, run: Run, curve: str, along: str, colour: str, marker: str, faint: bool) -> None:
    points = run.curves[curve]
    x, y = [getattr(point, along) for point in points], [point.value for point in points]
    axis.plot(
        x,
        y,
        color=colour,
        linestyle="-" if run.finished else ":",
        linewidth=0.8 if faint else 2.0,
        alpha=0.4 if faint and run.finished else 0.9,
        marker="" if faint and len(points) > 1 else marker,
        markersize=4,
    )
    if not run.finished and points:
        axis.plot(x[-1], y[-1], marker=marker, color=colour, markerfacecolor="white", markersize=6)


def _ends(axis: Axes, arms: Sequence[Arm], styles: dict, curve: str) -> None:
    """Where the runs of every arm ended: seeds, mean and interval, in figures too, with the difference to the first."""
    digits = 3 if curve == "accuracy" else 1
    values = [value for arm in arms for value in arm.ends(curve).values()]
    for place, arm in enumerate(arms):
        colour, marker = styles[arm.name]
        ends = [*arm.ends(curve).values()]
        axis.plot(ends, [place + 0.25] * len(ends), marker, color=colour, alpha=0.45, markersize=4, markeredgewidth=0)
        mean = mean_of(ends)
        if mean:
            axis.plot(mean.value, place, marker, color=colour, markersize=8, markeredgecolor="white")
        if mean and mean.low is not None:
            axis.plot(mean[1:], [place, place], color=colour, linewidth=2, zorder=1)
        text = estimate(mean, digits) if mean else "no finished run"
        pairs, difference = paired_difference(arm, arms[0], curve) if place else (0, None)
        if difference:
            text += f"\nminus {arms[0].name}: {estimate(difference, digits, '+')}, n = {pairs}"
        axis.text(1.015, place, text, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    axis.set_yticks(range(len(arms)), [arm.name for arm in arms])
    for tick, arm in zip(axis.get_yticklabels(), arms, strict=True):
        tick.set(color=styles[arm.name][0], fontweight="bold")
    if values:
        margin = 0.25 * (max(values) - min(values)) or 0.1 * max(values) or 0.1
        axis.set_xlim(max(0, min(values) - margin), max(values) + margin)
    axis.set(ylim=(len(arms) - 0.5, -0.5), title=f"{TITLES[curve]} at the end, with 95 % interval")
    axis.grid(axis="x", alpha=0.25)


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """The places, pushed up where they are closer than ``gap``, and down again where that leads beyond 1.

    >>> [round(place, 3) for place in _spread([0.95, 0.5, 0.52], 0.1)]
    [0.95, 0.5, 0.6]
    """
    moved, order = list(places), sorted(range(len(places)), key=lambda i: places[i])
    for below, i in zip(order, order[1:], strict=False):
        moved[i] = max(moved[i], moved[below] + gap)
    ceiling = 1.0
    for i in reversed(order):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    return moved
