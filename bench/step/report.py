"""From the JSON of ``pytest bench --benchmark-json=FILE`` to ``bench/results/<machine>/``: step.csv, .md and .png.

python -m bench.step.report FILE
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

CASE = ("model", "dtype", "prompts", "length", "n", "new", "stop", "dead", "threads")
FIGURES = (
    "provider", "step_s", "speedup_of_toolx", "rollout_s", "update_s", "tokens_per_s", "mean_tokens", "peak_mib",
    "peak_of_toolx", "trained_tokens", "sharing", "sharing_possible", "mean_reward", "absent",
)  # fmt: skip
HEADINGS = (
    "case", "provider", "step, s", "toolx is", "rollout, s", "update, s", "tokens/s", "tokens a completion",
    "peak MiB", "toolx needs", "tokens trained on", "shared", "possible",
)  # fmt: skip
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


def rows_of(benchmarks: Iterable[dict]) -> list[dict]:
    """One dict for each provider and case, keys ``CASE + FIGURES``."""
    rows = []
    for info in (b["extra_info"] for b in benchmarks if "step" in b.get("extra_info", {})):
        case = {key: info["step_case"][key] for key in CASE}
        ours = next(record for record in info["step"] if record["provider"] == "toolx")
        for record in info["step"]:
            row = dict.fromkeys(CASE + FIGURES) | case
            row |= {key: value for key, value in record.items() if key in FIGURES}
            row["speedup_of_toolx"] = ratio(row["step_s"], ours["step_s"])
            row["peak_of_toolx"] = ratio(ours["peak_mib"], row["peak_mib"])
            rows.append(row)
    return rows


def case_name(row: dict) -> str:
    dtype = {"bfloat16": "bf16", "float32": "fp32"}[row["dtype"]]
    extra = ", stop" * row["stop"] + f", {row['dead']:.0%} of groups dead" * bool(row["dead"])
    work = f"{row['prompts']} prompts of {row['length']}, {row['n']} x {row['new']} tokens"
    return f"{row['model']} {dtype}, {work}{extra}, {row['threads']} thread{'s' * (row['threads'] > 1)}"


def markdown(rows: list[dict], machine: dict, versions: dict, date: str) -> str:
    lines = [*heading("Optimizer steps", machine, date, versions), LEGEND]
    cases = named_cases(rows, case_name)
    lines += table(HEADINGS, (cells(row, name, at == 0) for name, case in cases for at, row in enumerate(case)))
    return "\n".join(lines + absent(rows, case_name)) + "\n"


def cells(row: dict, name: str, first: bool) -> list[str]:
    return [
        name if first else "",
        row["provider"],
        number(row["step_s"], ".3g"),
        f"{row['speedup_of_toolx']:.2f} x",
        number(row["rollout_s"], ".3g"),
        number(row["update_s"], ".3g"),
        number(row["tokens_per_s"], ",.3g"),
        number(row["mean_tokens"], ".3g"),
        number(row["peak_mib"], ",.0f"),
        number(row["peak_of_toolx"], ".2f"),
        number(row["trained_tokens"], ",d"),
        f"{row['sharing']:.2f} x",
        f"{row['sharing_possible']:.2f} x",
    ]


def series(rows: list[dict], x: str) -> list[dict]:
    """The rows of cases that differ from the first one in ``x`` alone; a case that is there twice counts once."""
    present = [row for row in rows if not row["absent"]]
    fixed = [key for key in CASE if key != x]
    best: dict[tuple, dict] = {}
    for start in present:
        alike = [row for row in present if all(row[key] == start[key] for key in fixed)]
        found: dict[tuple, dict] = {}
        for row in alike:
            found.setdefault((row["provider"], row[x]), row)
        if len({value for _, value in found}) > len({value for _, value in best}):
            best = found
    return sorted(best.values(), key=lambda row: row[x])


def plot(rows: list[dict], folder: Path) -> None:
    """step.png: step time above and peak memory below, over what was varied (or over all of ``AXES``)."""
    varied = {x: label for x, label in AXES.items() if len({row[x] for row in series(rows, x)}) > 1} or AXES
    colours = colours_of(row for x in varied for row in series(rows, x))  # before pyplot, which takes a backend
    from matplotlib import pyplot as plt

    size = (3.5 * len(varied) + 3, 6)
    figure, axes = plt.subplots(2, len(varied), figsize=size, layout="constrained", sharey="row", squeeze=False)
    for column, (x, label) in zip(axes.T, varied.items(), strict=True):
        for axis, y in zip(column, ("step_s", "peak_mib"), strict=True):
            for name in colours:
                mine = [(row[x], row[y]) for row in series(rows, x) if row["provider"] == name]
                axis.plot(*zip(*mine, strict=True), "o-", color=colours[name], label=name) if mine else None
            axis.set_ylim(bottom=0)
        column[1].set_xlabel(label)
    axes[0][0].set_ylabel("step, s")
    axes[1][0].set_ylabel("peak memory of the process, MiB")
    save_with_legend(figure, colours, folder / "step.png")


def write(record: dict, results: Path = RESULTS) -> Path:
    """Writes the folder of the machine that ``record``, the parsed JSON, was measured on, and returns it."""
    return write_versioned("step", record, CASE + FIGURES, rows_of, markdown, plot, results)


def main() -> int:
    return command("bench.step.report", __doc__, "step", rows_of, write)


if __name__ == "__main__":
    sys.exit(main())
