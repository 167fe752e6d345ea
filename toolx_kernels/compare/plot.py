"""Picture of several runs: small multiples of accuracy, hard rows and the accuracy on each tier, over the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from toolx_kernels.compare.arms import Arm, tiers_of
from toolx_kernels.compare.runs import ACCURACY, HARD, Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart, with grey for the yellow that fades on white; markers
# are one fewer, so that 56 pairs differ
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#8C8C8C")
MARKERS = "osD^vPX"
AXES = {"fe": "forward-equivalents spent (FE)", "tokens": "tokens spent (some run does not tell its FE)"}
WIDTH, HEIGHT = 3.6, 2.6  # inches of a panel
CHARACTERS = 12  # of the legend's and titles' text in an inch, capitals among them
PIECE = 8  # characters that a name's piece of line takes in the legend, with the gaps

Styles = Mapping[str, tuple[str, str]]  # colour and marker of each arm


def draw_comparison(arms: Sequence[Arm], path: Path) -> bool:
    """Draws the runs of all arms. Without matplotlib one line says so and False comes back."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"{path.name} was not drawn: `pip install matplotlib` brings what draws it.")
        return False
    beside = path.with_name(path.name + ".part")
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        comparison_figure(arms).savefig(beside, dpi=120, format="png")
    beside.replace(path)
    return True


def comparison_figure(arms: Sequence[Arm]) -> Figure:
    """A panel for accuracy, one for hard rows and one for each tier, all over the same axis.

    The axis is FE where all runs tell theirs, else tokens. A thick line is an arm's mean, with its marker at the end; a
    thin one is a run; dotted ones have not finished.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, MaxNLocator

    along = "fe" if all(run.fe is not None for arm in arms for run in arm.runs) else "tokens"
    curves = [ACCURACY, HARD, *(Curve("accuracy", tier) for tier in tiers_of(arms))]
    columns = math.ceil(math.sqrt(len(curves)))
    rows = math.ceil(len(curves) / columns)
    names, legend_columns, legend_rows = _legend_of([arm.name for arm in arms], columns * WIDTH)
    figure = Figure(figsize=(columns * WIDTH, rows * HEIGHT + 0.2 * legend_rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    styles = dict(zip((arm.name for arm in arms), zip(cycle(COLOURS), cycle(MARKERS), strict=False), strict=False))
    for panel, curve in zip(panels, curves, strict=False):
        _panel(panel, arms, styles, curve, along)
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(curves) - columns) : len(curves)]:  # nothing is drawn below them
        panel.tick_params(labelbottom=True)
    panels[0].set_xlim(0, None)
    panels[0].xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.supxlabel(AXES[along], fontsize=9)
    handles = [Line2D([], [], **_line(*styles[arm.name], arm)) for arm in arms]
    figure.legend(handles, names, loc="outside upper center", ncols=legend_columns, frameon=False, title=_caption(arms))
    return figure


def _legend_of(names: Sequence[str], width: float) -> tuple[list[str], int, int]:
    """The names, in lines that fit a legend of ``width`` inches; its columns; its rows of text, with the caption's."""
    room = int(width * CHARACTERS)
    most = max(1, room // (max(map(len, names)) + PIECE))
    columns = math.ceil(len(names) / math.ceil(len(names) / most))  # rows of about the same length
    names = [fill(name, room - PIECE) for name in names]
    lines = sum(name.count("\n") + 1 for name in names)
    return names, columns, math.ceil(lines / columns) + 1


def _caption(arms: Sequence[Arm]) -> str:
    parts = ["thick: mean of an arm's seeds, thin: each seed"] if any(len(arm.runs) > 1 for arm in arms) else []
    if any(not run.finished for arm in arms for run in arm.runs):
        parts.append("dotted: unfinished")
    return "; ".join(parts)


def _line(colour: str, marker: str, arm: Arm) -> dict[str, Any]:
    linestyle = "-" if arm.finished else ":"
    return {"color": colour, "marker": marker, "linestyle": linestyle, "linewidth": 2, "markersize": 6}


def _panel(panel: Axes, arms: Sequence[Arm], styles: Styles, curve: Curve, along: str) -> None:
    title = {ACCURACY: "held-out accuracy", HARD: "hard rows (no solved rollout)"}.get(curve, f"tier {curve.tier}")
    panel.set_title(fill(title, int((WIDTH - 0.5) * CHARACTERS)), fontsize=9)
    panel.grid(alpha=0.25)
    values = [point.value for arm in arms for run in arm.runs for point in run.points(curve)]
    if not values:
        panel.text(0.5, 0.5, "none measured", ha="center", va="center", transform=panel.transAxes, color="0.5")
        panel.set_yticks([])
        return
    for arm in arms:
        colour, marker = styles[arm.name]
        for run in arm.runs if len(arm.runs) > 1 else ():
            points = run.points(curve)
            x, y = [getattr(point, along) for point in points], [point.value for point in points]
            faint = (
                {"linewidth": 0.7, "alpha": 0.3} if run.finished else {"linewidth": 1, "alpha": 0.8, "linestyle": ":"}
            )
            panel.plot(x, y, color=colour, zorder=2, **faint)
        mean = arm.mean_curve(curve, along)
        if mean:
            style = _line(colour, marker, arm) | {"markeredgecolor": "white", "markeredgewidth": 0.5}
            panel.plot(*zip(*mean, strict=True), markevery=[-1], zorder=3, **style)
    top = 1.08 * max(values) or 1e-9
    panel.set_ylim(0, top if curve == HARD else min(1.02, max(top, 0.05)))
