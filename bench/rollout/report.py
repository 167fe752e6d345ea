"""From the JSON of ``pytest bench --benchmark-json=FILE`` to ``bench/results/<machine>/``: rollout.csv, .md and .png.

python -m bench.rollout.report FILE

From such a .csv it draws the pictures anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from bench.common.plots import WIDTH, bars, caption, colors_of
from bench.common.tables import DTYPES, Column, Report, Row, named_cases, ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CASE = ("model", "dtype", "prompts", "length", "n", "new")
COLUMNS = (
    Column("tokens_per_s", "tokens/s", "{:,.0f}".format),
    Column("speedup_of_toolx", "toolx is", "{:.2f} x".format),
    Column("whole_s", "whole, s", "{:.3g}".format),
    Column("prefill_s", "prefill, s", "{:.3g}".format),
    Column("step_ms", "step, ms", "{:.3g}".format),
    Column("step_to_floor", "/ floor", "{:.2f}".format),
    Column("share_of_bandwidth", "of bandwidth", "{:.0%}".format),
    Column("kv_mib", "KV MiB", "{:,.1f}".format),
    Column("kv_share", "of duplicated", "{:.2f}".format),
    Column("kv_duplicated_mib"),
    Column("peak_mib", "peak MiB", "{:,.0f}".format),
    Column("floor_ms"),
    Column("floor_gemms_ms"),
    Column("floor_kv_ms"),
    Column("floor_bytes_ms"),
    Column("bandwidth_gb_s"),
    Column("note"),
    Column("absent"),
)
LEGEND = """\
Medians of alternating rounds in one process; random prompts, new ones each round; temperature 1 and no stop token, so
that all do the same work. `toolx is`: our tokens per second over the provider's. `prefill`: the same call for one
token a row. `step`: what is left of the whole call, by the tokens that are left, that is the time in which every row
gets one more token. `floor` of a step: all linear layers at this number of rows, timed in the same rounds (on a GPU as
a CUDA graph), plus the bytes of keys and values at the middle of the completions, each prompt once and each row's own
tokens, at the bandwidth of a matrix-vector product that reads 1 GiB. `of bandwidth`: the bytes of weights, keys and
values, at that bandwidth, over the step. `KV MiB`: most memory of keys and values in use at once, where the provider
lets one see it; `duplicated` is what rows that share nothing need. `peak MiB`: memory added by the first call, the pool
included; blank for engines that take a share of the memory up front. HF `generate` prefills every prompt once for each
of its samples. Only toolx also delivers the log-prob and the entropy of every token. transformers' continuous batching
starts and stops its thread in every call, as its `generate_batch` does.
"""


def rows_of(measurements: Sequence[Mapping]) -> list[Row]:
    """The rows of all providers; the floor is a provider with only a step."""
    rows = []
    for measured in measurements:
        case, floor, records = measured["case"], measured["floor"], measured["records"]
        known = case | {"floor_ms": floor["ms"], "bandwidth_gb_s": floor["bandwidth_gb_s"]}
        known |= {f"floor_{key}": floor[key] for key in ("gemms_ms", "kv_ms", "bytes_ms")}
        ours = {record["provider"]: record.get("tokens_per_s") for record in records}.get("toolx")
        for record in [*records, {"provider": "floor", "step_ms": floor["ms"]}]:
            ratios = {
                "speedup_of_toolx": ratio(ours, record.get("tokens_per_s")),
                "step_to_floor": ratio(record.get("step_ms"), floor["ms"]),
                "share_of_bandwidth": ratio(floor["bytes_ms"], record.get("step_ms")),
                "kv_share": ratio(record.get("kv_mib"), case["kv_duplicated_mib"]),
            }
            rows.append(known | record | ratios)
    return rows


def case_name(row: Row) -> str:
    work = f"{row['prompts']} prompts of {row['length']}, {row['n']} x {row['new']} tokens"
    return f"{row['model']} {DTYPES[row['dtype']]}, {work}"


def notes(rows: list[Row]) -> list[str]:
    """The floors, and the providers' notes."""
    lines = ["", "Floors of a step:", ""]
    for name, (row, *_) in named_cases(rows, case_name):
        lines.append(
            f"- {name}: {row['floor_ms']:.3g} ms, of which linear layers {row['floor_gemms_ms']:.3g} and keys and "
            f"values {row['floor_kv_ms']:.3g} at {row['bandwidth_gb_s']:.3g} GB/s; all bytes alone "
            f"{row['floor_bytes_ms']:.3g} ms"
        )
    if noted := dict.fromkeys(f"- {r['provider']} ({case_name(r)}): {r['note']}" for r in rows if r["note"]):
        lines += ["", "Notes:", "", *noted]
    return lines


def pictures(rows: list[Row]) -> dict[str, Callable[[], Figure]]:
    return {"rollout.png": lambda: rollout_figure(rows)}


def rollout_figure(rows: list[Row]) -> Figure:
    """Tokens per second on the left, the decode step and its floor on the right, a row of panels for each case."""
    from matplotlib.figure import Figure

    cases = named_cases(rows, case_name)
    ran = dict.fromkeys(row["provider"] for _, case in cases for row in case if row["provider"] != "floor")
    colors = colors_of([{"provider": name} for name in ran])
    figure = Figure(figsize=(WIDTH, len(cases) * (0.6 + 0.22 * len(ran)) + 0.8), layout="constrained")
    panels = figure.subplots(len(cases), 2, sharey=True, squeeze=False)
    for (speed, step), (name, case) in zip(panels, cases, strict=True):
        why = {row["provider"]: row["absent"] for row in rows if row["absent"] and case_name(row) == name}
        for panel, key in ((speed, "tokens_per_s"), (step, "step_ms")):
            values = {row["provider"]: row[key] for row in case}
            bars(panel, {provider: values.get(provider) for provider in ran}, colors, why)
        step.axvline(case[0]["floor_ms"], color="black", linewidth=0.8)
        speed.set_title(name, fontsize=9)
    panels[-1][0].set_xlabel("tokens per second")
    panels[-1][1].set_xlabel("decode step, ms (line: floor)")
    caption(figure, rows, ran)
    return figure


REPORT = Report("rollout", "Rollouts", LEGEND, CASE, COLUMNS, rows_of, case_name, pictures, notes)

if __name__ == "__main__":
    sys.exit(REPORT.main())
