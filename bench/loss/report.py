"""From the JSON of ``pytest bench --benchmark-json=FILE`` to ``bench/results/<machine>/``: loss.csv, loss.md, plots.

python -m bench.loss.report FILE

From such a .csv it draws the pictures anew.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from bench.common.plots import WIDTH, bars, caption, colors_of, lines, log_axis
from bench.common.tables import DTYPES, Column, Report, Row, named, ratio, table, text_of
from toolx_kernels.pictures import label_ends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CASE = ("what", "n", "d", "v", "dtype", "dead", "frozen")
RATIOS = {"to_floor": "floor", "to_live_floor": "floor, live rows", "to_toolx": "toolx"}  # column: divisor
COLUMNS = (
    Column("ms", "ms", lambda ms: format(ms, ",.0f" if ms >= 100 else ".3g")),
    Column("to_floor", "/ floor", "{:.2f}".format),
    Column("to_live_floor", "/ live floor", "{:.2f}".format),
    Column("to_toolx", "/ toolx", "{:.2f}".format),
    Column("to_dense", "/ own dense", "{:.2f}".format),
    Column("mib", "MiB", "{:.0f}".format),
    Column("mib_beyond_gradients", "MiB beyond gradients", "{:.0f}".format),
    Column("error_logprobs"),
    Column("error_hidden"),
    Column("error_weight"),
    Column("wrong"),
    Column("absent"),
)
AXES = {
    "n": "tokens N",
    "dead": "share of rows without gradient",
    "mib": "peak memory beyond the inputs, MiB",
    "ms": "forward and backward, ms",
}
LEGEND = """\
Medians of alternating rounds in one process. `floor`: the bare GEMMs over all rows (three; two when the head is
frozen; one forward, the others backward), `live floor`: over the rows whose advantage is not zero. `/ own dense`: the
same provider with no dead row. `MiB`: peak of memory beyond the inputs; the last column leaves out the gradients and,
for weights narrower than fp32, an fp32 accumulator of the weight's gradient (negative: none was needed in full).
A provider that computes gradients in its forward pass has next to nothing left to do in `backward`. On a CPU
cut-cross-entropy is its own torch.compile version, because its Triton kernels need a GPU.
"""
CHECK = (
    "Against float64 on a small ragged shape (N=192, D=128, V=5003): the largest error of a log-prob, and the relative "
    "errors of the gradients."
)


def rows_of(measurements: Sequence[Mapping]) -> list[Row]:
    """The rows, sorted by case; ratios are of medians within a case."""
    rows = []
    for measured in measurements:
        ms = {record["provider"]: record.get("ms") for record in measured["records"]}
        for record in measured["records"]:
            row = measured["case"] | record
            row |= {column: ratio(row.get("ms"), ms.get(divisor)) for column, divisor in RATIOS.items()}
            rows.append(row | {f"error_{name}": error for name, error in record.get("errors", {}).items()})
    dense = {key(row, without="dead"): row.get("ms") for row in rows if not row["dead"]}
    for row in rows:
        if row["dead"]:
            row["to_dense"] = ratio(row.get("ms"), dense.get(key(row, without="dead")))
    passes = ("both", "forward", "backward")
    order = ("n", "d", "v", "dtype", "frozen", "dead")
    return sorted(rows, key=lambda row: (passes.index(row["what"]), *(row[k] for k in order)))


def key(row: Row, *, without: str, fields: Sequence[str] = (*CASE, "provider")) -> tuple:
    return tuple(row[field] for field in fields if field != without)


def case_name(row: Row, *, without: Sequence[str] = ()) -> str:
    parts = {
        "what": "forward+backward" if row["what"] == "both" else row["what"],
        "n": f"N={row['n']}",
        "d": f"D={row['d']}",
        "v": f"V={row['v']}",
        "dtype": DTYPES[row["dtype"]],
        "dead": f"{row['dead']:.0%} dead" if row["dead"] else "",
        "frozen": "frozen head" if row["frozen"] else "",
    }
    return " ".join(part for key, part in parts.items() if part and key not in without)


def errors(rows: list[Row]) -> list[str]:
    """The table of each provider's errors, once for each dtype."""
    checked = {(r["provider"], r["dtype"]): r for r in rows if r["error_weight"] is not None}
    columns = ("error_logprobs", "error_hidden", "error_weight")
    return ["", CHECK, ""] + table(
        ("provider", "dtype", "log-prob", "hidden.grad", "weight.grad"),
        [
            [named(r), r["dtype"], *(text_of(r[column], "{:.1e}".format) for column in columns)]
            for r in checked.values()
        ],
    )


