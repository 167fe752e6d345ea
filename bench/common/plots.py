"""Plots of benchmarks: one color for each provider, bars with their values, lines with their names, what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from textwrap import fill
from typing import TYPE_CHECKING

from bench.common.tables import Row
from toolx_kernels.pictures import (
    AMBER,
    BLUE,
    COLORS,
    GRAY,
    GREEN,
    INDIGO,
    OLIVE,
    PINK,
    SKY,
    VERMILION,
    WINE,
    LineEnd,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.0  # inches
PROVIDERS = {
    "toolx": BLUE,
    "toolx, compiled": SKY,
    "toolx, gradient checkpointing": SKY,
    "plain torch": GREEN,
    "cut-cross-entropy": PINK,
    "Liger GRPO": WINE,
    "Liger cross-entropy": INDIGO,
    "torch linear_cross_entropy": OLIVE,
    "TRL": VERMILION,
    "TRL chunked": VERMILION,
    "TRL, gradient checkpointing": AMBER,
    "TRL, continuous batching": INDIGO,
    "HF generate": GREEN,
    "transformers continuous batching": INDIGO,
    "vLLM": PINK,
    "nano-vllm": WINE,
    "floor": GRAY,
    "floor, live rows": GRAY,
}


def colors_of(rows: Iterable[Row]) -> dict[str, str]:
    """The color of each provider, in their order; the same in every picture, unless the provider is unknown."""
    names = dict.fromkeys(row["provider"] for row in rows)
    known = {name: PROVIDERS[name] for name in names if name in PROVIDERS}
    free = iter([color for color in COLORS if color not in known.values()])
    return {name: known.get(name) or next(free, GRAY) for name in names}


def bars(panel: Axes, values: Mapping[str, float | None], colors: Mapping[str, str], why: Mapping[str, str]) -> None:
    """A bar for each provider with its value, from top to bottom; where there is none, the words of ``why``."""
    for at, (name, value) in enumerate(values.items()):
        if value is not None:
            panel.barh(at, value, color=colors[name])
        panel.annotate(
            why.get(name, "not measured") if value is None else _short(value),
            (value or 0, at),
            (3, 0),
            textcoords="offset points",
            color="0.4" if value is None else "black",
            fontsize=8,
            verticalalignment="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    panel.set_yticks(range(len(values)), [*values])
    panel.set_ylim(len(values) - 0.4, -0.6)
    panel.margins(x=0.15)
    panel.grid(visible=False, axis="y")


def _short(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def lines(panel: Axes, rows: Iterable[Row], x: str, y: str, colors: Mapping[str, str]) -> list[LineEnd]:
    """A line for each provider, floors broken, and ticks where something was measured; returns the lines' ends."""
    from matplotlib.ticker import StrMethodFormatter

    ends, rows = [], [row for row in rows if row[y] is not None]
    for name in dict.fromkeys(row["provider"] for row in rows):
        points = sorted((row[x], row[y]) for row in rows if row["provider"] == name)
        style = {"floor": "--", "floor, live rows": ":"}.get(name, "-")
        panel.plot(*zip(*points, strict=True), marker="o", linestyle=style, color=colors[name], markersize=4)
        ends.append(LineEnd(*points[-1], name, colors[name]))
    measured = sorted({row[x] for row in rows})
    panel.set_xticks(measured, [f"{value:,}" if isinstance(value, int) else f"{value:.0%}" for value in measured])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    return ends


def log_axis(panel: Axes) -> None:
    """A logarithmic y axis with ticks at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullLocator

    plain = panel.yaxis.get_major_formatter()
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(plain)


def caption(figure: Figure, rows: Iterable[Row], shown: Iterable[str]) -> None:
    """Names, below the panels, providers that are not ``shown``: of other cases in ``rows``, or unable to run."""
    rows = [row for row in rows if not row["provider"].startswith("floor")]
    ran = dict.fromkeys(row["provider"] for row in rows if not row["absent"])
    elsewhere = [name for name in ran if name not in shown]
    absent = {row["provider"]: row["absent"] for row in rows if row["provider"] not in ran}
    sentences = [f"measured at other cases: {'; '.join(elsewhere)}."] if elsewhere else []
    if absent:
        sentences.append(f"did not run: {'; '.join(f'{name} ({why})' for name, why in absent.items())}.")
    figure.supxlabel(fill(" ".join(sentences), 110), fontsize=8, color="0.3")
