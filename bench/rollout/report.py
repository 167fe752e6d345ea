"""From the JSON of ``pytest bench --benchmark-json=FILE`` to ``bench/results/<machine>/``: rollout.csv, .md and .png.

python -m bench.rollout.report FILE
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from bench.loss.report import (
    RESULTS,
    absent,
    colours_of,
    command,
    heading,
    named_cases,
    number,
    ratio,
    save_with_legend,
    table,
    write_versioned,
)

CASE = ("model", "dtype", "prompts", "length", "n", "new")
FLOOR = ("floor_ms", "floor_gemms_ms", "floor_kv_ms", "floor_bytes_ms", "bandwidth_gb_s")
FIGURES = (
    "provider", "tokens_per_s", "speedup_of_toolx", "whole_s", "prefill_s", "step_ms", "step_to_floor",
    "share_of_bandwidth", "kv_mib", "kv_share", "kv_duplicated_mib", "peak_mib", *FLOOR, "note", "absent",
)  # fmt: skip
HEADINGS = (
    "case", "provider", "tokens/s", "toolx is", "whole, s", "prefill, s", "step, ms", "/ floor", "of bandwidth",
    "KV MiB", "of duplicated", "peak MiB",
)  # fmt: skip
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


def rows_of(benchmarks: Iterable[dict]) -> list[dict]:
    """One dict for each provider and case, keys ``CASE + FIGURES``; the floor is a provider with a step alone."""
    rows = []
    for info in (b["extra_info"] for b in benchmarks if "rollout" in b.get("extra_info", {})):
        case, floor, records = info["rollout_case"], info["floor"], info["rollout"]
        known = {key: case[key] for key in (*CASE, "kv_duplicated_mib")}
        known |= {"floor_ms": floor["ms"], "bandwidth_gb_s": floor["bandwidth_gb_s"]}
        known |= {f"floor_{key}": floor[key] for key in ("gemms_ms", "kv_ms", "bytes_ms")}
        ours = {record["provider"]: record.get("tokens_per_s") for record in records}.get("toolx")
        for record in [*records, {"provider": "floor", "step_ms": floor["ms"]}]:
            row = dict.fromkeys(CASE + FIGURES) | known
            row |= {key: value for key, value in record.items() if key in FIGURES}
            row["speedup_of_toolx"] = ratio(ours, row["tokens_per_s"])
            row["step_to_floor"] = ratio(row["step_ms"], floor["ms"])
            row["share_of_bandwidth"] = ratio(floor["bytes_ms"], row["step_ms"])
            row["kv_share"] = ratio(row["kv_mib"], case["kv_duplicated_mib"])
            rows.append(row)
    return rows


def case_name(row: dict) -> str:
    dtype = {"bfloat16": "bf16", "float32": "fp32"}[row["dtype"]]
    return f"{row['model']} {dtype}, {row['prompts']} prompts of {row['length']}, {row['n']} x {row['new']} tokens"


def markdown(rows: list[dict], machine: dict, versions: dict, date: str) -> str:
    lines = [*heading("Rollouts", machine, date, versions), LEGEND]
    cases = named_cases(rows, case_name)
    lines += table(HEADINGS, (cells(row, name, at == 0) for name, case in cases for at, row in enumerate(case)))
    lines += ["", "Floors of a step:", ""]
    for name, (row, *_) in cases:
        lines.append(
            f"- {name}: {row['floor_ms']:.3g} ms, of which linear layers {row['floor_gemms_ms']:.3g} and keys and "
            f"values {row['floor_kv_ms']:.3g} at {row['bandwidth_gb_s']:.3g} GB/s; all bytes alone "
            f"{row['floor_bytes_ms']:.3g} ms"
        )
    if noted := dict.fromkeys(f"- {r['provider']} ({case_name(r)}): {r['note']}" for r in rows if r["note"]):
        lines += ["", "Notes:", "", *noted]
    return "\n".join(lines + absent(rows, case_name)) + "\n"


def cells(row: dict, name: str, first: bool) -> list[str]:
    times = "" if row["speedup_of_toolx"] is None else f"{row['speedup_of_toolx']:.2f} x"
    return [
        name if first else "",
        row["provider"],
        number(row["tokens_per_s"], ",.0f"),
        times,
        number(row["whole_s"], ".3g"),
        number(row["prefill_s"], ".3g"),
        number(row["step_ms"], ".3g"),
        number(row["step_to_floor"], ".2f"),
        number(row["share_of_bandwidth"], ".0%"),
        number(row["kv_mib"], ",.1f"),
        number(row["kv_share"], ".2f"),
        number(row["peak_mib"], ",.0f"),
    ]


def plot(rows: list[dict], folder: Path) -> None:
    """rollout.png: tokens per second on the left, the decode step and its floor on the right, a row of bars a case."""
    cases = named_cases(rows, case_name)
    colours = colours_of(row for _, case in cases for row in case if row["provider"] != "floor")  # before pyplot
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(cases), 2, figsize=(10, 0.8 + 1.7 * len(cases)), layout="constrained", squeeze=False
    )
    for (speed, step), (name, case) in zip(axes, cases, strict=True):
        timed = [row for row in case if row["provider"] in colours]
        where, shades = range(len(timed)), [colours[row["provider"]] for row in timed]
        speed.bar_label(speed.barh(where, [row["tokens_per_s"] for row in timed], color=shades), fmt="{:,.0f}")
        step.barh(where, [row["step_ms"] for row in timed], color=shades)
        step.axvline(timed[0]["floor_ms"], color="black", linewidth=1)
        speed.set_title(name, fontsize=9, loc="left")
        for each in (speed, step):
            each.set_yticks([])
            each.invert_yaxis()
            each.margins(x=0.15)
    axes[-1][0].set_xlabel("tokens per second")
    axes[-1][1].set_xlabel("decode step, ms (line: floor)")
    save_with_legend(figure, colours, folder / "rollout.png")


def write(record: dict, results: Path = RESULTS) -> Path:
    """Writes the folder of the machine that ``record``, the parsed JSON, was measured on, and returns it."""
    return write_versioned("rollout", record, CASE + FIGURES, rows_of, markdown, plot, results)


def main() -> int:
    return command("bench.rollout.report", __doc__, "rollout", rows_of, write)


if __name__ == "__main__":
    sys.exit(main())