def pictures(rows: list[Row]) -> dict[str, Callable[[], Figure]]:
    """loss_time.png, loss_memory.png and loss_dead.png, each if the rows hold a series for it."""
    trained = [row for row in rows if row["what"] == "both" and not row["frozen"]]
    dense = [row for row in trained if not row["dead"]]
    memory = longest([row for row in dense if row["mib"] is not None], "n")
    dead = longest([row for row in trained if row["ms"]], "dead")
    drawn: dict[str, Callable[[], Figure]] = {}
    if any(row["to_floor"] for row in dense):
        drawn["loss_time.png"] = lambda: time_figure([row for row in dense if row["provider"] != "floor"])
    if varied(memory, "n"):
        drawn["loss_memory.png"] = lambda: line_figure(memory, "n", "mib", trained)
    if varied(dead, "dead"):
        drawn["loss_dead.png"] = lambda: line_figure(dead, "dead", "ms", trained)
    return drawn


def time_figure(rows: list[Row]) -> Figure:
    """A panel for each shape, with a bar for each provider that ran in any."""
    from matplotlib.figure import Figure

    shapes: dict[str, list[Row]] = {}
    for row in rows:
        shapes.setdefault(case_name(row, without=("what",)), []).append(row)
    ran = dict.fromkeys(row["provider"] for row in rows if row["to_floor"])
    columns = min(2, len(shapes))
    height = math.ceil(len(shapes) / columns) * (0.5 + 0.22 * len(ran)) + 0.7
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(-(-len(shapes) // columns), columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, (shape, here) in zip(panels, shapes.items(), strict=False):
        values = {row["provider"]: row["to_floor"] for row in here}
        why = {row["provider"]: row["absent"] for row in here if row["absent"]}
        panel.set_title(shape, fontsize=9)
        panel.axvline(1, color="black", linewidth=0.8)
        bars(panel, {name: values.get(name) for name in ran}, colors_of(rows), why)
    for panel in panels[len(shapes) :]:
        panel.set_visible(False)
    figure.suptitle("forward and backward, in times of the bare GEMMs (line)", fontsize=10)
    caption(figure, rows, ran)
    return figure


def line_figure(rows: list[Row], x: str, y: str, others: list[Row]) -> Figure:
    """A line for each provider; the caption names those of ``others`` that have none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    panel = figure.subplots()
    panel.set_title(case_name(rows[0], without=(x,)))
    panel.set(xlabel=AXES[x], ylabel=AXES[y], xscale="log" if x == "n" else "linear")
    ends = lines(panel, rows, x, y, colors_of(rows))
    if min(row[y] for row in rows) > 0:  # tiny shapes may need no memory
        log_axis(panel)
    caption(figure, others, [end.text for end in ends])
    label_ends(figure, {panel: ends})
    return figure


def varied(rows: list[Row], x: str) -> bool:
    return len({row[x] for row in rows}) > 1


def longest(rows: list[Row], x: str) -> list[Row]:
    """The rows of the case that, apart from ``x``, has the most values of ``x``."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row, without=x, fields=CASE)].append(row)
    return max(groups.values(), key=lambda group: len({row[x] for row in group}), default=[])


REPORT = Report("loss", "The fused GRPO loss", LEGEND, CASE, COLUMNS, rows_of, case_name, pictures, errors)

if __name__ == "__main__":
    sys.exit(REPORT.main())
