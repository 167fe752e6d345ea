"""``toolx compare``: curves and tables of several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from toolx_kernels.cli.parser import Parser

DESCRIPTION = """\
Compares runs: accuracy, hard rows and accuracy per tier over the cost of
training, in one picture; final scores with 95 % intervals, in tables. Runs
whose settings differ only in the seed form one arm. Differences are to the
first arm, paired by seed.

  toolx compare runs/grpo runs/replace
"""


def add_flags(parser: Parser) -> None:
    parser.usage = f"{parser.prog} RUN [RUN ...] [--names NAME ...] [--output FOLDER]"
    parser.description = DESCRIPTION
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of toolx train")
    parser.flag(
        "names",
        nargs="+",
        metavar="NAME",
        help="names of the arms, in order; or of the runs, where runs of the same name form one arm",
    )
    parser.flag(
        "output",
        default="runs/comparison",
        metavar="FOLDER",
        help="folder for comparison.png, comparison.md and comparison.json, new or that of another comparison",
    )


def run(args: argparse.Namespace) -> int:
    from toolx_kernels.compare.arms import arms_of
    from toolx_kernels.compare.report import check_folder, describe, write_comparison
    from toolx_kernels.compare.runs import read_run

    output = Path(args.output)
    replaced = check_folder(output)
    arms = arms_of([read_run(Path(run)) for run in args.runs], args.names)
    write_comparison(output, arms)
    print(describe(arms))
    replaces = " They replace the comparison that was there." if replaced else ""
    print(f"See {output}/comparison.md, which shows comparison.png, and comparison.json.{replaces}")
    return 0
