"""Curves of a run over optimizer steps: accuracy, reward, hard rows, truncation, clipping, KL, entropy, length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from toolx_kernels.pictures import (
    AMBER,
    BLACK,
    BLUE,
    GRAY,
    GREEN,
    INDIGO,
    PINK,
    SKY,
    VERMILION,
    WIDTH,
    WINE,
    LineEnd,
    label_ends,
    panel_grid,
    write_picture,
)
from toolx_kernels.train.run.folder import CURVES, RunFolder
from toolx_kernels.train.run.places import without_folders

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTH = 10  # steps of a moving average
HEIGHT = 1.6  # inches of a panel


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: its lines by their key in metrics.jsonl, each with a label and a color; a lone one needs no label."""

    title: str
    event: str
    lines: dict[str, tuple[str, str]]
    percent: bool = False
    top: float | None = None  # of the axis, where it is known

    def text(self, value: float) -> str:
        return f"{value:.1%}" if self.percent else f"{value:g}"


PANELS = (
    Panel("evaluation accuracy", "eval", {"accuracy": ("", BLUE)}, percent=True, top=1.0),
    Panel("mean reward", "step", {"reward": ("", GREEN)}),
    Panel("share of hard rows", "probe", {"hard_share": ("", VERMILION)}, percent=True, top=1.0),
    Panel("truncated completions", "step", {"truncated": ("", PINK)}, percent=True),
    Panel("clipped tokens", "step", {"clip_high": ("above", BLACK), "clip_low": ("below", GRAY)}, percent=True),
    Panel("KL to the model before RL", "step", {"kl": ("", SKY)}),
    Panel("entropy (nats per token)", "step", {"entropy": ("", INDIGO)}),
    Panel("completion length (tokens)", "step", {"completion_length": ("", WINE)}),
    Panel("gradient norm", "step", {"grad_norm": ("", AMBER)}),
)


def write_curves(run: Path, picture: Path | None = None, model: str = "a given model") -> bool:
    """Draws the metrics of the run in folder ``run`` into ``picture``, by default its ``curves.png``. Its title calls a
    model that was given as an object ``model``.

    Returns False without matplotlib, which a source tree may lack: a run must not fail at its last step.
    """
    folder = RunFolder(run)
    settings = without_folders(folder.config())
    names = settings.get("model") or model, settings.get("dataset") or "given rows"
    title = "{} on {}, seed {}".format(*names, settings.get("seed"))
    return write_picture(picture or run / CURVES, lambda: curves_figure(folder.metrics(), title))


def curves_figure(records: Sequence[dict], title: str) -> Figure:
    """A panel for each quantity in ``records``, lines of metrics.jsonl; the caption names those that are absent."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = [_with_share(record) for record in records]
    steps = [record["step"] for record in records if record["event"] in ("step", "sft")]
    supervised = [record["step"] for record in records if record["event"] == "sft"]
    found = {panel.title: _lines(panel, records) for panel in PANELS}
    shown = [panel for panel in PANELS if found[panel.title]]
    caption = _caption(steps, supervised, [panel.title.split(" (")[0] for panel in PANELS if panel not in shown])
    height = HEIGHT * math.ceil(len(shown) / 2) + 0.4 + 0.17 * (caption.count("\n") + 1)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(fill(title, 70), fontsize=11, parse_math=False)
    figure.supxlabel(caption, fontsize=8.5, color="0.3")
    ends: dict[Axes, list[LineEnd]] = {}
    for at, (panel, axes) in enumerate(zip(shown, panel_grid(figure, len(shown)), strict=True)):
        axes.set_title(panel.title)
        axes.set_xlim(0, max(1, *steps, 1))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        if supervised:
            axes.axvspan(min(supervised) - 1, max(supervised), color="0.92", zorder=0, linewidth=0)
        ends[axes] = _draw(axes, panel, found[panel.title])
        if at >= len(shown) - 2:
            axes.set_xlabel("step")
    if any(ends.values()):
        label_ends(figure, ends)
    return figure


def _with_share(record: dict) -> dict:
    """Adds the share of hard rows to a probe, as ``max_steps`` may let it cover fewer rows than others."""
    if record["event"] != "probe" or not record.get("rows"):
        return record
    return record | {"hard_share": record["hard"] / record["rows"]}


def _lines(panel: Panel, records: Sequence[dict]) -> dict[str, list[tuple[int, float]]]:
    """The points of each line of a panel, by its key; those without a value are left out."""
    of_event = [record for record in records if record["event"] == panel.event]
    lines = {
        key: [(r["step"], r[key]) for r in of_event if r.get(key) is not None and math.isfinite(r[key])]
        for key in panel.lines
    }
    return {key: points for key, points in lines.items() if points}


def _draw(axes: Axes, panel: Panel, lines: dict[str, list[tuple[int, float]]]) -> list[LineEnd]:
    """Draws the lines: of few values with their points, of many values thin below their moving average."""
    from matplotlib.ticker import PercentFormatter

    ends, values = [], [0.0]
    style: dict[str, Any] = {"markersize": 4, "clip_on": False, "zorder": 3}  # a line of zeros lies on the axis
    for key, points in lines.items():
        label, color = panel.lines[key]
        x, y = ([point[axis] for point in points] for axis in (0, 1))
        values += y
        if panel.event != "step":
            axes.plot(x, y, "o-", color=color, **style)
            axes.set_title(f"{panel.title}: {' to '.join(map(panel.text, y[:: max(1, len(y) - 1)]))}")
        elif len(y) <= SMOOTH:
            axes.plot(x, y, "o-", color=color, **style)
        else:
            axes.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
            y = _moving_average(y)
            axes.plot(x, y, color=color, **style)
        if len(lines) > 1:
            ends.append(LineEnd(x[-1], y[-1], label, color))
    least, most = min(values), panel.top or 1.08 * max(values)
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        most = max(most, 0.05)
    elif least == most:  # nothing but zeros
        most = 1.0
    axes.set_ylim(1.08 * least, most)
    return ends


def _moving_average(values: Sequence[float]) -> list[float]:
    return [sum(values[max(0, i - SMOOTH + 1) : i + 1]) / min(i + 1, SMOOTH) for i in range(len(values))]


def _caption(steps: Sequence[int], supervised: Sequence[int], absent: Sequence[str]) -> str:
    parts = [f"thin: each step, thick: mean of {SMOOTH} steps"] if len(steps) - len(supervised) > SMOOTH else []
    parts += ["gray: supervised steps"] if supervised else []
    parts += [f"not measured in this run: {', '.join(absent)}"] if absent else []
    return fill("; ".join(parts), 85)
