"""Rows for the records of real models, from files and BFCL, as JSONL files in a folder.

    python -m bench.learning.real_rows smollm2 runs/smollm2/data seal-tools-train.jsonl
    python -m bench.learning.real_rows coder runs/coder/data xlam-star.jsonl seal-tools-train.jsonl

rl.jsonl             training rows of RL: all usable rows for smollm2, 96 of them for coder
cold.jsonl           the other one-call rows, which the cold start of smollm2 imitates
demonstrations.jsonl all other rows, from which demonstrations are taken, in addition to rl.jsonl
bfcl.jsonl           all 600 rows of BFCL's simple_python and multiple, for measurement; no run trains on them

A row is *usable* if its answer is one call and another row demonstrates its tool without revealing the answer: that row
calls the tool with other arguments and for another user text (``DemonstrationIndex``). Sources are any datasets that
``toolx train --dataset`` reads, with distinct ids; the draw is fixed.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from toolx_kernels.toolcall import DemonstrationIndex, Row, read_dataset

MOST_ROWS = {"smollm2": None, "coder": 96}  # of rl.jsonl; None: all usable ones
CATEGORIES = "bfcl:simple_python,bfcl:multiple"


def demonstrated(row: Row, index: DemonstrationIndex) -> bool:
    """Whether some other row demonstrates the tool that the row's answer calls."""
    only_its_own = [tool for tool in row.tools if tool["function"]["name"] == row.answer[0]["name"]]
    return index.possible(Row(row.id, row.prompt, only_its_own, row.answer, row.columns))


def chosen(rows: Sequence[Row], most: int | None) -> list[Row]:
    """The usable rows, or ``most`` of them, in order; prints how many rows meet each criterion."""
    index = DemonstrationIndex(rows)
    calling = Counter(name for row in rows for name in {call["name"] for call in row.answer})
    one_call = [row for row in rows if len(row.answer) == 1]
    usable = [row for row in one_call if demonstrated(row, index)]
    print(
        f"{len(rows)} rows; of {len(one_call)} with one call, "
        f"{sum(calling[row.answer[0]['name']] > 1 for row in one_call)} have a tool that another row's answer calls, "
        f"{len(usable)} are usable"
    )
    if most is None:
        return usable
    return [usable[place] for place in sorted(random.Random("rl").sample(range(len(usable)), most))]


def write(path: Path, rows: Iterable[Row]) -> None:
    lines = [
        {"id": row.id, "prompt": row.prompt, "tools": row.tools, "answer": row.answer, **row.columns} for row in rows
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", choices=MOST_ROWS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("sources", nargs="+")
    args = parser.parse_args(argv)
    rows = read_dataset(",".join(args.sources))
    rl = chosen(rows, MOST_ROWS[args.record])
    ids = {row.id for row in rl}
    others = [row for row in rows if row.id not in ids]
    args.folder.mkdir(parents=True, exist_ok=True)
    write(args.folder / "rl.jsonl", rl)
    if args.record == "smollm2":
        write(args.folder / "cold.jsonl", (row for row in others if len(row.answer) == 1))
    write(args.folder / "demonstrations.jsonl", others)
    write(args.folder / "bfcl.jsonl", read_dataset(CATEGORIES))


if __name__ == "__main__":
    main()
