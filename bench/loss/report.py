"""From the JSON of ``pytest bench --benchmark-json=FILE`` to ``bench/results/<machine>/``: loss.csv, loss.md, plots.

python -m bench.loss.report FILE
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.common.tables import DTYPES, Column, Report, Row, colours_of, named, ratio, table, text_of

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
    """Sorted by case; ratios are those of medians within a case."""
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


def plot(rows: list[Row], folder: Path) -> None:
    """loss_time.png, loss_memory.png and loss_dead.png, each where the rows hold a series for it."""
    trained = [row for row in rows if row["ms"] and row["what"] == "both" and not row["frozen"]]
    dense = [row for row in trained if not row["dead"]]
    colours = colours_of(trained)
    plot_times([row for row in dense if row["to_floor"] and row["provider"] != "floor"], colours, folder)
    with_memory = [row for row in dense if row["mib"] is not None]
    plot_lines(longest(with_memory, "n"), "n", "mib", "log", colours, folder / "loss_memory.png")
    plot_lines(longest(trained, "dead"), "dead", "ms", "linear", colours, folder / "loss_dead.png")


def plot_times(rows: list[Row], colours: dict, folder: Path) -> None:
    from matplotlib import pyplot as plt

    shapes = list(dict.fromkeys(case_name(row, without=("what",)) for row in rows))
    names = [name for name in colours if any(row["provider"] == name for row in rows)]
    if not rows:
        return
    height = 1 / (len(names) + 1)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.14 * len(shapes) / height), layout="constrained")
    for at, name in enumerate(names):
        mine = [row for row in rows if row["provider"] == name]
        where = [shapes.index(case_name(row, without=("what",))) + (at + 1) * height for row in mine]
        axes.barh(where, [row["to_floor"] for row in mine], height, color=colours[name], label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time of forward and backward / time of the bare GEMMs")
    axes.set_yticks([at + 0.5 for at in range(len(shapes))], shapes)
    axes.set_ylim(len(shapes), 0)  # whole groups, also where only some providers ran
    figure.legend(loc="outside upper center", ncols=4)
    figure.savefig(folder / "loss_time.png", dpi=110)
    plt.close(figure)


def plot_lines(rows: list[Row], x: str, y: str, scale: str, colours: dict, path: Path) -> None:
    """One line a provider; nothing when there is one value of ``x`` only."""
    from matplotlib import pyplot as plt

    if len({row[x] for row in rows}) < 2:
        return
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for name in dict.fromkeys(row["provider"] for row in rows):
        mine = sorted((row[x], row[y]) for row in rows if row["provider"] == name)
        axes.plot(*zip(*mine, strict=True), "o-", color=colours[name], label=name)
    axes.set(xlabel=AXES[x], ylabel=AXES[y], xscale=scale, yscale=scale, title=case_name(rows[0], without=(x,)))
    values = sorted({row[x] for row in rows})
    axes.set_xticks(values, values)
    axes.minorticks_off()
    if scale == "linear":
        axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def longest(rows: list[Row], x: str) -> list[Row]:
    """The rows of the one case, ``x`` left free, that has the most values of ``x``."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row, without=x, fields=CASE)].append(row)
    return max(groups.values(), key=lambda group: len({row[x] for row in group}), default=[])


REPORT = Report("loss", "The fused GRPO loss", LEGEND, CASE, COLUMNS, rows_of, case_name, plot, errors)

if __name__ == "__main__":
    sys.exit(REPORT.main())
