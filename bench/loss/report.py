"""From the JSON of ``pytest bench --benchmark-json=FILE`` to ``bench/results/<machine>/``: loss.csv, loss.md, plots.

python -m bench.loss.report FILE
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
CASE = ("what", "n", "d", "v", "dtype", "dead", "frozen")
RATIOS = {"to_floor": "floor", "to_live_floor": "floor, live rows", "to_toolx": "toolx"}  # column: divisor
FIGURES = (
    "provider", "ms", "to_floor", "to_live_floor", "to_toolx", "to_dense", "mib", "mib_beyond_gradients",
    "error_logprobs", "error_hidden", "error_weight", "wrong", "absent",
)  # fmt: skip
HEADINGS = (
    "case", "provider", "ms", "/ floor", "/ live floor", "/ toolx", "/ own dense", "MiB", "MiB beyond gradients"
)  # fmt: skip
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


def rows_of(benchmarks: Iterable[dict]) -> list[dict]:
    """One dict for each provider and case, keys ``CASE + FIGURES``; ratios are those of medians within a case."""
    kept = [b["extra_info"] for b in benchmarks if "records" in b.get("extra_info", {})]
    rows = []
    for info in kept:
        case = info["case"]
        ms = {record["provider"]: record.get("ms") for record in info["records"]}
        for record in info["records"]:
            row = dict.fromkeys(CASE + FIGURES) | case | {key: record[key] for key in FIGURES if key in record}
            row |= {column: ratio(row["ms"], ms.get(divisor)) for column, divisor in RATIOS.items()}
            for name, error in record.get("errors", {}).items():
                row[f"error_{name}"] = error
            rows.append(row)
    dense = {key(row, without="dead"): row["ms"] for row in rows if not row["dead"]}
    for row in rows:
        if row["dead"]:
            row["to_dense"] = ratio(row["ms"], dense.get(key(row, without="dead")))
    passes = ("both", "forward", "backward")
    order = ("n", "d", "v", "dtype", "frozen", "dead")
    return sorted(rows, key=lambda row: (passes.index(row["what"]), *(row[k] for k in order)))


def ratio(value: float | None, divisor: float | None) -> float | None:
    return round(value / divisor, 3) if value and divisor else None


def key(row: dict, *, without: str, fields: Sequence[str] = (*CASE, "provider")) -> tuple:
    return tuple(row[field] for field in fields if field != without)


def case_name(row: dict, *, without: Sequence[str] = ()) -> str:
    parts = {
        "what": "forward+backward" if row["what"] == "both" else row["what"],
        "n": f"N={row['n']}",
        "d": f"D={row['d']}",
        "v": f"V={row['v']}",
        "dtype": {"bfloat16": "bf16", "float32": "fp32"}[row["dtype"]],
        "dead": f"{row['dead']:.0%} dead" if row["dead"] else "",
        "frozen": "frozen head" if row["frozen"] else "",
    }
    return " ".join(part for key, part in parts.items() if part and key not in without)


def markdown(rows: list[dict], machine: dict, date: str) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in ("slug", "device"))
    lines = [f"# The fused GRPO loss on {machine['device']}", "", f"{date}; {facts}.", "", LEGEND]
    lines += table(HEADINGS, (cells(row, at == 0) for _, case in by_case(rows) for at, row in enumerate(case)))
    lines += ["", CHECK, ""]
    checked = {(r["provider"], r["dtype"]): r for r in rows if r["error_weight"] is not None}
    columns = ("error_logprobs", "error_hidden", "error_weight")
    lines += table(
        ("provider", "dtype", "log-prob", "hidden.grad", "weight.grad"),
        ([named(row), row["dtype"], *(number(row[column], ".1e") for column in columns)] for row in checked.values()),
    )
    lines += absent(rows, case_name)
    return "\n".join(lines) + "\n"


def absent(rows: list[dict], case_name: Callable[[dict], str]) -> list[str]:
    """The lines on who is absent and why; the case is named where a provider ran in others."""
    reasons = {(r["provider"], r["absent"]): case_name(r) for r in rows if r["absent"]}
    everywhere = {r["provider"] for r in rows} - {r["provider"] for r in rows if not r["absent"]}
    lines = [
        f"- {provider}{'' if provider in everywhere else f' ({case})'}: {reason}"
        for (provider, reason), case in reasons.items()
    ]
    return ["", "Absent:", "", *lines] if lines else []


def heading(title: str, machine: dict, date: str, versions: dict) -> list[str]:
    names = ("cores", "threads", "python", "cuda", "torch", "triton")
    facts = {name: machine[name] for name in names if name in machine} | versions
    words = ", ".join(f"{name} {value}" for name, value in facts.items())
    return [f"# {title} on {machine['device']}", "", f"{date}; {words}.", ""]


def named_cases(rows: list[dict], case_name: Callable[[dict], str]) -> list[tuple[str, list[dict]]]:
    """The rows of those who were there, by the names of their cases."""
    present = (row for row in rows if not row["absent"])
    return [(name, list(case)) for name, case in groupby(present, key=case_name)]


def first_of(benchmarks: Iterable[dict], name: str) -> dict:
    """``extra_info`` of the first benchmark that measured the ``name``."""
    return next(b["extra_info"] for b in benchmarks if name in b.get("extra_info", {}))


def colours_of(rows: Iterable[dict]) -> dict[str, tuple]:
    """A colour for each provider, in their order; no window is opened for what is drawn from here on."""
    import matplotlib

    matplotlib.use("Agg")
    names = dict.fromkeys(row["provider"] for row in rows)
    return {name: matplotlib.colormaps["tab10"](at % 10) for at, name in enumerate(names)}


def save_with_legend(figure, colours: dict[str, tuple], path: Path) -> None:
    from matplotlib import pyplot as plt

    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(handles, list(colours), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def by_case(rows: list[dict]):
    return groupby((row for row in rows if not row["absent"]), key=lambda row: tuple(row[k] for k in CASE))


def cells(row: dict, first: bool) -> list[str]:
    ratios = (number(row[name], ".2f") for name in ("to_floor", "to_live_floor", "to_toolx", "to_dense"))
    sizes = (number(row[name], ".0f") for name in ("mib", "mib_beyond_gradients"))
    return [
        case_name(row) if first else "",
        named(row),
        number(row["ms"], ",.0f" if row["ms"] and row["ms"] >= 100 else ".3g"),
        *ratios,
        *sizes,
    ]


def named(row: dict) -> str:
    return row["provider"] + (" (**wrong**)" if row["wrong"] else "")


def number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def table(headings: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    rows = [headings, ["---"] * len(headings), *body]
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def plot(rows: list[dict], folder: Path) -> None:
    """loss_time.png, loss_memory.png and loss_dead.png, each where the rows hold a series for it."""
    trained = [row for row in rows if row["ms"] and row["what"] == "both" and not row["frozen"]]
    dense = [row for row in trained if not row["dead"]]
    colours = colours_of(trained)
    plot_times([row for row in dense if row["to_floor"] and row["provider"] != "floor"], colours, folder)
    with_memory = [row for row in dense if row["mib"] is not None]
    plot_lines(longest(with_memory, "n"), "n", "mib", "log", colours, folder / "loss_memory.png")
    plot_lines(longest(trained, "dead"), "dead", "ms", "linear", colours, folder / "loss_dead.png")


def plot_times(rows: list[dict], colours: dict, folder: Path) -> None:
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


def plot_lines(rows: list[dict], x: str, y: str, scale: str, colours: dict, path: Path) -> None:
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


def longest(rows: list[dict], x: str) -> list[dict]:
    """The rows of the one case, ``x`` left free, that has the most values of ``x``."""
    groups = defaultdict(list)
    for row in rows:
        groups[key(row, without=x, fields=CASE)].append(row)
    return max(groups.values(), key=lambda group: len({row[x] for row in group}), default=[])


def write(record: dict, results: Path = RESULTS) -> Path:
    """Writes the folder of the machine that ``record``, the parsed JSON, was measured on, and returns it."""
    rows = rows_of(record["benchmarks"])
    text = markdown(rows, record["machine_info"], record["datetime"][:10])
    return write_report("loss", record, CASE + FIGURES, rows, text, plot, results)


def write_versioned(
    name: str,
    record: dict,
    columns: Sequence[str],
    rows_of: Callable,
    markdown: Callable,
    plot: Callable,
    results: Path,
) -> Path:
    """The report of benchmarks that name the versions of whom they measured."""
    rows = rows_of(record["benchmarks"])
    versions = first_of(record["benchmarks"], name)["versions"]
    text = markdown(rows, record["machine_info"], versions, record["datetime"][:10])
    return write_report(name, record, columns, rows, text, plot, results)


def write_report(
    name: str, record: dict, columns: Sequence[str], rows: list[dict], text: str, plot: Callable, results: Path
) -> Path:
    """<name>.csv, <name>.md and what ``plot(rows, folder)`` makes, in the folder of the record's machine."""
    folder = results / record["machine_info"]["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    try:
        plot(rows, folder)
    except ModuleNotFoundError as error:
        print(f"No plots: {error.name} is not installed.", file=sys.stderr)
    return folder


def main() -> int:
    return command("bench.loss.report", __doc__, "loss", rows_of, write)


def command(program: str, doc: str, name: str, rows_of: Callable, write: Callable) -> int:
    """The command line of a report: reads the JSON, writes the report and prints it."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=doc.partition("\n")[0])
    parser.add_argument("json", type=Path, help="what pytest wrote for --benchmark-json")
    path = parser.parse_args().json
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        measured = bool(rows_of(record["benchmarks"]))
    except (OSError, ValueError, KeyError) as error:
        print(f"{program}: cannot use {path} ({error}): write it with pytest --benchmark-json.", file=sys.stderr)
        return 2
    if not measured:
        print(f"{path} holds no measurement of the {name}, so its report stays as it is.")
        return 0
    folder = write(record)
    print((folder / f"{name}.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
