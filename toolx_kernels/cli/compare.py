"""``toolx compare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from toolx_kernels.cli.parser import Parser
from toolx_kernels.errors import InputError


def add_flags(parser: Parser) -> None:
    parser.description = (
        "Runs side by side: accuracy, hard rows and the accuracy on each tier over what was spent, in one picture; "
        "final figures with 95 % intervals, in tables. Runs whose settings differ only in the seed are one arm; "
        "differences are to the first arm, paired by seed."
    )
    parser.add_argument("runs", nargs="+", help="run folders of toolx train")
    parser.flag(
        "names",
        nargs="+",
        help="one for each arm in order, or one for each run, where runs of the same name are one arm",
    )
    parser.flag(
        "output",
        default="runs/comparison",
        help="the folder for comparison.png, .md and .json, which are replaced there (default: runs/comparison)",
    )


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file: name a folder.")

    from toolx_kernels.compare.arms import arms_of
    from toolx_kernels.compare.report import describe, write_comparison
    from toolx_kernels.compare.runs import read_run

    arms = arms_of([read_run(Path(run)) for run in args.runs], args.names)
    write_comparison(output, arms)
    print(describe(arms))
    print(f"See {output}/comparison.md, which shows comparison.png, and comparison.json.")
    return 0
