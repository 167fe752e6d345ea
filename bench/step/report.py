"""From the JSON of ``pytest bench --benchmark-json=FILE`` to ``bench/results/<machine>/``: step.csv, .md and .png.

python -m bench.step.report FILE

From such a .csv it draws the pictures anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from bench.common.plots import WIDTH, caption, colors_of, lines
from bench.common.tables import DTYPES, Column, Report, Row, ratio
from toolx_kernels.pictures import label_ends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CASE = ("model", "dtype", "prompts", "length", "n", "new", "stop", "dead", "threads")
COLUMNS = (
    Column("step_s", "step, s", "{:.3g}".format),
    Column("speedup_of_toolx", "toolx is", "{:.2f} x".format),
    Column("rollout_s", "rollout, s", "{:.3g}".format),
    Column("update_s", "update, s", "{:.3g}".format),
    Column("tokens_per_s", "tokens/s", "{:,.3g}".format),
    Column("mean_tokens", "tokens a completion", "{:.3g}".format),
    Column("peak_mib", "peak MiB", "{:,.0f}".format),
    Column("peak_of_toolx", "toolx needs", "{:.2f}".format),
    Column("trained_tokens", "tokens trained on", "{:,d}".format),
    Column("sharing", "shared", "{:.2f} x".format),
    Column("sharing_possible", "possible", "{:.2f} x".format),
    Column("mean_reward"),
    Column("absent"),
)
AXES = {"length": "tokens of a prompt", "n": "completions of a prompt", "new": "tokens of a completion"}
LEGEND = """\
Whole optimizer steps: rollout, reward, forward, backward, AdamW. Medians of steps after one to warm up; each trainer in
a process of its own, taking turns step by step; new prompts each step, the same for all. Same weights, dtype,
temperature 1, GRPO loss on the policy that sampled, no KL; every second completion of a group is rewarded, whatever it
says, so every group has a gradient, except for the dead ones that a case names. Unless a case says `stop`, all
completions have the same length, because no token ends them. `toolx is`: the provider's step over ours. `tokens/s`:
completion tokens by the time of whole steps. `peak MiB`: most memory of the process during a step, the interpreter and
its libraries too (on a GPU: of torch's tensors); `toolx needs`: ours over the provider's. `tokens trained on`: through
the model with a gradient in one step, padding too; `shared`: the tokens of all completions, each with a prompt of its
own, over these; `possible`: the same over the tokens with each prompt once and without dead groups. Micro-batches: TRL
two completions, toolx one group. TRL updates weights in bf16 without masters where a case is in bf16; toolx keeps fp32
masters.
"""


def rows_of(measurements: Sequence[Mapping]) -> list[Row]:
    rows = []
    for measured in measurements:
        ours = next(record for record in measured["records"] if record["provider"] == "toolx")
        for record in measured["records"]:
            ratios = {
                "speedup_of_toolx": ratio(record.get("step_s"), ours["step_s"]),
                "peak_of_toolx": ratio(ours["peak_mib"], record.get("peak_mib")),
            }
            rows.append(measured["case"] | record | ratios)
    return rows


def case_name(row: Row) -> str:
    extra = ", stop" * row["stop"] + f", {row['dead']:.0%} of groups dead" * bool(row["dead"])
    work = f"{row['prompts']} prompts of {row['length']}, {row['n']} x {row['new']} tokens"
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    return f"{row['model']} {DTYPES[row['dtype']]}, {work}{extra}, {threads}"


def series(rows: list[Row], x: str) -> list[Row]:
    """The rows of cases that differ only in ``x``, as many values as possible; a duplicate case counts once."""
    present = [row for row in rows if not row["absent"]]
    fixed = [key for key in CASE if key != x]
    best: dict[tuple, Row] = {}
    for start in present:
        alike = [row for row in present if all(row[key] == start[key] for key in fixed)]
        found: dict[tuple, Row] = {}
        for row in alike:
            found.setdefault((row["provider"], row[x]), row)
        if len({value for _, value in found}) > len({value for _, value in best}):
            best = found
    return sorted(best.values(), key=lambda row: row[x])


def pictures(rows: list[Row]) -> dict[str, Callable[[], Figure]]:
    return {"step.png": lambda: step_figure(rows)}


def step_figure(rows: list[Row]) -> Figure:
    """Step time above and peak memory below, over what was varied (or over all of ``AXES``)."""
    from matplotlib.figure import Figure

    all_series = {x: series(rows, x) for x in AXES}
    varied = {x: of_x for x, of_x in all_series.items() if len({row[x] for row in of_x}) > 1} or all_series
    shown = [row for of_x in varied.values() for row in of_x]
    colors, ends = colors_of(shown), {}
    figure = Figure(figsize=(max(WIDTH, 4.2 * len(varied)), 5.4), layout="constrained")
    panels = figure.subplots(2, len(varied), sharex="col", squeeze=False)
    for column, (x, of_x) in zip(panels.T, varied.items(), strict=True):
        column[0].set_title(fill(case_name(of_x[0] | {x: "…"}), 60), fontsize=9)
        for panel, y in zip(column, ("step_s", "peak_mib"), strict=True):
            ends[panel] = lines(panel, of_x, x, y, colors)
            panel.set_ylim(bottom=0)
        column[1].set_xlabel(AXES[x])
    panels[0][0].set_ylabel("step, s")
    panels[1][0].set_ylabel("peak memory of the process, MiB")
    caption(figure, rows, colors)
    label_ends(figure, ends)
    return figure


REPORT = Report("step", "Optimizer steps", LEGEND, CASE, COLUMNS, rows_of, case_name, pictures)

if __name__ == "__main__":
    sys.exit(REPORT.main())
